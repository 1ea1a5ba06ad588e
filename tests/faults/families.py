"""Training of transformers' own classes that is killed, and gone on with in another world.

qwen3_vl      a vision-language model with attention alone
minicpmv4_6   gated delta nets, run once a document
internvl      pictures cut into tiles
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from family_data import build_family, write_ten_records

from faults.table import Row
from faults.training import KILL, STEPS, Fault, Trial

FAMILIES = ("qwen3_vl", "minicpmv4_6", "internvl")
MOMENTS = ("save", "write", "rename", "step")


def rows(folder: Path, short: bool) -> Iterator[Row]:
    """A row for each family: killed at a moment, then at random, one rank and all."""
    rng = random.Random(16)
    records = write_ten_records(folder / "records")
    for name in FAMILIES[:1] if short else FAMILIES:
        trial = FamilyTrial(folder / name, rng, name, records)
        faults = [Fault(KILL, "all", "save")]
        if not short:
            faults = [Fault(KILL, whom, moment) for moment in MOMENTS for whom in ("one", "all")]
            faults += [Fault(KILL, whom, None) for whom in ("one", "all")] * 2
        how = "at a moment" if short else "at a moment, at random"
        yield trial.row(f"kill -9 of training, {name}", how, faults)


class FamilyTrial(Trial):
    """Runs of one family: of one process and of two ranks that share the weights."""

    worlds = (("auto", 1), ("fsdp", 2))
    patience = 300.0  # importing transformers' classes and proving isolation comes before the first step

    def __init__(self, folder: Path, rng: random.Random, family: str, records: Path) -> None:
        self.family, self.records = family, records
        super().__init__(folder, rng)

    def build(self) -> Path:
        """The family's model beside the dataset."""
        return build_family(self.family, self.records, self.folder) / "data"

    def sections(self) -> dict[str, Any]:
        """What the recipe says of the family's data and model."""
        source = str(self.data)
        return {
            "data": {
                "train": [{"path": source}],
                "val": [{"path": source}],
                **{"max_tokens": 256, "global_batch": 2, "num_workers": 0},
            },
            "model": {"path": str(self.folder / "model")},
            "optim": {"lr": 1e-3, "steps": STEPS},
            "eval": {"every": 4, "num_batches": 1},
        }
