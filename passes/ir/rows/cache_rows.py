"""Read and write the rows of a cache that are in use: one for each sequence in the batch of the running graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from sparse_compile.passes.ir.fx_emit import emit, emit_int, inline
from sparse_compile.passes.ir.fx_nodes import expr_of, sizes_of, value_of


def size_at(point: Node, like: Node, axis: int) -> int | Node:
    """The size of ``like`` along ``axis``, as an int or as a node that can be used before ``point``."""
    with point.graph.inserting_before(point):
        count = emit_int(point.graph, expr_of(sizes_of(like)[axis]), point)
    assert count is not None
    return count


def rows_in_use(point: Node, buffer: Node, like: Node) -> Node:
    """The first rows of ``buffer``, as many as the batch of ``like`` has."""
    count = size_at(point, like, 0)
    if count == value_of(buffer).shape[0]:
        return buffer
    rows: Node = inline(point, lambda buffer, count: buffer[:count], buffer, count)
    return rows


def put_tokens(point: Node, buffer: Node, slot: Node, new: Node, like: Node) -> None:
    """Write new tokens ``[B, H, Q, D]`` to their slots ``[B, Q]``, in as many rows as ``like`` has.

    This does not write through a view of the rows in use, because a write to a view becomes a copy of the whole buffer.
    """
    device, (_, heads, _, _) = value_of(buffer).device, value_of(buffer).shape
    row, head = (emit(point, torch.arange, n, device=device) for n in (size_at(point, like, 0), heads))

    def put(buffer: Any, row: Any, head: Any, slot: Any, new: Any) -> Any:
        return buffer.index_put_((row.view(-1, 1, 1), head.view(1, -1, 1), slot.unsqueeze(1)), new)

    inline(point, put, buffer, row, head, slot, new)


def write_rows(point: Node, state: Node, new: Node, like: Node) -> None:
    """Write ``new`` to the first rows of ``state``, as many as the batch of ``like`` has."""
    count = size_at(point, like, 0)
    with point.graph.inserting_before(point):
        if value_of(state).dim() == 0 or count == value_of(state).shape[0]:
            point.graph.call_method("copy_", (state, new))
        else:
            point.graph.call_function(operator.setitem, (state, slice(0, count), new))
