"""A full-width OmniLMM-12B with few layers on one GPU: its speed, and the attention kernels it stands on.

    python benchmarks/model_gpu.py [--layers 4] [--blocks 8] [--json]        on a CUDA device
    python benchmarks/model_gpu.py --toy                                     the same code at toy sizes, CPU

training         tokens/s forward and backward with a trained and a frozen tower, the tower's share, memory
head_dim_112     SDPA at the tower's head width and at two that kernels are made for, TFLOP/s
varlen           one layer's attention over uneven documents: joined, padded, joined under a mask, ms
no_sync          forward and backward under torch.cuda.set_sync_debug_mode("error"): "passed" or the error
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from model import WORDS, pack, seconds  # noqa: E402

from omnimodel import OmniLMMConfig, OmniLMMForCausalLM, attention  # noqa: E402
from omnimodel.parts import freeze  # noqa: E402

Result = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured; the defaults fit a GPU with 40 GB."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    layers: int = 4  # of the language model's 32
    blocks: int = 8  # of the tower's 63
    documents: int = 16  # in a pack, each with an image
    length: int = 512  # tokens per document
    heads: int = 16  # of the head-width measurement
    patches: int = 1025
    longest: int = 2048  # of the uneven documents
    repeats: int = 20
    config: tuple[tuple[str, Any], ...] = ()  # changes to the 12B's

    def model_config(self) -> OmniLMMConfig:
        """The 12B's widths but for ``config``."""
        defaults: Result = {
            "vocab_size": WORDS,
            "sliding_window": None,
            "num_hidden_layers": self.layers,
            "vision_kwargs": {"depth": self.blocks + 1},
        }
        return OmniLMMConfig(**defaults | dict(self.config))


TOY = Sizes(
    **{"device": "cpu", "dtype": torch.float32, "layers": 1, "blocks": 1, "documents": 2, "length": 80},
    **{"heads": 2, "patches": 65, "longest": 128, "repeats": 2},
    config=(
        *(("hidden_size", 128), ("intermediate_size", 256), ("num_attention_heads", 4)),
        *(("num_key_value_heads", 2), ("image_size", 56), ("mm_vision_tower", "eva02_tiny_patch14_224")),
        ("vision_kwargs", {"img_size": 56, "depth": 2}),
    ),
)


def measure(sizes: Sizes) -> Result:
    """All parts."""
    on_gpu = sizes.device == "cuda"
    model, batch = build(sizes)
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu, toy sizes: the figures mean nothing",
        "torch": torch.__version__,
        "no_sync": no_sync(model, batch) if on_gpu else "skipped: needs CUDA",
        "training": training(model, batch, sizes),
        "head_dim_112": head_width(sizes),
        "varlen": varlen(sizes),
    }


def build(sizes: Sizes) -> tuple[OmniLMMForCausalLM, Result]:
    """The model and a pack with one image a document."""
    config = sizes.model_config()
    with torch.device(sizes.device):
        model = OmniLMMForCausalLM(config).to(sizes.dtype).train()
    shape = {"num_documents": sizes.documents, "length": sizes.length, "num_images": sizes.documents}
    return model, pack(config, **shape, device=sizes.device)


def no_sync(model: OmniLMMForCausalLM, batch: Result) -> str:
    """Whether a step of forward and backward never waits for the GPU."""
    model(**batch).loss.backward()  # kernels are chosen and compiled at the first call
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**batch).loss.backward()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
        model.zero_grad(set_to_none=True)
    return "passed"


