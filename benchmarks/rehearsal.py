"""What a rehearsal says beside what one H200 took: memory and seconds of a step.

    python benchmarks/rehearsal.py [--json]        no GPU is needed; about a minute for each row

Measured with torch 2.11 by ``benchmarks/train_gpu.py``: OmniLMM-12B's widths, frozen tower, FSDP on one rank;
8,192 tokens in 20 documents, 24 pictures, 2,400 supervised tokens; peak of the allocator.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omnimodel import OmniLMMConfig
from pipelines.config import parse_recipe
from pipelines.packs import Packs, omnilmm_pack
from pipelines.planning import PUBLISHED
from pipelines.rehearsal import rehearse

# Frozen beside the tower, layers, checkpointing, compiled; GB, seconds
MEASURED = [
    ([], 16, "none", False, 86.2, 0.855),
    ([], 16, "selective", False, 73.9, 0.897),
    ([], 16, "none", True, 78.3, 0.804),
    ([], 24, "selective", False, 101.8, 1.127),
    # 84.0 GB when the frozen 6.98 billion weights were float32; now they are bfloat16
    (["language_model"], 32, "none", False, 84.0 - 2 * 6.98, 1.003),
]


def compare(
    frozen: list[str], layers: int, mode: str, is_compiled: bool, gigabytes: float, seconds: float
) -> dict[str, Any]:
    """One row: rehearsed, measured, and their ratio."""
    model = {"config": {}, "freeze": ["vision_tower", *frozen], "compile": is_compiled}
    recipe = parse_recipe(
        {
            "run": {"dir": "unused", "dtype": "bfloat16"},
            "data": {"train": [{"path": "unused"}], "global_batch": 1},
            "model": model | {"activation_checkpointing": mode},
            "optim": {"steps": 1},
            "parallel": {"strategy": "fsdp"},
        }
    )
    config = OmniLMMConfig(**PUBLISHED, num_hidden_layers=layers)
    pack = omnilmm_pack(config, tokens=8192, images=24, documents=20, supervised=2400)
    report = rehearse(recipe, config, Packs(pack, pack, pack), gpus=1, gpu="h200")
    return {
        "run": f"{'align' if frozen else 'sft'}, {layers} layers, {'compiled' if is_compiled else mode}",
        "memory_gb": (report["memory_gb"], gigabytes, report["memory_gb"] / gigabytes),
        "step_seconds": (report["step_seconds"], seconds, report["step_seconds"] / seconds),
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=len(MEASURED), help="only the first ones")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for measured in MEASURED[: options.rows]:
        row = compare(*measured)
        rows.append(row)
        if not options.json:
            memory, seconds = row["memory_gb"], row["step_seconds"]
            print(
                f"{row['run']:<32} {memory[0]:6.1f} of {memory[1]:6.1f} GB ({memory[2]:.3f})   "
                f"{seconds[0]:.3f} of {seconds[1]:.3f} s ({seconds[2]:.3f})",
                flush=True,
            )
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
