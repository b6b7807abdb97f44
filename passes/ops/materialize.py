"""Read captured tensors of dynamic size in a way that FlexAttention's C++ template can compile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_compile.passes.torch_private import look_up_unchecked


class Lookups:
    """The tensors that a kernel captures, and how its mods read them.

    The C++ template declares only the sizes of q, k and v. A size or stride of another tensor fails with
    ``ks2 was not declared`` (torch 2.13). On CPU, a tensor of dynamic size is therefore captured flat, with its strides as a
    tensor.
    """

    def __init__(self, captures: Sequence[Tensor]) -> None:
        self._captures = tuple(captures)
        self.tensors: tuple[Tensor, ...] = ()
        for tensor in captures:
            self.tensors += tuple(flatten(tensor)) if _is_flattened(tensor) else (tensor,)

    def read(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """Return the captures as a mod reads them. ``tensors`` are the tensors that the kernel passes to the mod."""
        remaining = iter(tensors)
        return tuple(
            _Flat(next(remaining), next(remaining), c) if _is_flattened(c) else next(remaining) for c in self._captures
        )


def _is_flattened(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and any(isinstance(size, torch.SymInt) for size in tensor.shape)


class _Flat:
    """A flattened tensor that is read like the original, with one index on every axis. Indices must be in bounds."""

    def __init__(self, flat: Tensor, strides: Tensor, like: Tensor) -> None:
        self._flat, self._strides = flat, strides
        self.dtype = like.dtype
        # It only matters whether a size is 1. A symbol of the outer graph cannot be used here, so 2 stands for it.
        self.shape = tuple(size if isinstance(size, int) else 2 for size in like.shape)

    def dim(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: tuple[Tensor, ...]) -> Any:
        at: Any = sum(x * self._strides[axis] for axis, x in enumerate(index))
        # Plain indexing would check bounds and wrap negative indices, for which it needs the size.
        return look_up_unchecked(self._flat, at)


@torch.library.custom_op("sparse_compile::flatten", mutates_args=())
def flatten(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the elements of ``x`` in one row, and the strides of its axes in that row, int64."""
    row = x.clone(memory_format=torch.contiguous_format)
    return row.view(-1), torch.tensor(row.stride(), dtype=torch.int64, device=x.device)


@flatten.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.numel()), x.new_empty(x.dim(), dtype=torch.int64)


@torch.library.custom_op("sparse_compile::materialize", mutates_args=())
def materialize(x: Tensor) -> Tensor:
    """Return a copy of ``x`` that Inductor has to materialize, because it cannot look into this op."""
    return x.clone(memory_format=torch.contiguous_format)


@materialize.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _pass_on(ctx: Any, gradient: Tensor) -> Tensor:
    return gradient


materialize.register_autograd(_pass_on)
