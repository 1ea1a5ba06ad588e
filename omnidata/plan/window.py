"""Window: samples that were shuffled and packed together; and a pack of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from omnidata.plan.catalog import IMAGE_PIXELS, Lengths

# What a picture (a processor's: 448² pixels) and a squared length weigh in tokens: OmniLMM-12B with a frozen
# tower. Trained, a picture weighs 663. Other models: ``plan.cost.token_weights``, ``pipelines.flops``.
IMAGE_COST = 221.0
ATTENTION_COST = 1.9e-5


@dataclass(frozen=True, slots=True, eq=False)
class Pack:
    """Samples that share one sequence; int64 ``[D]`` arrays, in the order in which they are laid out."""

    window: Window  # where it comes from
    dataset: np.ndarray  # position in the blend
    passes: np.ndarray  # how many times that dataset had been exhausted before
    lengths: Lengths

    @property
    def num_tokens(self) -> int:
        """Tokens, without padding."""
        return int(self.lengths.tokens.sum())

    @property
    def num_supervised(self) -> int:
        """Supervised tokens."""
        return int(self.lengths.supervised.sum())

    @property
    def num_images(self) -> int:
        """Images."""
        return int(self.lengths.images.sum())

    @property
    def image_load(self) -> float:
        """What the tower is given, in pictures of 448² pixels; OmniLMM: their number."""
        return float(self.lengths.pixels.sum()) / IMAGE_PIXELS

    def cost(self, image_cost: float = IMAGE_COST, attention_cost: float = ATTENTION_COST) -> float:
        """Modelled work in tokens: documents' tokens and their attention, and images' pixels."""
        attention = float(np.square(self.lengths.tokens).sum())
        return self.num_tokens + attention_cost * attention + image_cost * self.image_load


@dataclass(frozen=True, eq=False)
class Window:
    """The packs of one window, shuffled; samples of pack p are ``[starts[p], starts[p + 1])``."""

    number: int
    dataset: np.ndarray  # int64 [N], as in Pack
    passes: np.ndarray
    lengths: Lengths
    starts: np.ndarray  # int64 [P+1]
    num_cut: int  # samples shortened to fit a pack
    num_left_out: int  # samples that fit no pack

    def __len__(self) -> int:
        return len(self.starts) - 1

    def pack(self, position: int) -> Pack:
        """Pack ``position`` of this window."""
        span = slice(self.starts[position], self.starts[position + 1])
        return Pack(self, self.dataset[span], self.passes[span], self.lengths.take(span))

    def sums(self, values: np.ndarray) -> np.ndarray:
        """``[P]``: the sum of each pack's samples' ``values``, ``[N]``."""
        return np.add.reduceat(values, self.starts[:-1]) if len(self) else values[:0]

    @cached_property
    def costs(self) -> np.ndarray:
        """float64 ``[P]``: ``Pack.cost`` of each, of the default model: steps are made by it."""
        tokens, pixels = self.lengths.tokens, self.lengths.pixels
        squares = self.sums(np.square(tokens))
        return self.sums(tokens) + ATTENTION_COST * squares + IMAGE_COST * (self.sums(pixels) / IMAGE_PIXELS)
