"""What the model costs, and how exactly it is the reference's. Every figure of the README about it.

    python benchmarks/model.py [vectors] [loss] [blocks] [compile] [--json]

vectors   largest difference from the reference's vectors, by group
loss      supervised rows against all logits at 32,009 words: time and memory
blocks    activation checkpointing: memory and time of a microbatch
compile   torch.compile of the blocks against eager
Without a name: all of them. On a GPU: benchmarks/model_gpu.py.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from omnimodel import OmniLMMConfig, OmniLMMForCausalLM  # noqa: E402
from omnimodel.blocks import checkpoint_blocks, compile_blocks  # noqa: E402
from omnimodel.loss import LossHead, summed_loss, supervised_rows  # noqa: E402

Result = dict[str, Any]


def seconds(run: Callable[[], Any], *, repeats: int = 5) -> float:
    """Median wall time of a call after one warm-up; waits for a GPU."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


# --- vectors ----------------------------------------------------------------------------------------------

# 1e-5, or what the vectors' notes allow (logits, transform). The resampler's vectors are float32: what is
# exact (our float64) is up to 8.5e-6 away from them, so another float32 computation can be 1e-5 and more away
# by rounding alone. Its gradients are sums of thousands of products and reach 62: 1e-5 of that.
TOLERANCES = {"resampler output": 2e-5, "resampler output, float64": 1e-5, "resampler gradient": 6e-4}
TOLERANCES |= {"image transform": 0.04, "logits": 1e-4, "loss": 1e-5, "gradients": 1e-5}


def vectors() -> Result:
    """Largest absolute difference by vector group, and the largest value it is a difference of."""
    rows = {**_resampler_errors(), "image transform": _transform_error(), **_model_errors()}
    return {name: row | {"tolerance": TOLERANCES[name]} for name, row in rows.items()}


def vectors_table(rows: Result) -> str:
    """For people."""
    lines = [f"{'vectors':<28}{'max error':>12}{'max value':>12}{'tolerance':>12}"]
    for name, row in rows.items():
        lines.append(f"{name:<28}{row['max_error']:>12.1e}{row['max_value']:>12.3g}{row['tolerance']:>12.0e}")
    return "\n".join(lines)


def _resampler_errors() -> Result:
    import test_resampler as vectors

    worst = {name: (0.0, 0.0) for name in TOLERANCES if name.startswith("resampler")}
    for name, case in vectors.CASES:
        arrays = np.load(vectors.GOLDEN / f"resampler/{name}.io.npz")
        x, y, grad = (torch.from_numpy(arrays[f"{case}/{field}"]) for field in ("x", "y", "grad_query"))
        mask = torch.from_numpy(arrays[f"{case}/attn_mask"]) if f"{case}/attn_mask" in arrays else None
        resampler = vectors.golden_resampler(name)
        output = resampler(x.float(), attn_mask=mask)
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        worst["resampler gradient"] = max(
            worst["resampler gradient"], _difference(resampler.query.grad, grad)
        )
        worst["resampler output"] = max(worst["resampler output"], _difference(output, y))
        exact = resampler.double()(x.double(), attn_mask=mask)
        worst["resampler output, float64"] = max(worst["resampler output, float64"], _difference(exact, y))
    return {name: {"max_error": error, "max_value": value} for name, (error, value) in worst.items()}


