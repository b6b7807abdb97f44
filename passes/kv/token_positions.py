"""The positions of the new tokens of one SparseCache in one graph, computed once for all layers and written at its end.

All layers share the positions of a cache. They are written at the end of the graph that holds the last layer, after every read.
A write in the middle of a graph is not safe: Inductor may move a read below it, and positions would silently be wrong.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_emit import emit, inline
from sparse_compile.passes.ir.fx_nodes import Order
from sparse_compile.passes.ir.kv_source import NewTokens, RingChunk, RingStep
from sparse_compile.passes.ir.rows.cache_rows import size_at, write_rows
from sparse_compile.passes.kv.cache_positions import MovingFrame, period_of
from sparse_compile.passes.ops.block_tables import tensor_names
from sparse_compile.passes.ops.cache.cache_update import CacheUpdate, cache_tokens, page_positions
from sparse_compile.passes.ops.cache.ring import ring_chunk, ring_step
from sparse_compile.passes.ops.cache.rope_positions import stream_advance, stream_positions
from sparse_compile.passes.storage.graph_text import to_text
from sparse_compile.passes.storage.layer_plan import LayerPlan
from sparse_compile.passes.torch_private import overload


class TokenPositions:
    """Computes the positions of the new tokens of one cache, each before the first call that needs it."""

    def __init__(self, first: Attention, update: CacheUpdate[Node], calls: Sequence[Attention]) -> None:
        """``calls`` are all calls over this cache, ``first`` is the first of them, and ``update`` is its cache update."""
        self.state, self.is_step = update, first.is_step
        self._first, self._rings = first, dict[tuple[int, int], tuple[Node, ...]]()
        self._page_texts: Node | None = None
        self._frame: tuple[Node, Node, Node] | None = None
        point = first.node
        padded = _padded(first, calls)
        self.has_padding = padded is not None
        mask, captures = "", []
        if padded is not None:
            mask = to_text(padded.mask)
            sources = [padded.sources[name.name] for name in tensor_names(padded.mask)]
            captures = [inline(point, source.read, source.node) for source in sources]
        sizes = size_at(point, update.k, 0), size_at(point, update.k, 2)
        tokens = _op(point, cache_tokens, *sizes, update.columns, update.texts, mask, captures)
        self.columns, self.text, self._new_texts = _outputs(point, tokens, 3)

    def of(self, point: Node, update: CacheUpdate[Node], heads: tuple[int, ...] | None) -> NewTokens:
        """The new tokens of the KV heads ``heads`` of a layer (None: all of them)."""
        texts = self.page_texts(point) if self.has_padding and update.page_texts is not None else None
        new = (update.k, update.v, heads, update.columns, self.columns, self.is_step, texts, update.anchor)
        return NewTokens(*new, verifies=update.plan.verifies)

    def page_texts(self, point: Node) -> Node:
        """The text position of every column of the cache, new columns included."""
        if self._page_texts is None:
            assert self.state.page_texts is not None
            self._page_texts = _op(point, page_positions, self.state.page_texts, self.columns, self.text)
        return self._page_texts

    def ring(self, point: Node, plan: LayerPlan, kind: tuple[int, int]) -> RingStep | RingChunk:
        """The positions of all rings of one ``kind`` (sink and slots), new tokens included."""
        outputs = self._ring_outputs(point, plan, kind)
        if self.is_step:
            texts, columns, slot, holds = outputs
            return RingStep(texts, columns, slot, holds)
        order, texts, columns, source, *_ = outputs
        return RingChunk(texts, columns, order, source)

    def _ring_outputs(self, point: Node, plan: LayerPlan, kind: tuple[int, int]) -> tuple[Node, ...]:
        if kind not in self._rings:
            number = plan.rings.index(kind)
            state = (*self.state.rings[2 * number : 2 * number + 2], kind[0], self.columns, self.text)
            made = _op(point, ring_step, *state) if self.is_step else _op(point, ring_chunk, *state, self._new_texts)
            self._rings[kind] = _outputs(point, made, 4 if self.is_step else 6)
        return self._rings[kind]

    def frame(self, call: Attention, update: CacheUpdate[Node]) -> MovingFrame:
        """The moving frame of the new tokens, for queries whose rotary positions are places in the cache.

        If the queries do not depend on the rotary position of the cache, the caller passed positions of its own, which are
        text positions.
        """
        rope, offsets, frequencies = update.stream
        if self._frame is None:
            are_text_positions = rope not in _ancestors(call.q)
            made = _op(call.node, stream_positions, rope, offsets, self.text, are_text_positions)
            ropes, new_offsets, turns = _outputs(call.node, made, 3)
            self._frame = ropes, new_offsets, turns
        ropes, _, turns = self._frame
        return MovingFrame(ropes, turns, self.text, frequencies, update.plan.rotation == "neighbors")

    def finish(self, plan: LayerPlan) -> None:
        """Write all new positions at the end of the graph. ``plan`` is that of the last layer."""
        state, like, graph = self.state, self._first.q, self._first.node.graph
        if state.page_texts is not None:
            self.page_texts(self._first.node)
        for kind in plan.rings:
            self._ring_outputs(self._first.node, plan, kind)
        point = next(iter(reversed(graph.nodes)))
        with graph.inserting_before(point):
            graph.call_method("add_", (state.columns, size_at(point, like, 2)))
            if state.anchor is not None and not self.is_step:  # the next step scores pages
                graph.call_method("copy_", (state.anchor, state.columns))
        write_rows(point, state.texts, self._new_texts, like)
        if self._frame is not None:
            rope, offsets, _ = state.stream
            write_rows(point, rope, _op(point, stream_advance, rope, self.text, period_of(plan)), like)
            write_rows(point, offsets, self._frame[1], like)
        if state.page_texts is not None:
            write_rows(point, state.page_texts, self.page_texts(point), like)
        for kind, outputs in self._rings.items():
            number = plan.rings.index(kind)
            new = outputs[:2] if self.is_step else outputs[4:]  # text position and column of each slot
            for table, positions in zip(state.rings[2 * number : 2 * number + 2], new, strict=True):
                write_rows(point, table, positions, like)


def _padded(first: Attention, calls: Sequence[Attention]) -> Attention | None:
    """The first call whose mask reads tensors that are all computed before ``first``; None without one.

    The mask shows which tokens are padding, and padding is the same in all layers.
    """
    order = Order(first.node.graph)
    for call in calls:
        if call.mask.captures():
            sources = [source.node for source in call.sources.values()]
            if all(order.before(node, first.node) for node in sources):
                return call
    return None


def _op(point: Node, op: Any, *args: Any) -> Node:
    return emit(point, overload(op), *args)


def _outputs(point: Node, made: Node, count: int) -> tuple[Node, ...]:
    return tuple(emit(point, operator.getitem, made, n) for n in range(count))


def _ancestors(node: Node) -> set[Node]:
    seen, queue = {node}, [node]
    while queue:
        above = [n for n in queue.pop().all_input_nodes if n not in seen]
        seen.update(above)
        queue += above
    return seen
