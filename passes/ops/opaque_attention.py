"""Run attention as one opaque op that compiles its own kernel, so that any inner compiler can compile the rest of a graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from sparse_compile.passes.ops.flex_attention import FlexAttention
from sparse_compile.passes.storage.graph_text import from_text
from sparse_compile.passes.torch_private import allow_in_graph

KERNELS = 256  # the most that stay compiled: one for each mask, table shape and kind of step in use


@torch.library.custom_op("sparse_compile::attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, prepared: list[Tensor], captures: list[Tensor], scores: list[Tensor], spec: str
) -> Tensor:
    """Run ``FlexAttention(spec)``: ``[B, Q, Hq, Dv]``, contiguous, without gradients.

    Another compiler can take a contiguous result without a copy. Inductor compiles the kernel at the first call with a shape.
    Before a CUDA graph records the op, its warm-up run makes that call.
    """
    out = kernel_of(spec)(q, k, v, list(prepared), tuple(captures), *scores).transpose(1, 2)
    return out.reshape(-1).view(out.shape)  # ``contiguous`` keeps odd strides of axes with one element


@attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, prepared: list[Tensor], captures: list[Tensor], scores: list[Tensor], spec: str
) -> Tensor:
    batch, heads, q_len, _ = q.shape
    return q.new_empty(batch, q_len, heads, v.shape[3])


@lru_cache(maxsize=KERNELS)
def kernel_of(text: str) -> Callable[..., Tensor]:
    """Return the compiled kernel of a spec."""

    def attend(*operands: Any) -> Tensor:
        out: Tensor = _attend(text, *operands)
        return out

    # Dynamo counts recompiles per code object. With a code object for each kernel, none uses up the limit of another.
    own = FunctionType(attend.__code__.replace(), attend.__globals__, "attention", None, attend.__closure__)
    return torch.compile(own, fullgraph=True)


@allow_in_graph
def _attend(text: str, *operands: Any) -> Tensor:
    out: Tensor = module_of(text)(*operands)
    return out


@lru_cache(maxsize=KERNELS)
def module_of(text: str) -> FlexAttention:
    """Return the attention module of a spec."""
    return FlexAttention(from_text(text))
