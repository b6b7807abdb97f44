"""Lookups into tensors of dynamic size, written so that FlexAttention's C++ kernel compiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_compile.passes.torch_private import look_up_unchecked


class Lookups:
    """The tensors that a kernel captures, and how its mods read them.

    The C++ template knows the sizes of q, k and v alone: a size or stride of another tensor fails with ``ks2 was not
    declared`` (torch 2.13). On CPU a tensor of dynamic size is therefore captured flat, with its strides as a tensor.
    """

    def __init__(self, captures: Sequence[Tensor]) -> None:
        self._captures = tuple(captures)
        self.tensors: tuple[Tensor, ...] = ()
        for tensor in captures:
            self.tensors += tuple(flatten(tensor)) if _is_flattened(tensor) else (tensor,)

    def read(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """What stands for the captures inside a mod that is given ``tensors``."""
        remaining = iter(tensors)
        return tuple(
            _Flat(next(remaining), next(remaining), c) if _is_flattened(c) else next(remaining) for c in self._captures
        )


def _is_flattened(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and any(isinstance(size, torch.SymInt) for size in tensor.shape)


class _Flat:
    """Reads like the tensor it was made of, for one index on every axis. No index is negative or too large."""

    def __init__(self, flat: Tensor, strides: Tensor, like: Tensor) -> None:
        self._flat, self._strides = flat, strides
        self.dtype = like.dtype
        # What matters of a size is whether it is 1; a symbol of the graph outside is no size in here.
        self.shape = tuple(size if isinstance(size, int) else 2 for size in like.shape)

    def dim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: tuple[Tensor, ...]) -> Any:
        at: Any = sum(x * self._strides[axis] for axis, x in enumerate(index))
        # A plain index would check and wrap around the size.
        return look_up_unchecked(self._flat, at)


@torch.library.custom_op("sparse_compile::flatten", mutates_args=())
def flatten(x: Tensor) -> tuple[Tensor, Tensor]:
    """The elements of ``x`` in one row, and its strides in that row, int64."""
    row = x.clone(memory_format=torch.contiguous_format)
    return row.view(-1), torch.tensor(row.stride(), dtype=torch.int64, device=x.device)


@flatten.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.numel()), x.new_empty(x.dim(), dtype=torch.int64)


@torch.library.custom_op("sparse_compile::materialize", mutates_args=())
def materialize(x: Tensor) -> Tensor:
    """A copy that Inductor cannot see through."""
    return x.clone(memory_format=torch.contiguous_format)


@materialize.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _pass_on(ctx: Any, gradient: Tensor) -> Tensor:
    return gradient


materialize.register_autograd(_pass_on)
