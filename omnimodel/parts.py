"""Which part of a model a parameter belongs to: for freezing, learning rates, adapters and costs.

    vision_tower      the blocks that look at pixels, and what is before them
    connector         between tower and language model; OmniLMM's is called resampler, here too
    language_model    decoder blocks and their last norm
    embeddings        of tokens; with tied weights also the head
    lm_head

Parts are found by what a module is (``get_encoder("image")``, ``get_decoder()``, …), not by a model's family.
A merger or projector inside a tower counts as connector.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from omnimodel.blocks import blocks_of

PARTS = ("vision_tower", "connector", "language_model", "embeddings", "lm_head")
# Modules of a tower that turn its features into the language model's.
_CONNECTS = re.compile(r"merger|project|connector|resampler|aligner|abstractor")


class Parts:
    """The parts of one model.

    Args:
        model: any transformers vision-language model, or OmniLMM; before or after it is distributed.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.tower, self.decoder = image_tower(model), model.get_decoder()
        self.blocks = [*blocks_of(self.tower), *blocks_of(self.decoder, without=self.tower)]
        self.connector_name = getattr(model, "connector_name", "connector")
        self._modules = self._by_module()

    @property
    def names(self) -> tuple[str, ...]:
        """Of all parts, in the order of the forward pass."""
        return tuple(self.connector_name if part == "connector" else part for part in PARTS)

    def _by_module(self) -> dict[nn.Module, str]:
        """The part of every module that owns parameters; later ones are more special."""
        found: dict[nn.Module, str] = dict.fromkeys(self.model.modules(), self.connector_name)
        for part, module in (("language_model", self.decoder), ("vision_tower", self.tower)):
            found |= dict.fromkeys(module.modules(), part)
        for module in self._connectors():
            found |= dict.fromkeys(module.modules(), self.connector_name)
        ends = {
            "embeddings": self.model.get_input_embeddings(),
            "lm_head": self.model.get_output_embeddings(),
        }
        for part, module in ends.items():
            if module is not None:
                found |= dict.fromkeys(module.modules(), part)
        return found

    def _connectors(self) -> list[nn.Module]:
        """Those inside the tower, but not in a block, and beside the decoder's layers (OmniLMM's)."""
        in_blocks = {module for block in self.blocks for module in block.modules()}
        candidates = [*self.tower.named_modules(), *self.decoder.named_children()]
        return [
            module
            for name, module in candidates
            if _CONNECTS.search(name.rpartition(".")[2]) and in_blocks.isdisjoint(module.modules())
        ]

    def of(self, name: str) -> str:
        """The part of the parameter ``name``, as ``model.named_parameters()`` names it."""
        return self._modules[self.model.get_submodule(name.rpartition(".")[0])]

    def of_module(self, module: nn.Module) -> str:
        """The part of a module that belongs to one; those around several count as connector."""
        return self._modules[module]

    def parameters(self, part: str) -> list[nn.Parameter]:
        """All of one part."""
        return [parameter for name, parameter in self.model.named_parameters() if self.of(name) == part]

    def is_frozen(self, part: str) -> bool:
        """Whether nothing of the part learns."""
        return not any(parameter.requires_grad for parameter in self.parameters(part))

    def count(self) -> dict[str, tuple[int, int]]:
        """Part -> (parameters, of them trainable)."""
        counts = {part: (0, 0) for part in self.names}
        for name, parameter in self.model.named_parameters():
            total, trainable = counts[self.of(name)]
            size = parameter.numel()
            counts[self.of(name)] = (total + size, trainable + size * parameter.requires_grad)
        return counts


def image_tower(model: Any) -> nn.Module:
    """The module that looks at pixels.

    Raises:
        ValueError: the model has none.
    """
    tower = model.get_encoder(modality="image")
    if tower is model or tower is model.base_model:
        raise ValueError(f"{type(model).__name__} has no vision tower that transformers can name")
    return tower


def freeze(model: nn.Module, names: Iterable[str]) -> None:
    """Freeze exactly these parts and make all others trainable.

    Raises:
        ValueError: no such part, or a head that shares its weight with embeddings that are not frozen.
    """
    parts, names = Parts(model), sorted(set(names))
    unknown = [name for name in names if name not in parts.names]
    if unknown:
        raise ValueError(f"no component {', '.join(unknown)} to freeze; there are {', '.join(parts.names)}")
    if "lm_head" in names and "embeddings" not in names and not parts.parameters("lm_head"):
        raise ValueError("lm_head shares its weight with embeddings: freeze both or none")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(parts.of(name) not in names)
    if hasattr(model.config, "frozen"):  # OmniLMM's keeps it over loads
        model.config.frozen = names
