"""A recipe small enough to train in a second, for tests of what trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
MODEL = {
    "mm_vision_tower": "vit_tiny_patch16_224",
    "vision_kwargs": {"depth": 3, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "img_size": 32},
    "image_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def tiny_recipe(dataset: Path, run_dir: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A complete recipe tree; ``sections`` are merged into it: ``optim={"steps": 4}``."""
    tree: dict[str, Any] = {
        "run": {"dir": str(run_dir), "device": "cpu", "threads": 1},
        "data": {
            "train": [{"path": str(dataset), "split": "train"}],
            "max_tokens": 192,
            "global_batch": 4,
            "num_workers": 0,
        },
        "model": {"config": dict(MODEL)},
        "optim": {"lr": 3e-3, "steps": 6, "warmup_steps": 2, "weight_decay": 0.01},
        "checkpoint": {"every": 0},
        "eval": {"every": 0},
        "log": {"tensorboard": False, "plot": False, "every": 1},
    }
    for name, section in sections.items():
        tree[name] = tree.get(name, {}) | section
    if tree["model"].get("path"):
        tree["model"].pop("config")
    return tree


def write_recipe(path: Path, tree: dict[str, Any]) -> Path:
    """The tree as a YAML file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree))
    return path


def command(recipe: Path, *overrides: str, ranks: int = 0) -> list[str]:
    """The command that a user would type; ``ranks`` > 0 goes through torchrun."""
    script = str(ROOT / "pipelines" / "train.py")
    if not ranks:
        return [sys.executable, script, str(recipe), *overrides]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*torchrun, script, str(recipe), *overrides]


def train(recipe: Path, *overrides: str, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(recipe, *overrides, ranks=ranks),
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def losses(run_dir: Path) -> list[float]:
    """The loss of every step, exactly as computed."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]
