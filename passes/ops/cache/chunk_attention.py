"""Causal attention of a chunk of a prompt to itself and to everything that a cache holds, with torch's fused kernels.

``scaled_dot_product_attention`` has a causal form only for equally many queries and keys. A chunk over a cache is therefore two
calls: the chunk to itself, and the chunk to all earlier keys, which it sees without a mask. Their results are merged by their
log-sum-exps. Quantized keys are dequantized a piece at a time, so that they are never all in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from sparse_compile.passes.ops.small_steps import in_few_kernels
from sparse_compile.passes.ops.structured import StructuredOp
from sparse_compile.passes.storage.codec import Format, QuantizedTensor, dequantize
from sparse_compile.passes.torch_private import attention_with_lse

T = TypeVar("T")
PIECE = 16384  # keys that are dequantized at a time


class ChunkAttention(NamedTuple, Generic[T]):
    """Queries ``q`` ``[B, Hq, Q, D]``, and the keys ``k`` and values ``v`` ``[B, H, Q, D]`` of the same tokens.

    ``keys`` and ``values`` are the pages of the cache, which hold the earlier tokens in their first ``columns`` slots.
    """

    q: T
    k: T
    v: T
    keys: QuantizedTensor[T]
    values: QuantizedTensor[T]
    columns: T
    key_form: Format
    value_form: Format
    scale: float


def _attend(chunk: ChunkAttention[Tensor]) -> Tensor:
    q, k, v, scale = chunk.q, chunk.k, chunk.v, chunk.scale
    out, lse = attention_with_lse(q, k, v, causal=True, scale=scale)
    for keys, values in _earlier(chunk, _held(chunk.columns)):
        more, weight = attention_with_lse(q, keys, values, causal=False, scale=scale)
        out = torch.lerp(out.float(), more.float(), torch.sigmoid(weight - lse).unsqueeze(3))
        lse = torch.logaddexp(lse, weight)
    return out.to(q.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def _held(columns: Tensor) -> int:
    """The number of earlier tokens, from the host state, so that nothing waits for the device."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a CUDA graph cannot record a chunk of a prompt, whose work depends on how much the cache holds")
    state: Any = getattr(columns, "sparse_cache_host_state", None)
    return int(columns) if state is None else int(state.columns)


def _earlier(chunk: ChunkAttention[Tensor], held: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the earlier keys and values ``[B, H, n, D]`` in pieces; all at once if they are not quantized."""
    is_plain = not (chunk.key_form.kind or chunk.value_form.kind)
    step = held if is_plain else PIECE
    for start in range(0, held, max(step, 1)):
        stop = min(start + step, held)
        sides = ((chunk.keys, chunk.key_form), (chunk.values, chunk.value_form))
        keys, values = (_piece(stored, form, chunk, start, stop) for stored, form in sides)
        yield keys, values


def _piece(stored: QuantizedTensor[Tensor], form: Format, chunk: ChunkAttention[Tensor], start: int, stop: int) -> Tensor:
    rows = len(chunk.q)
    if not form.kind:
        return stored.data[:rows, :, start:stop]
    end = min(start + PIECE, stored.data.shape[2])  # whole pieces have one shape, for which the kernel is compiled once
    sizes = (1, *[form.tokens] * (form.count - 1))
    parts = [part[:rows, :, start // n : end // n] for part, n in zip(stored.used(), sizes, strict=True)]
    return in_few_kernels(dequantize, QuantizedTensor(*parts), form, chunk.q.dtype)[:, :, : stop - start]


def _shape(chunk: ChunkAttention[Tensor]) -> Tensor:
    batch, heads, q_len, _ = chunk.q.shape
    return chunk.q.new_empty(batch, q_len, heads, chunk.v.shape[3]).transpose(1, 2)


# Returns ``[B, Hq, Q, Dv]`` in the memory order ``[B, Q, Hq, Dv]``, without gradients.
chunk_attention = StructuredOp("chunk_attention", ChunkAttention, _attend, fake=_shape)
