"""One SparseCache in one graph: where its new tokens go, computed once for all layers, and written where the graph ends.

All layers share the positions of a cache. They change at the end of the graph that holds its last layer, after everything
that reads them: Inductor may sink a read below a write in the middle of a graph, and positions would silently be off.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from sparse_compile.masks.json_format import to_json
from sparse_compile.passes.ir.attention_call import AttentionCall
from sparse_compile.passes.ir.fx_emit import emit, emit_int, inline
from sparse_compile.passes.ir.fx_nodes import Order, expr_of, is_one, value_of
from sparse_compile.passes.kv.cache_positions import Stream
from sparse_compile.passes.kv.update_node import Update
from sparse_compile.passes.ops.block_tables import given
from sparse_compile.passes.ops.cache_update import cache_tokens, page_positions
from sparse_compile.passes.ops.ring import ring_chunk, ring_step
from sparse_compile.passes.ops.rope_positions import stream_advance, stream_positions
from sparse_compile.passes.storage.layer_plan import LayerPlan
from sparse_compile.passes.torch_private import overload


class CacheInGraph:
    """The positions of the new tokens of one cache. New nodes go before ``point``, the call that is being worked on."""

    def __init__(self, first: AttentionCall, calls: list[AttentionCall]) -> None:
        assert first.cache is not None
        self.first, self.graph, self.point = first, first.node.graph, first.node
        update = Update.of(first.cache)
        self.columns, self.texts, self.pages, self.rings = update.columns, update.texts, update.page_texts, update.rings
        self.anchor = update.anchor
        self.one = is_one(first.size("q", 2))
        self.steps: dict[int, tuple[Node, ...]] = {}
        self.page_texts: Node | None = None
        self.moved: tuple[Node, ...] | None = None
        padded = self._padded(calls)
        self.padded = padded is not None
        mask, captures = "", []
        if padded is not None and padded.mask is not None:
            mask = to_json(padded.mask)
            sources = [padded.sources[name.name] for name in given(padded.mask)]
            captures = [inline(self.point, source.read, source.node) for source in sources]
        tokens = self._op(cache_tokens, update.k, self.columns, self.texts, mask, captures)
        self.column, self.text, self.new_texts = self._outputs(tokens, 3)

    def _padded(self, calls: list[AttentionCall]) -> AttentionCall | None:
        """A call whose mask says what is padding: that of any layer, as tokens are padding for all of them."""
        order = Order(self.graph)
        for call in calls:
            mine = call.cache is not None and Update.of(call.cache).columns is self.columns
            if mine and call.mask is not None and call.mask.captures():
                read = [source.node for source in call.sources.values()]
                if all(order.before(node, self.point) for node in read):
                    return call
        return None

    def _op(self, op: Any, *args: Any) -> Node:
        return emit(self.point, overload(op), *args)

    def _outputs(self, made: Node, count: int) -> tuple[Node, ...]:
        return tuple(emit(self.point, operator.getitem, made, n) for n in range(count))

    def step(self, plan: LayerPlan, kind: tuple[int, int]) -> tuple[Node, ...]:
        """The positions of a kind of ring with the new tokens: the outputs of ``ring_step`` or ``ring_chunk``."""
        ring = plan.rings.index(kind)
        if ring not in self.steps:
            state = self.rings[2 * ring], self.rings[2 * ring + 1], kind[0], self.column, self.text
            made = self._op(ring_step, *state) if self.one else self._op(ring_chunk, *state, self.new_texts)
            self.steps[ring] = self._outputs(made, 4 if self.one else 6)
        return self.steps[ring]

    def new_page_texts(self) -> Node:
        """The text position of every column, with the new ones."""
        if self.page_texts is None:
            self.page_texts = self._op(page_positions, self.pages, self.column, self.text)
        return self.page_texts

    def stream(self, call: AttentionCall, plan: LayerPlan) -> Stream:
        """The frame of the new tokens, if queries stand at their place in the cache.

        Rotary positions are given by the caller where the queries do not depend on those of the cache.
        """
        assert call.cache is not None
        rope, offsets, frequencies = Update.of(call.cache).stream
        if self.moved is None:
            is_given = rope not in _ancestors(call.q)
            self.moved = self._outputs(self._op(stream_positions, rope, offsets, self.text, is_given), 3)
        ropes, _, turns = self.moved
        return Stream(ropes, turns, self.text, frequencies, plan.rotation == "neighbours")

    # -- rows and writes --------------------------------------------------------------------------------------------

    def row_count(self) -> int | Node:
        """How many rows of the cache are in use."""
        return self._size(0)

    def token_count(self) -> int | Node:
        """How many new tokens there are in each row."""
        return self._size(2)

    def _size(self, axis: int) -> int | Node:
        with self.graph.inserting_before(self.point):
            count = emit_int(self.graph, expr_of(self.first.size("q", axis)), self.point)
        assert count is not None
        return count

    def rows(self, buffer: Node) -> Node:
        """The rows in use of a buffer."""
        count = self.row_count()
        if count == value_of(buffer).shape[0]:
            return buffer
        rows: Node = inline(self.point, lambda buffer, count: buffer[:count], buffer, count)
        return rows

    def put(self, buffer: Node, slot: Node, new: Node) -> None:
        """New tokens ``[B, H, Q, D]`` at their slots ``[B, Q]`` of the rows in use.

        Not by way of a view of those rows: a write to a view becomes a copy of the whole buffer.
        """
        device, (_, heads, _, _) = value_of(buffer).device, value_of(buffer).shape
        row, head = (emit(self.point, torch.arange, n, device=device) for n in (self.row_count(), heads))

        def put(buffer: Any, row: Any, head: Any, slot: Any, new: Any) -> Any:
            return buffer.index_put_((row.view(-1, 1, 1), head.view(1, -1, 1), slot.unsqueeze(1)), new)

        inline(self.point, put, buffer, row, head, slot, new)

    def commit(self, state: Any, new: Node) -> None:
        """Write ``new`` to the rows in use of ``state``."""
        count = self.row_count()
        with self.graph.inserting_before(self.point):
            if value_of(state).dim() == 0 or count == value_of(state).shape[0]:
                self.graph.call_method("copy_", (state, new))
            else:
                self.graph.call_function(operator.setitem, (state, slice(0, count), new))

    def finish(self, plan: LayerPlan) -> None:
        """Write all new positions where the graph ends."""
        if self.pages is not None:
            self.new_page_texts()
        for kind in plan.rings:
            self.step(plan, kind)
        self.point = next(iter(reversed(self.graph.nodes)))
        with self.graph.inserting_before(self.point):
            self.graph.call_method("add_", (self.columns, self.token_count()))
            if self.anchor is not None and not self.one:  # the next step scores pages
                self.graph.call_method("copy_", (self.anchor, self.columns))
        self.commit(self.texts, self.new_texts)
        if self.moved is not None:
            assert self.first.cache is not None
            rope, offsets, _ = Update.of(self.first.cache).stream
            self.commit(rope, self._op(stream_advance, rope, self.text, _period(plan)))
            self.commit(offsets, self.moved[1])
        if self.pages is not None:
            self.commit(self.pages, self.new_page_texts())
        for ring, step in self.steps.items():  # text position and column of each slot
            for state, new in zip(self.rings[2 * ring : 2 * ring + 2], step[:2] if self.one else step[4:], strict=True):
                self.commit(state, new)


def _ancestors(node: Node) -> set[Node]:
    found, queue = {node}, [node]
    while queue:
        above = [n for n in queue.pop().all_input_nodes if n not in found]
        found.update(above)
        queue += above
    return found


def _period(plan: LayerPlan) -> int:
    """How far positions run before they are set back: no less than any ring is long, so that a key is turned once."""
    return max(256, *(slots for _, slots in plan.rings))
