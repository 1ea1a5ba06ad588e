"""Position tables resized to a grid of patches: once for each grid, as long as the table stays what it is.

A tower that was trained on 16 x 16 patches and sees 32 x 32 would resize its table in every forward pass. If
the table is a constant (a frozen tower's, and the resampler's, which is no parameter), that is the same work
each time. What is kept is no parameter and no buffer: the state dict does not know of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

Grid = tuple[int, int]  # rows, columns
MOST_GRIDS = 32  # pictures of any size make any number of grids


class ResizedOnce:
    """``get(table, grid, resize)`` is ``resize(table, grid)``, from memory if table and grid are the same."""

    def __init__(self) -> None:
        self._table: torch.Tensor | None = None
        self._state: tuple[object, ...] = ()
        self._resized: dict[Grid, torch.Tensor] = {}

    @torch.no_grad()
    def get(
        self, table: torch.Tensor, grid: Grid, resize: Callable[[torch.Tensor, Grid], torch.Tensor]
    ) -> torch.Tensor:
        """The table for ``grid``; without a gradient to ``table``."""
        if torch.compiler.is_compiling() or table.is_inference():
            return resize(table, grid)
        # Writing to a tensor, moving it and casting it show in these; another tensor is another object.
        state = (table._version, table.dtype, table.device, table.shape)
        if table is not self._table or state != self._state or len(self._resized) >= MOST_GRIDS:
            self._table, self._state, self._resized = table, state, {}
        if grid not in self._resized:
            self._resized[grid] = resize(table, grid)
        return self._resized[grid]


@contextlib.contextmanager
def resized_positions(tower: Eva | VisionTransformer, grid: Grid) -> Iterator[None]:
    """Within the block a frozen ``tower`` takes ``grid`` for its own, with nothing left to resize."""
    table, patches = getattr(tower, "pos_embed", None), tower.patch_embed
    is_constant = table is not None and not any(p.requires_grad for p in tower.parameters())
    # Both resize with the same call, and not at all if the grids are equal.
    if not is_constant or not isinstance(tower, Eva | VisionTransformer) or grid == patches.grid_size:
        yield
        return
    own_grid = patches.grid_size
    prefix = 0 if tower.no_embed_class else tower.num_prefix_tokens
    if not hasattr(tower, "resized_once"):
        tower.resized_once = ResizedOnce()
    resized = tower.resized_once.get(
        table,
        grid,
        lambda table, grid: resample_abs_pos_embed(
            table, new_size=list(grid), old_size=list(own_grid), num_prefix_tokens=prefix
        ),
    )
    tower._parameters["pos_embed"], patches.grid_size = resized, grid
    try:
        yield
    finally:
        tower._parameters["pos_embed"], patches.grid_size = table, own_grid
