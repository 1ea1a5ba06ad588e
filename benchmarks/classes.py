"""What tiny random models of current families learn from packs, and whether their documents stay apart.

    python benchmarks/classes.py [--families qwen3_vl …] [--records 1500] [--steps 60] [--json]

For each family (tests/tiny_families.py): the demo's shapes are built with its processor and a run of
train.py of ``--steps`` packs of 2,048 tokens starts from random weights (0: no run). A row has the proof that
train.py makes before it (packed against alone and joined against alone, as shares of the largest hidden
state; its own loss and ours); the largest difference between the gradients of a pack and those of
transformers' own class on one document after the other, as a share of the parameter's largest; and the loss
of the first and of the last steps. Chance is the logarithm of the vocabulary's size.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
from tiny_families import MODELS, TEXT, save  # noqa: E402

from omnidata import Dataset, cli  # noqa: E402
from omnidata.loader import PackLoader  # noqa: E402
from omnimodel.packed import own_inputs  # noqa: E402
from pipelines.config import Recipe, parse_recipe  # noqa: E402
from pipelines.data import model_config, model_inputs  # noqa: E402
from pipelines.isolation import prove_isolation  # noqa: E402
from pipelines.model import build_model  # noqa: E402
from pipelines.parallel import start  # noqa: E402
from pipelines.train import train  # noqa: E402

CPU = torch.device("cpu")
LAST = 5  # steps whose mean is told as the last loss: one pack's is noise


def build(family: str, corpus: Path, folder: Path) -> None:
    """The family's model and the corpus for it."""
    model = save(family, folder / "model")
    arguments = ["build-shards", str(corpus / "train.jsonl"), "--image-root", str(corpus), "--model", model]
    if cli.run([*arguments, "--out", str(folder / "data"), "--workers", "1", "--quiet"]):
        raise SystemExit(f"{family}: the dataset could not be built")


def recipe_of(folder: Path, steps: int) -> Recipe:
    """A pack a step, from the random weights of the folder's model."""
    return parse_recipe(
        {
            "run": {"dir": str(folder / "run"), "device": "cpu", "threads": 1},
            "data": {
                "train": [{"path": str(folder / "data")}],
                **{"max_tokens": 2048, "global_batch": 1, "num_workers": 0},
            },
            "model": {"path": str(folder / "model")},
            "optim": {"lr": 2e-3, "steps": max(1, steps), "warmup_steps": max(0, min(5, steps - 1))},
            "checkpoint": {"every": 0},
        }
    )


def gradient_difference(model: torch.nn.Module, folder: Path) -> float:
    """The first pack in ``model`` against its documents one by one, in the class itself with its own loss."""
    loader = PackLoader(folder / "data", global_batch=1, max_tokens=2048, num_epochs=1)
    microbatch = next(iter(loader))
    model.train()
    model(**model_inputs(microbatch, CPU)).loss.backward()
    own = transformers.AutoModelForImageTextToText.from_pretrained(
        folder / "model", dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False
    ).train()
    samples = {sample.key: sample for sample in Dataset(folder / "data")}
    for key in microbatch.keys:
        alone = loader.of_samples([samples[key]])
        share = alone.num_supervised_tokens / microbatch.num_supervised_tokens
        (own(**own_inputs(own, model_inputs(alone, CPU))).loss * share).backward()
    theirs = dict(own.named_parameters())
    largest = 0.0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            expected = theirs[name].grad
            difference = float((parameter.grad - expected).abs().max())
            largest = max(largest, difference / max(float(expected.abs().max()), 1e-3))
    model.zero_grad(set_to_none=True)
    return largest


def row_of(family: str, corpus: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Everything that is told of one family."""
    with contextlib.redirect_stdout(io.StringIO()):
        build(family, corpus, folder)
        recipe = recipe_of(folder, steps)
        dataset = Dataset(folder / "data", "train")
        with start(recipe) as world:
            built = build_model(recipe, model_config(recipe.model, dataset), world)
            proven = prove_isolation(recipe, world, built, dataset)
            gradients = gradient_difference(built.model, folder)
        losses = losses_of(recipe, folder) if steps else [math.nan]
    found = proven.isolation
    return {
        "family": family,
        "packed": found.packed,
        "joined": found.joined,
        "own_loss": found.own_loss,
        "our_loss": found.our_loss,
        "gradients": gradients,
        "first_loss": losses[0],
        "last_loss": sum(losses[-LAST:]) / len(losses[-LAST:]),
    }


def losses_of(recipe: Recipe, folder: Path) -> list[float]:
    """Of every step of the run."""
    train(recipe)
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--records", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        corpus = Path(temporary) / "shapes"
        shapes = [sys.executable, str(HERE.parent / "pipelines" / "demo" / "shapes.py"), "--out", str(corpus)]
        counts = ["--num-train", str(options.records), "--num-heldout", "10"]
        subprocess.run([*shapes, *counts], check=True, stdout=subprocess.DEVNULL)
        rows = [row_of(name, corpus, Path(temporary) / name, options.steps) for name in options.families]
    if options.json:
        print(json.dumps(rows))
        return
    print(f"chance {math.log(TEXT['vocab_size']):.2f}")
    for row in rows:
        print(
            f"{row['family']:<16} packed {row['packed']:.1e}  joined {row['joined']:.1e}  own loss "
            f"{row['own_loss']:.5f}, ours {row['our_loss']:.5f}  gradients {row['gradients']:.1e}  "
            f"loss {row['first_loss']:.2f} -> {row['last_loss']:.2f}"
        )


if __name__ == "__main__":
    main()
