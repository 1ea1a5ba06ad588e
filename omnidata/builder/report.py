"""What a run of the build came to: as lines for people, or as JSON for scripts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from omnidata.builder.worker import total_counts
from omnidata.printable import clock
from omnidata.schema import REASONS, REJECTS, Manifest


@dataclass(frozen=True)
class BuildReport:
    """Totals of the dataset, or of the shards so far where other tasks still have some to build."""

    out: str
    complete: bool
    num_records: int
    num_samples: int
    num_rejects: int
    rejects: dict[str, int]  # reason -> count
    num_truncated: int
    num_tokens: int
    num_supervised: int
    num_images: int
    num_bytes: int
    splits: dict[str, int]
    num_shards: int
    shards_done: int
    shards_built: int  # by this run
    samples_built: int  # by this run
    seconds: float
    samples_per_second: float
    first_rejects: list[dict[str, object]]
    unread_keys: dict[str, int]  # key that nothing reads -> samples
    spelled_tokens: dict[str, int]  # control token that replies spell as text -> samples
    content_tokens: dict[str, int]  # added token that content may spell -> samples whose replies do
    notes: dict[str, int]  # what else there is to tell, in words -> samples
    num_dialogue_bytes: int = 0  # of num_bytes, what the conversations take (KEY.json)
    empty_sources: list[str] = field(default_factory=list)  # files that hold no record
    base: dict[str, Any] = field(default_factory=dict)  # of a view: the dataset that has its images

    def to_json(self) -> dict[str, object]:
        """Plain JSON values."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The end of a build, for people."""
        rate = f"{self.samples_per_second:,.0f} samples/s"
        speed = f"{self.shards_built:,} shards in {clock(self.seconds)} ({rate})"
        if not self.complete:
            return [
                f"{self.out}: built {speed}; {self.shards_done:,} of {self.num_shards:,} shards are done.",
                "The dataset is complete when the other tasks are.",
            ]
        splits = ", ".join(f"{split} {count:,}" for split, count in self.splits.items())
        return [
            f"{self.out}: {self.num_samples:,} samples ({splits}) in {self.num_shards:,} shards, "
            f"{self.num_bytes / 1e6:,.1f} MB; built {speed}.",
            f"  {self.num_tokens:,} tokens, {self.num_supervised:,} supervised; {self.num_images:,} images"
            + (f"; {self.num_truncated:,} samples cut at a turn to fit" if self.num_truncated else ""),
            *self._dialogue_lines(),
            *self._base_lines(),
            *self._reject_lines(),
            *self._count_lines(),
            *(f"  {source} holds no record" for source in self.empty_sources),
        ]

    def _dialogue_lines(self) -> list[str]:
        """What the conversations cost."""
        if not self.num_dialogue_bytes:
            return []
        mean = self.num_dialogue_bytes / max(1, self.num_samples)
        return [
            f"  {self.num_dialogue_bytes / 1e6:,.1f} MB of that are conversations, {mean:,.0f} bytes "
            "per sample: `omnidata render` needs no corpus (--no-conversation leaves them out)"
        ]

    def _base_lines(self) -> list[str]:
        """What a view is a view of."""
        if not self.base:
            return []
        return [
            f"  a view of {self.base['name']}: its records are the {self.base['num_samples']:,} samples "
            f"there, and its images stay there ({self.base['num_bytes'] / 1e6:,.1f} MB)"
        ]

    def _count_lines(self) -> list[str]:
        """What is in the data and not obvious: each name once."""
        unread = [f"  {n:,} records have {key!r}, which is not used" for key, n in self.unread_keys.items()]
        spelled = [
            f"  the replies of {n:,} samples spell {token}, which is encoded as text "
            f"(--content-token '{token}' makes it the token)"
            for token, n in self.spelled_tokens.items()
        ]
        written = [f"  {token} {n:,}" for token, n in self.content_tokens.items() if n]
        told = [f"  {n:,} samples {note}" for note, n in self.notes.items()]
        if written:
            told.append(f"  samples whose replies write these tokens:{','.join(written)}")
        return unread + spelled + told

    def _reject_lines(self) -> list[str]:
        if not self.num_rejects:
            return [f"  all {self.num_records:,} records became samples"]
        return [
            f"  {self.num_rejects:,} of {self.num_records:,} records refused, see {self.out}/{REJECTS} "
            f"(omnidata inspect {self.out} --rejects):",
            *(f"  {count:8,}  {reason}: {REASONS[reason]}" for reason, count in sorted(self.rejects.items())),
            *(f"            e.g. {describe(reject)}" for reject in self.first_rejects),
        ]


def describe(reject: dict[str, object]) -> str:
    """One reject on one line."""
    return f"{reject['source']}, {reject['locator']}: {reject['detail']}".replace("\n", "␊")


def examples(rejects: Iterable[dict[str, object]]) -> str:
    """The rejects as lines to put below a message."""
    return "".join(f"\n  {describe(reject)}" for reject in rejects)


def report_of(manifest: Manifest, **run: Any) -> BuildReport:
    """The report of a complete dataset."""
    return BuildReport(
        complete=True,
        num_records=manifest.num_records,
        num_samples=manifest.num_samples,
        num_rejects=manifest.num_rejects,
        rejects=manifest.rejects,
        unread_keys=manifest.unread_keys,
        spelled_tokens=manifest.spelled_tokens,
        content_tokens=manifest.content_tokens,
        notes=manifest.notes,
        num_truncated=manifest.num_truncated,
        num_tokens=manifest.num_tokens,
        num_supervised=manifest.num_supervised,
        num_images=manifest.num_images,
        num_dialogue_bytes=manifest.num_dialogue_bytes,
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
        splits=manifest.splits,
        num_shards=len(manifest.shards),
        shards_done=len(manifest.shards),
        empty_sources=[entry["source"] for entry in manifest.inputs if not entry["num_records"]],
        base=manifest.base,
        **run,
    )


def partial_report(done: Any, *, num_shards: int, **run: Any) -> BuildReport:
    """The report of a task while others still have shards to build; ``done``: (task, result) pairs."""
    results = [result for _, result in done]
    rejects, splits, counts = Counter[str](), Counter[str](), total_counts(results)
    for task, result in done:
        rejects.update(result.rejects)
        splits[task.split] += result.num_samples
    return BuildReport(
        complete=False,
        num_records=sum(result.num_records for result in results),
        num_samples=sum(result.num_samples for result in results),
        num_rejects=sum(rejects.values()),
        rejects=dict(sorted(rejects.items())),
        num_truncated=sum(len(result.truncated) for result in results),
        num_tokens=sum(result.info.num_tokens for result in results if result.info),
        num_supervised=sum(result.num_supervised for result in results),
        num_images=sum(result.num_images for result in results),
        num_dialogue_bytes=sum(result.num_dialogue_bytes for result in results),
        num_bytes=sum(result.num_bytes for result in results),
        splits=dict(splits),
        num_shards=num_shards,
        shards_done=len(results),
        first_rejects=[],
        unread_keys=counts["unread_keys"],
        spelled_tokens=counts["spelled_tokens"],
        content_tokens=counts["content_tokens"],
        notes=counts["notes"],
        **run,
    )