def training(model: OmniLMMForCausalLM, batch: Result, sizes: Sizes) -> Result:
    """Tokens/s of forward and backward, with and without gradients in the tower."""
    num_tokens = batch["input_ids"].numel()
    without = batch | {"pixel_values": None, "input_ids": batch["input_ids"] % WORDS % 1000}
    result: Result = {"layers": sizes.layers, "tower_blocks": sizes.blocks, "tokens": num_tokens}
    for name, frozen in (("trained_tower", []), ("frozen_tower", ["vision_tower"])):
        freeze(model, frozen)
        if sizes.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        whole, text = (_step(model, inputs) for inputs in (batch, without))
        result[name] = {
            "tokens_per_second": round(num_tokens / whole),
            "milliseconds": round(1e3 * whole, 1),
            # Of few layers and blocks: scale both before quoting a share of the 12B's time.
            "tower_and_resampler_share": round(1 - text / whole, 3),
            "peak_gb": round(torch.cuda.max_memory_allocated() / 2**30, 1)
            if sizes.device == "cuda"
            else None,
        }
        model.zero_grad(set_to_none=True)
    return result


def _step(model: OmniLMMForCausalLM, batch: Result) -> float:
    return seconds(lambda: model(**batch).loss.backward(), repeats=3)


def head_width(sizes: Sizes) -> Result:
    """TFLOP/s forward (4·N²·width a head) and with backward (3.5 times that)."""
    result = {}
    shape = (3, sizes.heads, sizes.heads, sizes.patches)
    flops = 4 * sizes.heads**2 * sizes.patches**2
    for width in (64, 112, 128):
        qkv = torch.randn(*shape, width, device=sizes.device, dtype=sizes.dtype, requires_grad=True)

        def forward(qkv: torch.Tensor = qkv) -> torch.Tensor:
            return F.scaled_dot_product_attention(*qkv)

        def both(forward: Callable[[], torch.Tensor] = forward) -> None:
            forward().sum().backward()

        rates = (
            factor * flops * width / seconds(run, repeats=sizes.repeats) / 1e12
            for factor, run in ((1, forward), (3.5, both))
        )
        result[str(width)] = dict(
            zip(("forward", "with_backward"), (round(r, 1) for r in rates), strict=True)
        )
    return result


def varlen(sizes: Sizes) -> Result:
    """Joined documents against padded ones and against one mask; milliseconds a forward pass."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(sizes.longest // 32, sizes.longest, (sizes.documents,), generator=generator)
    total, longest = int(lengths.sum()), int(lengths.max())
    bounds = F.pad(lengths.cumsum(0), (1, 0)).int().to(sizes.device)
    kind = {"device": sizes.device, "dtype": sizes.dtype}
    joined = [torch.randn(1, heads, total, 128, **kind) for heads in (32, 8, 8)]
    padded = [torch.randn(sizes.documents, heads, longest, 128, **kind) for heads in (32, 8, 8)]
    arguments = (*joined, attention.Packing(bounds, longest))
    on_gpu = sizes.device == "cuda"
    attend = attention.varlen_attention if on_gpu else attention.per_document_attention
    runs: dict[str, Callable[[], torch.Tensor]] = {
        "varlen_ms": lambda: attend(*arguments),
        "padded_ms": lambda: F.scaled_dot_product_attention(*padded, is_causal=True, enable_gqa=True),
        "masked_ms": lambda: attention.masked_attention(*arguments),
    }
    times = {name: round(1e3 * seconds(run, repeats=sizes.repeats), 3) for name, run in runs.items()}
    difference = (runs["varlen_ms"]() - runs["masked_ms"]()).abs().max().item()
    padding = round(1 - total / (sizes.documents * longest), 3)
    return {
        "tokens": total,
        "padding": padding,
        **times,
        "largest_difference_of_varlen_to_masked": difference,
    }


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=Sizes.layers, help="of the language model")
    parser.add_argument("--blocks", type=int, default=Sizes.blocks, help="of the tower")
    parser.add_argument("--toy", action="store_true", help="toy sizes on the CPU, to run every line once")
    parser.add_argument("--json", action="store_true", help="one line")
    options = parser.parse_args()
    if not options.toy and not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device; --toy runs its code at toy sizes on the CPU")
    sizes = TOY if options.toy else Sizes(layers=options.layers, blocks=options.blocks)
    print(json.dumps(measure(sizes), indent=None if options.json else 2))


if __name__ == "__main__":
    main()