def _difference(ours: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    return (ours - reference).abs().max().item(), reference.abs().max().item()


def _transform_error() -> Result:
    import PIL.Image
    import test_processing as vectors

    expected, worst = np.load(vectors.GOLDEN / "transform/expected.npz"), (0.0, 0.0)
    for case in vectors.CASES:
        name, size = case.split("@")
        pixels = vectors.ImageProcessor(int(size))(PIL.Image.open(vectors.GOLDEN / "transform/images" / name))
        worst = max(worst, _difference(pixels[:, ::7, ::7], torch.from_numpy(expected[f"{case}/every_7th"])))
    return {"max_error": worst[0], "max_value": worst[1]}


def _model_errors() -> Result:
    import test_modeling as vectors

    groups = {"logits": (0.0, 0.0), "loss": (0.0, 0.0), "gradients": (0.0, 0.0)}
    for case in vectors.FORWARD:
        is_b = "sliding_window_6" in case
        model = vectors.golden_model("m_b", sliding_window=6) if is_b else vectors.golden_model()
        fields = vectors.golden_case(case)
        inputs = (fields[name] for name in ("input_ids", "attention_mask", "labels", "images"))
        output = model(*inputs, return_logits=True)
        output.loss.backward()
        text = fields["attention_mask"].bool()
        groups["logits"] = max(groups["logits"], _difference(output.logits[text], fields["logits"][text]))
        groups["loss"] = max(groups["loss"], _difference(output.loss, fields["loss"]))
        for name in [name for name in fields if name.startswith("grad:")]:
            grad = model.get_parameter(name.removeprefix("grad:")).grad
            groups["gradients"] = max(groups["gradients"], _difference(grad, fields[name]))
    return {name: {"max_error": error, "max_value": value} for name, (error, value) in groups.items()}


# --- loss -------------------------------------------------------------------------------------------------

TOKENS, WIDTH, WORDS = 2048, 512, 32_009


def loss() -> Result:
    """Each variant in a process of its own, for its peak memory."""
    results = {}
    for share in (0.25,):
        rows = {
            variant: _in_a_process("loss_variant", variant, share) for variant in ("idle", "full", "ours")
        }
        idle = rows.pop("idle")["peak_mb"]
        results[f"{share:.0%} supervised"] = {
            variant: {"seconds": row["seconds"], "extra_mb": round(row["peak_mb"] - idle)}
            for variant, row in rows.items()
        }
    return {"tokens": TOKENS, "width": WIDTH, "words": WORDS} | results


def loss_variant(variant: str, share: float) -> Result:
    """Loss and gradients of head and hidden states; ``idle`` allocates the inputs only."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    head = LossHead(WIDTH, WORDS, bias=False)
    labels = torch.randint(0, WORDS, (TOKENS,)).masked_fill(torch.rand(TOKENS) >= share, -100)
    head.weight.grad, hidden.grad = torch.zeros_like(head.weight), torch.zeros_like(hidden)

    def full() -> None:
        logits = F.linear(hidden, head.weight).float()
        F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").backward()

    def ours() -> None:
        summed_loss(head, *supervised_rows(hidden, labels)).backward()

    runs = {"full": full, "ours": ours, "idle": lambda: None}
    return {"seconds": round(seconds(runs[variant], repeats=2), 3), "peak_mb": _peak_mb()}


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _in_a_process(function: str, *arguments: Any) -> Result:
    code = f"import model; print(model.json.dumps(model.{function}(*{arguments!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


# --- blocks and compile -----------------------------------------------------------------------------------


def small_model() -> tuple[OmniLMMForCausalLM, Result]:
    """About 8 M parameters and a pack of 1,024 tokens in 8 documents, two of them with an image."""
    torch.manual_seed(0)
    config = OmniLMMConfig(
        vocab_size=8192,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=None,
        num_query=16,
        image_size=56,
        mm_vision_tower="eva02_tiny_patch14_224",
        vision_kwargs={"img_size": 56, "depth": 3},
        im_patch_token=8000,
        im_start_token=8001,
        im_end_token=8002,
    )
    return OmniLMMForCausalLM(config).train(), pack(config, num_documents=8, length=128, num_images=2)


def pack(
    config: OmniLMMConfig, *, num_documents: int, length: int, num_images: int, device: str = "cpu"
) -> Result:
    """A packed microbatch of equal documents, a third of each supervised."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1000, (num_documents, length), generator=generator)
    block = [config.im_start_token, *[config.im_patch_token] * config.num_query, config.im_end_token]
    ids[:num_images, 1 : 1 + len(block)] = torch.tensor(block)
    labels = ids.clone()
    labels[:, : -length // 3] = -100
    size = (num_images, 3, config.image_size, config.image_size)
    return {
        "input_ids": ids.flatten()[None].to(device),
        "shift_labels": labels.flatten()[None].to(device),
        "position_ids": torch.arange(length).repeat(num_documents)[None].to(device),
        "cu_seqlens": torch.arange(0, num_documents * length + 1, length, dtype=torch.int32).to(device),
        "max_seqlen": length,
        "pixel_values": torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).to(device),
        "num_supervised_rows": int((labels != -100).sum()),
    }


def blocks() -> Result:
    """Extra memory and seconds of one microbatch, each mode in a process of its own."""
    modes = ("idle", "none", "selective", "full")
    rows = {mode: _in_a_process("blocks_variant", mode) for mode in modes}
    idle = rows.pop("idle")["peak_mb"]
    return {
        mode: {"seconds": row["seconds"], "extra_mb": round(row["peak_mb"] - idle)}
        for mode, row in rows.items()
    }


def blocks_variant(mode: str) -> Result:
    """Forward and backward under one mode of activation checkpointing."""
    model, batch = small_model()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if mode == "idle":
        return {"seconds": 0.0, "peak_mb": _peak_mb()}
    checkpoint_blocks(model, mode)
    return {"seconds": round(_step(model, batch), 3), "peak_mb": _peak_mb()}


def _step(model: OmniLMMForCausalLM, batch: Result, *, repeats: int = 2) -> float:
    return seconds(lambda: model(**batch).loss.backward(), repeats=repeats)


def compiled() -> Result:
    """Eager against compiled blocks, in one process, turn by turn."""
    eager, batch = small_model()
    model, _ = small_model()
    compile_blocks(model)
    start = time.perf_counter()
    first = model(**batch).loss
    first.backward()
    compile_seconds = time.perf_counter() - start
    turns = [(_step(eager, batch, repeats=1), _step(model, batch, repeats=1)) for _ in range(3)]
    slow, fast = (statistics.median(turn[side] for turn in turns) for side in (0, 1))
    return {
        "eager_seconds": round(slow, 3),
        "compiled_seconds": round(fast, 3),
        "gain": round(slow / fast, 2),
        "compile_seconds": round(compile_seconds, 1),
        "loss_difference": abs(first.item() - eager(**batch).loss.item()),
    }


# --- command line -----------------------------------------------------------------------------------------

SECTIONS = {"vectors": vectors, "loss": loss, "blocks": blocks, "compile": compiled}


def main() -> None:
    """Run the sections asked for and print them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    options = parser.parse_args()
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    machine = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    results: Result = {"torch": torch.__version__, "machine": machine}
    for name in options.sections or SECTIONS:
        results[name] = SECTIONS[name]()
        if not options.json:
            text = vectors_table(results[name]) if name == "vectors" else json.dumps(results[name], indent=2)
            print(f"{name}\n{text}\n", flush=True)
    if options.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
