"""Write new tokens to a ring, and read from it the keys and values that a chunk or a decode step attends to."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from sparse_compile.passes.ir.fx_emit import inline
from sparse_compile.passes.ir.fx_nodes import value_of
from sparse_compile.passes.ir.kv_source import NewTokens, Ring, RingChunk, RingStep
from sparse_compile.passes.ir.rows.cache_rows import put_tokens, rows_in_use, write_rows
from sparse_compile.passes.ir.rows.head_slices import pick_heads


def new_tokens(point: Node, new: NewTokens) -> tuple[Node, Node]:
    """The new keys and values of the KV heads of a storage."""
    return pick_heads(point, new.k, new.heads), pick_heads(point, new.v, new.heads)


def ring_rows(point: Node, ring: Ring, k: Node, v: Node, like: Node) -> tuple[Node, Node]:
    """Write ``k`` and ``v`` to the ring; returns its keys and values with them, in as many rows as ``like`` has."""
    sides = ((ring.keys, k), (ring.values, v))
    if isinstance(ring.at, RingStep):
        keys, values = (_step(point, buffer, new, ring.at, like, may_hold=ring.may_hold) for buffer, new in sides)
    else:
        keys, values = (_chunk(point, buffer, new, ring.at, like) for buffer, new in sides)
    return keys, values


def _step(point: Node, buffer: Node, new: Node, at: RingStep, like: Node, *, may_hold: bool) -> Node:
    """Write one new token to each row, and return the rows. Where ``holds`` is true, the slot keeps its old content."""
    _, heads, _, dim = value_of(buffer).shape
    if may_hold:

        def unless_held(rows: Any, new: Any, slot: Any, holds: Any) -> Any:
            return torch.where(holds[:, None, :, None], _gathered(rows, slot, heads=heads, dim=dim), new)

        new = inline(point, unless_held, rows_in_use(point, buffer, like), new, at.slot, at.holds)
    put_tokens(point, buffer, at.slot, new, like)
    return rows_in_use(point, buffer, like)


def _chunk(point: Node, buffer: Node, new: Node, at: RingChunk, like: Node) -> Node:
    """Return the sorted ring followed by the chunk, and write to the ring what it keeps of both."""
    _, heads, _, dim = value_of(buffer).shape

    def in_order(rows: Any, order: Any, new: Any) -> Any:
        return torch.cat([_gathered(rows, order, heads=heads, dim=dim), new], dim=2)

    both: Node = inline(point, in_order, rows_in_use(point, buffer, like), at.order, new)
    held = inline(point, lambda both, source: _gathered(both, source, heads=heads, dim=dim), both, at.source)
    write_rows(point, buffer, held, like)
    return both


def _gathered(x: Any, slot: Any, *, heads: int, dim: int) -> Any:
    """``x`` ``[B, H, N, D]`` at ``slot`` ``[B, n]``."""
    return x.gather(2, slot[:, None, :, None].expand(-1, heads, -1, dim))
