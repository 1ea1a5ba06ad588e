"""The perceiver resampler: any number of patch features in, ``grid_size**2`` image tokens out.

    x_BND   patch features of the vision tower
      1  kv_proj to the language model's width (only if the widths differ), LayerNorm
      2  grid_size**2 learned queries attend to them; queries and keys get fixed 2-D sin-cos positions
      3  LayerNorm, then ``@ proj``
    y_BQE   what replaces the <im_patch> tokens

Attention is one fused call that never forms the weights. The queries are the same for every image, so they
are normalised and projected once, not once per image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from omnimodel.positions import ResizedOnce


class Resampler(nn.Module):
    """``Resampler(8, 4096, 32, kv_dim=1792)``: ``[B, N, 1792] -> [B, 64, 4096]``."""

    pos_embed: torch.Tensor  # buffer [grid_size**2, embed_dim]

    def __init__(self, grid_size: int, embed_dim: int, num_heads: int, kv_dim: int | None = None) -> None:
        super().__init__()
        if embed_dim % num_heads or embed_dim % 4:
            raise ValueError(f"embed_dim={embed_dim} must be divisible by num_heads={num_heads} and by 4")
        self.grid_size = grid_size
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        # A buffer, not a parameter as in the original: saved under the same name, but nothing can train it.
        self.register_buffer("pos_embed", sincos_table(grid_size, embed_dim))
        self._resized_once = ResizedOnce()
        self.query = nn.Parameter(torch.empty(grid_size**2, embed_dim))
        self.proj = nn.Parameter(torch.empty(embed_dim, embed_dim))
        self.kv_proj: nn.Module = nn.Identity()
        if kv_dim is not None and kv_dim != embed_dim:
            self.kv_proj = nn.Linear(kv_dim, embed_dim, bias=False)
        # Holds the weights under the original's names; its own forward is not used.
        self.attn = nn.MultiheadAttention(embed_dim, num_heads)
        self.ln_q = nn.LayerNorm(embed_dim, eps=1e-6)
        self.ln_kv = nn.LayerNorm(embed_dim, eps=1e-6)
        self.ln_post = nn.LayerNorm(embed_dim, eps=1e-6)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random start for the parameters held directly here, and the fixed table."""
        init.trunc_normal_(self.query, std=0.02)
        init.normal_(self.proj, std=self.embed_dim**-0.5)
        init.copy_(self.pos_embed, sincos_table(self.grid_size, self.embed_dim))

    @torch.no_grad()
    def reset_buffers(self) -> None:
        """Recompute the fixed table (it is memory garbage after meta -> to_empty)."""
        self.pos_embed.copy_(sincos_table(self.grid_size, self.embed_dim))

    def forward(
        self,
        x_BND: torch.Tensor,
        grid: tuple[int, int] | None = None,
        *,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``grid`` is (rows, columns) of patches, needed if the image is no square.

        ``attn_mask`` is ``[Q, N]`` as nn.MultiheadAttention has it: True = blocked, or floats that are added.
        """
        grid = grid or square_grid(x_BND.shape[1])
        if grid[0] * grid[1] != x_BND.shape[1] or min(grid) < 1:
            raise ValueError(f"a grid of {grid[0]}x{grid[1]} patches does not fit {x_BND.shape[1]} features")
        kv_BNE = self.ln_kv(self.kv_proj(x_BND))
        q_QE = self.ln_q(self.query) + self.pos_embed.to(kv_BNE.dtype)
        k_BNE = kv_BNE + self._resized_once.get(self.pos_embed, grid, resize_table).to(kv_BNE.dtype)
        y_BQE = self._attend(q_QE, k_BNE, kv_BNE, attn_mask)
        return self.ln_post(y_BQE) @ self.proj

    def _attend(
        self, q_QE: torch.Tensor, k_BNE: torch.Tensor, v_BNE: torch.Tensor, attn_mask: torch.Tensor | None
    ) -> torch.Tensor:
        w_q, w_k, w_v = self.attn.in_proj_weight.chunk(3)
        b_q, b_k, b_v = self.attn.in_proj_bias.chunk(3)
        k_BHNd = self._split_heads(F.linear(k_BNE, w_k, b_k))
        v_BHNd = self._split_heads(F.linear(v_BNE, w_v, b_v))
        q_BHQd = self._split_heads(F.linear(q_QE, w_q, b_q)[None]).expand(k_BHNd.shape[0], -1, -1, -1)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = ~attn_mask  # here True means "may attend"
        elif attn_mask is not None:
            attn_mask = attn_mask.to(q_BHQd.dtype)
        y_BHQd = F.scaled_dot_product_attention(q_BHQd, k_BHNd, v_BHNd, attn_mask=attn_mask)
        return self.attn.out_proj(y_BHQd.transpose(1, 2).flatten(2))

    def _split_heads(self, x_BNE: torch.Tensor) -> torch.Tensor:
        return x_BNE.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def square_grid(num_patches: int) -> tuple[int, int]:
    """16 -> (4, 4). The original guesses a grid for other counts, and is silently wrong; this refuses."""
    side = math.isqrt(num_patches)
    if side * side != num_patches or side == 0:
        raise ValueError(
            f"{num_patches} patches form no square; pass grid=(rows, columns) of the image's patches"
        )
    return side, side


def sincos_table(grid_size: int, embed_dim: int) -> torch.Tensor:
    """Fixed positions of a square grid, float32 ``[grid_size**2, embed_dim]``: first half x, then y."""
    coords = torch.arange(grid_size, dtype=torch.float32)
    y, x = torch.meshgrid(coords, coords, indexing="ij")
    return torch.cat([_sincos(x.flatten(), embed_dim // 2), _sincos(y.flatten(), embed_dim // 2)], dim=1)


def _sincos(positions: torch.Tensor, dim: int) -> torch.Tensor:
    omega = 1.0 / 10000 ** (torch.arange(dim // 2, dtype=torch.float32, device=positions.device) / (dim / 2))
    angles = positions[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def resize_table(table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The square table resized bicubically to ``grid`` (rows, columns), float32 ``[rows * columns, E]``."""
    side = math.isqrt(table.shape[0])
    if grid == (side, side):
        return table
    square = table.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return resized.permute(0, 2, 3, 1).flatten(0, 2)
