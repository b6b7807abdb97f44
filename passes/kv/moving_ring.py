"""Read a ring whose rotary positions are places in the cache: rotate its keys, and return ordinary tensors of the graph."""

from __future__ import annotations

from torch.fx import Node

from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.kv_source import Ring
from sparse_compile.passes.ir.rows.cache_rows import rows_in_use, write_rows
from sparse_compile.passes.ir.rows.ring_rows import new_tokens, ring_rows
from sparse_compile.passes.kv.cache_positions import MovingFrame


def moving_ring(call: Attention, ring: Ring, frame: MovingFrame) -> tuple[Node, Node, Node | None]:
    """Return the keys and values of ``ring`` in the frame of the new tokens, and the scores of its sink (None without one)."""
    point, is_step = call.node, ring.new.is_step
    turned = frame.joined(point, rows_in_use(point, ring.keys, call.q), ring.storage)
    write_rows(point, ring.keys, turned, call.q)
    k, v = new_tokens(point, ring.new)
    k, v = ring_rows(point, ring, frame.settled(point, k, ring.storage), v, call.q)
    scores = None
    if ring.storage.sink:
        scores = frame.sink_scores(point, call.q, k, ring.at.texts, ring.storage, call.scale, is_step=is_step)
    return k, v, scores
