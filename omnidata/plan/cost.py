"""What a dataset costs to train on: FLOPs of one pass over it, for a named model, on named GPUs.

The forward pass is counted from shapes alone (P parameters, L layers, width d)::

    one image of N patches     2·P·N + 4·L·N²·d    attends both ways         OmniLMM-12B: 9.25 T at 448²
    one document of T tokens   2·P·T + 2·L·d·T²    causal: half the square   OmniLMM-12B: 5.63 T at T = 400

and each part is multiplied by what training does with it: 1 forward only; 2 frozen, but gradients pass
through it to something trained before it; 3 trained. Left out, about 2 % together: resampler, ``lm_head``
on supervised positions, optimizer. Recomputing activations would add up to one more forward pass.

    hours = FLOPs / (GPUs × peak FLOP/s × MFU) / 3600       MFU (share of the peak reached) is an assumption
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from omnidata.schema import UserError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the formulas need to know of a model."""

    name: str
    doc: str
    tower_params: float  # of the blocks that run (the last one does not)
    tower_layers: int
    tower_width: int
    patch_size: int  # pixels
    lm_params: float  # layers and norm; no embedding, no lm_head
    lm_layers: int
    lm_width: int

    def num_patches(self, image_size: int) -> int:
        """Tokens in the tower for a square image, the class token included: 448 -> 1,025 at patch 14."""
        return (-(-image_size // self.patch_size)) ** 2 + 1


_MISTRAL_7B = (6.979588096e9, 32, 4096)  # lm_params, lm_layers, lm_width

MODELS: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape("omnilmm-12b", "EVA02-E/14 and Mistral-7B", 4.280795904e9, 63, 1792, 14, *_MISTRAL_7B),
        ModelShape("so400m-7b", "SigLIP SO400M/14 and Mistral-7B", 0.397e9, 26, 1152, 14, *_MISTRAL_7B),
        ModelShape("vitl-7b", "CLIP ViT-L/14 and Mistral-7B", 0.291e9, 23, 1024, 14, *_MISTRAL_7B),
    )
}
DEFAULT_MODEL = "omnilmm-12b"

# Dense bf16 peaks with fp32 accumulation, from the makers' data sheets, FLOP/s.
GPUS: dict[str, float] = {
    "b200": 2250e12,
    "h200": 989e12,
    "h100": 989e12,
    "a100": 312e12,
    "l40s": 362e12,
    "rtx4090": 165e12,
}
DEFAULT_GPU = "h100"
DEFAULT_MFU = 0.40
PARTS = ("vision_tower", "resampler", "language_model")  # in the order of the forward pass
DEFAULT_FROZEN = ("vision_tower",)


CHANNELS = 3


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs and hours of one epoch, with every assumption beside them."""

    model: str
    gpu: str
    num_gpus: int
    peak_flops_per_gpu: float  # FLOP/s
    mfu: float  # assumed share of the peak
    frozen: tuple[str, ...]
    patches_per_image: float  # mean
    tflops_per_image: float  # forward, mean
    image_flops: float  # of the epoch, training multiplier included
    token_flops: float  # of the epoch, training multiplier included
    flops: float
    hours: float


@dataclass(frozen=True, slots=True)
class Assumptions:
    """What the user may set. Raises UserError for a name that is not in the tables above."""

    model: str = DEFAULT_MODEL
    gpu: str = DEFAULT_GPU
    num_gpus: int = 1
    mfu: float = DEFAULT_MFU
    frozen: tuple[str, ...] = DEFAULT_FROZEN

    def __post_init__(self) -> None:
        _known("model", [self.model], MODELS)
        _known("GPU", [self.gpu], GPUS)
        _known("part to freeze", self.frozen, PARTS)
        if not (0 < self.mfu <= 1 and self.num_gpus > 0):
            raise UserError(
                f"MFU is a share in (0, 1] and GPUs at least 1, not {self.mfu} and {self.num_gpus}"
            )


def _known(what: str, names: Collection[str], allowed: Collection[str]) -> None:
    for name in names:
        if name not in allowed:
            raise UserError(f"unknown {what} {name!r}: choose from {', '.join(allowed)}")


def training_multiplier(part: str, frozen: Collection[str]) -> int:
    """Passes that a part costs in training.

    Example: the tower frozen, the resampler trained: tower 1, a frozen language model 2, a trained one 3.
    """
    if part not in frozen:
        return 3
    return 2 if any(before not in frozen for before in PARTS[: PARTS.index(part)]) else 1


def token_weights(assume: Assumptions, *, image_size: int = 448) -> tuple[float, float]:
    """What an image of ``image_size`` pixels per side, and a document's squared length, weigh in tokens.

    For ``PackLoader(image_cost=…, attention_cost=…)``. Example: omnilmm-12b, the tower frozen -> 220.9 and
    1.88e-5; trained -> 662.7 and 1.88e-5.
    """
    shape = MODELS[assume.model]
    passes = [training_multiplier(part, assume.frozen) for part in ("vision_tower", "language_model")]
    token = 2 * shape.lm_params * passes[1]
    attention = shape.lm_layers * shape.lm_width / shape.lm_params
    return image_flops(shape, image_size) * passes[0] / token, attention


def image_flops(shape: ModelShape, image_size: int) -> float:
    """Forward FLOPs of the tower for one image of ``image_size`` pixels per side."""
    return float(patch_flops(shape, shape.num_patches(image_size)))


def patch_flops(shape: ModelShape, patches: Any) -> Any:
    """Forward FLOPs of the tower for an image of so many patches (any numeric array)."""
    return 2 * shape.tower_params * patches + 4 * shape.tower_layers * patches**2 * shape.tower_width


def token_flops(shape: ModelShape, lengths: np.ndarray) -> np.ndarray:
    """Forward FLOPs of the language model for each document of ``lengths`` tokens (any numeric array)."""
    lengths = lengths.astype("float64")
    return 2 * shape.lm_params * lengths + 2 * shape.lm_layers * shape.lm_width * lengths**2


def epoch_cost(lengths: np.ndarray, *, pixels: np.ndarray, assume: Assumptions | None = None) -> Cost:
    """Cost of one pass over documents of ``lengths`` tokens, and images of ``pixels`` values each."""
    assume = assume or Assumptions()
    shape = MODELS[assume.model]
    patches = pixels.astype("float64") / (CHANNELS * shape.patch_size**2) + 1
    forward = float(patch_flops(shape, patches).sum())
    images = forward * training_multiplier("vision_tower", assume.frozen)
    tokens = float(token_flops(shape, lengths).sum()) * training_multiplier("language_model", assume.frozen)
    rate = assume.num_gpus * GPUS[assume.gpu] * assume.mfu
    return Cost(
        model=assume.model,
        gpu=assume.gpu,
        num_gpus=assume.num_gpus,
        peak_flops_per_gpu=GPUS[assume.gpu],
        mfu=assume.mfu,
        frozen=tuple(assume.frozen),
        patches_per_image=float(patches.mean()) if len(patches) else 0.0,
        tflops_per_image=forward / 1e12 / max(1, len(patches)),
        image_flops=images,
        token_flops=tokens,
        flops=images + tokens,
        hours=(images + tokens) / rate / 3600,
    )


def assumptions(
    *, frozen: tuple[str, ...] = (), num_gpus: int | None = None, default_gpus: int = 1, **given: Any
) -> Assumptions:
    """The command line's cost options; ``--freeze none`` trains everything."""
    chosen = () if frozen == ("none",) else frozen or DEFAULT_FROZEN
    return Assumptions(frozen=tuple(chosen), num_gpus=num_gpus or default_gpus, **given)
