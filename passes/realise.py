"""A copy that no compiler sees through: what a kernel captures, and what it reads by pointer, has to be a buffer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("sparse_compile::realise", mutates_args=())
def realise(x: Tensor) -> Tensor:
    """A copy that Inductor cannot see through."""
    return x.clone(memory_format=torch.contiguous_format)


@realise.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _pass_on(ctx: Any, gradient: Tensor) -> Tensor:
    return gradient


realise.register_autograd(_pass_on)
