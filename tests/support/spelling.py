"""Sizes and masks that tests share which spell attention out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

B, H, N, D = 2, 4, 12, 8
Attention = Callable[..., Any]
sdpa = F.scaled_dot_product_attention
SMALLEST = torch.finfo(torch.float32).min


def tril() -> Tensor:
    """The causal mask ``[N, N]``."""
    return torch.ones(N, N, dtype=torch.bool).tril()


def additive(visible: Tensor, fill: float = -torch.inf) -> Tensor:
    """A mask that is added to the scores, with ``fill`` where a pair is hidden."""
    return torch.zeros(visible.shape).masked_fill(~visible, fill)


def merged(x: Tensor) -> Tensor:
    """``x`` ``[B, H, ...]`` with batch and heads in one axis."""
    return x.reshape(-1, *x.shape[2:])
