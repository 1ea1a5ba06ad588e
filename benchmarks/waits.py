"""How often a step waits for the GPU, by family: with plain tensors, and with those that the host knows too.

    python benchmarks/waits.py [--families qwen3_vl …] [--json]

For each family (tests/tiny_families.py) one pack of the demo's shapes goes forward and backward through the
path that a GPU takes, on the CPU and with real numbers; operations that hand the host a value are counted
(pipelines/waits.py). ``plain`` is a pack of ordinary tensors, ``known`` one as train.py gives it
(omnimodel/host_known.py), with the places that are left. Both must give the same loss and gradients.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
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
from classes import build  # noqa: E402
from tiny_families import MODELS  # noqa: E402

from omnidata.loader import PackLoader  # noqa: E402
from omnimodel.attention import as_on_gpu  # noqa: E402
from omnimodel.host_known import plain  # noqa: E402
from omnimodel.packed import class_for, config_of  # noqa: E402
from pipelines.data import model_inputs  # noqa: E402
from pipelines.waits import Waits  # noqa: E402

CPU = torch.device("cpu")


def step(model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Waits, list[torch.Tensor]]:
    """The waits of one forward and backward; the loss and all gradients."""
    with as_on_gpu(), Waits() as waits:
        loss = model(**inputs).loss
        loss.backward()
    found = [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad(set_to_none=True)
    return waits, found


def row_of(family: str, corpus: Path, folder: Path) -> dict[str, Any]:
    """Everything that is told of one family."""
    with contextlib.redirect_stdout(io.StringIO()):
        build(family, corpus, folder)
    config = config_of(str(folder / "model"))
    model = class_for(config).from_pretrained(str(folder / "model"), config=config, dtype=torch.float32)
    microbatch = next(iter(PackLoader(folder / "data", global_batch=1, max_tokens=2048, num_epochs=1)))
    with as_on_gpu():
        inputs = model_inputs(microbatch, CPU)
    before, expected = step(model, {name: plain(value) for name, value in inputs.items()})
    after, found = step(model, inputs)
    if any(not torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True)):
        raise SystemExit(f"{family}: tensors that the host knows give another loss or gradient")
    return {
        "family": family,
        "pictures": microbatch.num_images,
        "plain": before.places.total(),
        "known": after.places.total(),
        "left": dict(after.places),
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        corpus = Path(temporary) / "shapes"
        shapes = [sys.executable, str(HERE.parent / "pipelines" / "demo" / "shapes.py"), "--out", str(corpus)]
        counts = ["--num-train", "60", "--num-heldout", "2"]
        subprocess.run([*shapes, *counts], check=True, stdout=subprocess.DEVNULL)
        rows = [row_of(name, corpus, Path(temporary) / name) for name in options.families]
    if options.json:
        print(json.dumps(rows))
        return
    print("family           pictures  plain  known  left")
    for row in rows:
        left = ", ".join(f"{place} ({count})" for place, count in row["left"].items())
        print(f"{row['family']:16} {row['pictures']:8} {row['plain']:6} {row['known']:6}  {left}")


if __name__ == "__main__":
    main()
