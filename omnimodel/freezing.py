"""Which parts of the model train: freezing by component name.

``freeze(model, ["vision_tower", "language_model"])`` is the original's first stage. What is frozen is written
into the configuration, so that it is saved with the model and holds again after every load.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

COMPONENTS: dict[str, tuple[str, ...]] = {
    "vision_tower": ("model.vision_tower.",),
    "resampler": ("model.resampler.",),
    "language_model": ("model.layers.", "model.norm."),
    "embeddings": ("model.embed_tokens.",),
    "lm_head": ("lm_head.",),
}


def freeze(model: nn.Module, names: Iterable[str]) -> None:
    """Freeze exactly these components and make all others trainable."""
    names = sorted(set(names))
    unknown = [name for name in names if name not in COMPONENTS]
    if unknown:
        raise ValueError(f"no component {', '.join(unknown)} to freeze; there are {', '.join(COMPONENTS)}")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(component(name) not in names)
    model.config.frozen = names


def component(parameter_name: str) -> str:
    """``"model.layers.3.mlp.up_proj.weight"`` -> ``"language_model"``."""
    full = parameter_name if parameter_name.startswith(("model.", "lm_head.")) else f"model.{parameter_name}"
    for name, prefixes in COMPONENTS.items():
        if full.startswith(prefixes):
            return name
    raise ValueError(f"parameter {parameter_name} belongs to no component of omnimodel.freezing.COMPONENTS")


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Component -> (parameters, of them trainable)."""
    counts = {name: (0, 0) for name in COMPONENTS}
    for name, parameter in model.named_parameters():
        total, trainable = counts[component(name)]
        size = parameter.numel()
        counts[component(name)] = (total + size, trainable + size * parameter.requires_grad)
    return counts
