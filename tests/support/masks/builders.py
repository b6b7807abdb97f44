"""Ways in which models build masks, for the tests that lift masks out of graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

N = 12
Build = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """A way to build a mask, and the same mask in the mask language."""

    build: Build
    mask: str


def attend(build: Build) -> Callable[..., Tensor]:
    """Return an attention function whose graph builds the mask with ``build`` from the other inputs."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *inputs: Any) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=build(*inputs))

    return attention


def i_and_j(q_len: int = N, kv_len: int = N) -> tuple[Tensor, Tensor]:
    return torch.arange(q_len)[:, None], torch.arange(kv_len)[None, :]


def hidden(visible: Tensor) -> Tensor:
    """Return the usual float mask: 0 where visible, -inf where hidden."""
    return torch.zeros(visible.shape).masked_fill(~visible, -torch.inf)


def from_tril() -> Tensor:
    return torch.tril(torch.ones(N, N, dtype=torch.bool))


def valid(batch: int = 2, length: int = N) -> Tensor:
    """Return a tokenizer's padding mask. Row 0 has three padding tokens on the left, and row 1 has two on the right."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[0, :3] = 0
    mask[1, -2:] = 0
    assert mask is None or isinstance(mask, Tensor)
    return mask
