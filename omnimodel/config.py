"""The model's configuration: Mistral's, plus what the vision side needs.

The field names are those of the published OmniLMM-12B ``config.json`` (``mm_vision_tower``, ``num_query``,
``image_size``), so that file loads as it is; unknown keys of it are kept and ignored. The ids of the image
tokens are not in that file and default to the published vocabulary's.

>>> OmniLMMConfig(vocab_size=32009, num_query=64).query_grid
8
"""

from __future__ import annotations

import math
from typing import Any

from transformers import MistralConfig

EVA02_E = "eva02_enormous_patch14_clip_224.laion2b_plus"


class OmniLMMConfig(MistralConfig):
    """Everything that fixes the shape of an OmniLMM and where its images go."""

    model_type = "omnilmm"

    mm_vision_tower: str = EVA02_E  # a timm ViT; its ``.tag`` names weights, otherwise inert
    vision_kwargs: dict[str, Any] | None = None  # passed on to timm.create_model
    num_query: int = 64  # features, and so <im_patch> tokens, an image; a square number
    resampler_heads: int | None = None  # attention heads; None: one per 128 channels, as the original's
    image_size: int = 448  # pixels per side of the square that images become
    image_mean: list[float] | None = None  # with which the tower was trained, of values in 0…1; None: CLIP's
    image_std: list[float] | None = None
    im_patch_token: int = 32000
    im_start_token: int = 32001
    im_end_token: int = 32002
    slicing: dict[str, Any] | None = None  # how the training data cut large pictures (omnidata.images.slices)
    image_fit: str = "squash"  # squash | center_crop: how a picture becomes that square
    end_of_turn: list[int] | None = None  # ids that end an assistant's turn in the training data
    frozen: list[str] | None = None  # omnimodel.parts, frozen again after every load

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_kwargs = dict(self.vision_kwargs or {})
        self.frozen = list(self.frozen or [])
        self.end_of_turn = list(self.end_of_turn or [])
        super().__post_init__(**kwargs)
        if self.resampler_heads is None:
            self.resampler_heads = max(1, self.hidden_size // 128)
        if math.isqrt(self.num_query) ** 2 != self.num_query or self.num_query < 1:
            raise ValueError(
                f"num_query={self.num_query} is not a square number, and the Resampler's queries form a "
                "square grid; use 1, 4, 9, 16, … 64"
            )

    @property
    def query_grid(self) -> int:
        """Queries a side of the Resampler's grid."""
        return math.isqrt(self.num_query)

    @property
    def end_token_ids(self) -> list[int]:
        """Ids at which generation stops: those that end a turn, and the tokenizer's end of sequence."""
        eos = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        return list(
            dict.fromkeys([*(self.end_of_turn or []), *(token for token in eos if token is not None)])
        )

    @property
    def image_token_ids(self) -> list[int]:
        """Ids that belong to pictures; generation never emits them."""
        around_tiles = (self.slicing or {}).get("slice_token_ids", [])
        return [self.im_patch_token, self.im_start_token, self.im_end_token, *around_tiles]
