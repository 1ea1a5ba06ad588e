"""Patches: a convolution over patches that come one by one is a matrix product, and is computed as one.

    pixel_values [N, C, 2, 16, 16], kernel (2, 16, 16)   ->   [N, C * 512] @ [C * 512, D]

Some processors cut pictures into patches, which the tower's first convolution then sees one at a time. cuDNN
and oneDNN take such a convolution for what it says; the product is the same sum, on the kernels for products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def as_products(tower: nn.Module) -> list[str]:
    """Convolutions whose kernel is their stride are products where their input is one patch; their names."""
    changed = []
    for name, module in tower.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d) and _is_tiling(module):
            module.__class__ = _product(type(module))  # type: ignore[assignment]
            changed.append(name)
    return changed


def _is_tiling(module: nn.Conv2d | nn.Conv3d) -> bool:
    is_plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    return is_plain and module.stride == module.kernel_size and set(module.padding) == {0}


def _product(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, patches: torch.Tensor) -> torch.Tensor:
        if patches.shape[2:] != self.kernel_size:
            return kind.forward(self, patches)
        product = F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return product.view(*product.shape, *(1 for _ in self.kernel_size))

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
