"""Attention as one opaque op that compiles and runs its own kernel, so that any inner compiler can take the rest of a graph."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from sparse_compile.passes.ops.flex_attention import FlexAttention, Spec
from sparse_compile.passes.torch_private import allow_in_graph


@torch.library.custom_op("sparse_compile::attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, prepared: list[Tensor], captures: list[Tensor], scores: list[Tensor], spec: str
) -> Tensor:
    """``FlexAttention(spec)``: ``[B, Hq, Q, Dv]`` in the memory order ``[B, Q, Hq, Dv]``, without gradients.

    The kernel is compiled by Inductor at the first call with a shape; a CUDA graph that records the op has warmed it up before.
    """
    out = kernel_of(spec)(q, k, v, list(prepared), tuple(captures), *scores)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, prepared: list[Tensor], captures: list[Tensor], scores: list[Tensor], spec: str
) -> Tensor:
    batch, heads, q_len, _ = q.shape
    return q.new_empty(batch, q_len, heads, v.shape[3]).transpose(1, 2)


def to_text(spec: Spec) -> str:
    """A spec as an op can carry it."""
    return base64.b64encode(pickle.dumps(spec)).decode()


@cache
def kernel_of(text: str) -> Callable[..., Tensor]:
    """The compiled kernel of a spec."""

    def attend(*operands: Any) -> Tensor:
        out: Tensor = _attend(text, *operands)
        return out

    # Dynamo counts recompiles per code object: a code object for each kernel keeps one from using up those of another.
    own = FunctionType(attend.__code__.replace(), attend.__globals__, "attention", None, attend.__closure__)
    return torch.compile(own, fullgraph=True)


@allow_in_graph
def _attend(text: str, *operands: Any) -> Tensor:
    out: Tensor = module_of(text)(*operands)
    return out


@cache
def module_of(text: str) -> FlexAttention:
    """The attention that ``to_text`` wrote down."""
    return FlexAttention(pickle.loads(base64.b64decode(text)))
