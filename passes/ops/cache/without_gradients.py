"""Let a backward pass through a graph over a cache raise an error that says what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_compile.passes.ops.cache.cache_update import SparseCacheError

NO_GRADIENTS = (
    "graphs over a SparseCache have no gradients, and this backward pass reaches the output of one: train the model without "
    "the cache (use_cache=False), or run the part that is not trained under torch.no_grad()"
)


def refuse_backward(results: Sequence[Any]) -> list[Any]:
    """Return the same results, with an autograd node that raises ``SparseCacheError`` in a backward pass.

    Without this node, torch says that a loss does not require a gradient, or a loss of several graphs silently lacks a part of
    its gradient. The tensors share their memory with ``results``, and can be changed in place.
    """
    found = [at for at, x in enumerate(results) if isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad]
    if not found:
        return list(results)
    anchor = torch.empty(0, requires_grad=True)  # an input that requires a gradient, so that the outputs do
    outputs = _Refusing.apply(anchor, *(results[at] for at in found))  # type: ignore[no-untyped-call]  # torch's
    marked = dict(zip(found, outputs, strict=True))
    return [marked.get(at, x) for at, x in enumerate(results)]


class _Refusing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *results: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in results)  # without detach, torch would forbid changes in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise SparseCacheError(NO_GRADIENTS)
