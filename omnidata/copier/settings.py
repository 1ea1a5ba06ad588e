"""Settings of a copy: everything that decides its bytes besides the datasets themselves."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from omnidata.schema import UserError
from omnidata.where import Where


@dataclass(frozen=True)
class CopySettings:
    """What was asked for."""

    command: str  # merge | subset | export
    datasets: tuple[str, ...]  # folders or URLs, as given
    where: str = ""  # only samples that meet this condition
    exclude: str = ""  # a file that names the keys of samples to leave out
    samples_per_shard: int | None = None
    shard_bytes: int | None = None  # neither: layout.auto_shard_bytes

    def __post_init__(self) -> None:
        if self.samples_per_shard is not None and self.shard_bytes is not None:
            raise UserError("--samples-per-shard and --shard-bytes exclude each other: give one")
        if self.shard_bytes is not None and self.shard_bytes < 1:
            raise UserError(f"--shard-bytes is {self.shard_bytes}: it must be at least 1")
        if self.where:  # one spelling of each condition, and a wrong one is refused before anything is opened
            object.__setattr__(self, "where", str(Where(self.where)))
        if self.command == "subset" and not (self.where or self.exclude):
            raise UserError("give --where, --exclude or both: they say what the subset holds")

    def to_json(self) -> dict[str, object]:
        """Plain JSON values, as they stand in the plan of an unfinished copy."""
        return asdict(self) | {"datasets": list(self.datasets)}
