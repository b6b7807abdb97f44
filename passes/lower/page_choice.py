"""Emit what chooses the keys of one call: blocks by blocks of queries in a prefill, pages of a cache in a decode step."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from sparse_compile.masks.json_format import to_json
from sparse_compile.passes.choose.block_layout import Layout
from sparse_compile.passes.choose.kernel_choice import FLEX
from sparse_compile.passes.ir.attention_call import AttentionCall, Left, Scored
from sparse_compile.passes.ir.fx_emit import emit_int
from sparse_compile.passes.ir.fx_nodes import expr_of, value_of
from sparse_compile.passes.ir.target import Kernel
from sparse_compile.passes.ops.page_classes import page_classes, pick_pages
from sparse_compile.passes.ops.page_selection import select_pages
from sparse_compile.passes.ops.prefill_block_selection import select_blocks
from sparse_compile.passes.storage.codec import Format
from sparse_compile.passes.torch_private import overload


@dataclass(frozen=True)
class Choices:
    """The choices of ``call`` under ``layout``. New nodes go where ``graph`` currently inserts, before ``point``.

    ``shared`` holds what calls of equal mask share, and ``is_fresh`` says whether it still holds there.
    """

    graph: Graph
    call: AttentionCall
    layout: Layout
    kernel: Kernel
    point: Node
    shared: dict[object, Node]
    is_fresh: Callable[[Node], bool]

    def blocks(self, q: Node, k: Node, read: list[Node], width: int | Node) -> Node | Left:
        """A prefill: the output of ``select_blocks``. ``read`` are the tensors of the mask."""
        at, tables = self.call.positions, self.layout
        assert at is not None
        where = [emit_int(self.graph, expr, self.point) for expr in (at.q_start, at.kv_start)]
        if None in where:
            return Left(self.call.node, f"its positions ({at}) cannot be had where its blocks are chosen")
        what = (to_json(tables.mask), tables.heads, *where, at.q_shift, read, width, tables.split)
        return self.graph.call_function(overload(select_blocks), (q, k, *what))

    def pages(self, scored: Scored, q: Node, read: list[Node]) -> list[Node]:
        """A decode step: positions of the first query and key, counts and pages, and empty lists of full ones if asked for."""
        selecting, choice, tables = scored.selecting, scored.choice, self.layout
        shared = self._classes(scored, read)
        first_query, first_key, classes, changed = (self.item(shared, n) for n in range(4))
        by = ("chosen by", choice.scores, shared, selecting.budget)
        if scored.new:
            self.shared[by] = self._append(scored, q, classes, changed)
        alike = choice.table is not None and value_of(choice.table).shape[3] == tables.width
        if by in self.shared and alike and self._all_rows(scored):
            chosen = self._in_use([x for x in (choice.counts, choice.table) if x is not None])
        else:
            limits = (self._batch(), selecting.budget, tables.width, selecting.page_size)
            state = (choice.scores, classes, self._columns(), list(selecting.rows))
            picked = self.graph.call_function(overload(pick_pages), (*state, *limits))
            chosen = [self.item(picked, n) for n in range(2)]
        if tables.group == 1 and self.kernel.name in FLEX and self.call.heads != self.call.kv_heads:
            group = self.call.heads // self.call.kv_heads
            chosen = [self.graph.call_function(torch.repeat_interleave, (x, group, 1)) for x in chosen]
        if tables.split:  # the C++ template compiles with full blocks only; there are none
            chosen += [self.graph.call_function(torch.zeros_like, (x,)) for x in chosen]
        return [first_query, first_key, *chosen]

    def item(self, node: Node, number: int) -> Node:
        """An output of a node that has several."""
        return self.graph.call_function(operator.getitem, (node, number))

    def _classes(self, scored: Scored, read: list[Node]) -> Node:
        tables, selecting, columns = self.layout, scored.selecting, self._columns()
        sizes = (selecting.page_size, self.call.size("k", 2) // selecting.page_size, selecting.selector.every > 1)
        text = to_json(tables.mask)
        key = ("classes", text, tables.heads, columns, sizes, str(self.call.sources))
        if key not in self.shared or not self.is_fresh(self.shared[key]):
            self.shared[key] = self.graph.call_function(overload(page_classes), (text, tables.heads, columns, read, *sizes))
        return self.shared[key]

    def _append(self, scored: Scored, q: Node, classes: Node, changed: Node) -> Node:
        """Append the new token, and choose, in a layer that leads."""
        selecting, choice, selector = scored.selecting, scored.choice, scored.selecting.selector
        k, v, keys, values, columns, anchor, texts = scored.new
        codes, forms = self._codes()
        state = (keys, values, choice.digest, choice.scores, choice.counts, choice.table, *codes)
        how = (selecting.page_size, selector.page, selector.score, selector.group, selector.every, selecting.budget)
        told = (q, k, v, classes, columns, anchor, changed, texts, *how, *forms)
        return self.graph.call_function(overload(select_pages), (*state, *told))

    def _codes(self) -> tuple[tuple[Node | None, ...], tuple[str, str]]:
        """What the choice encodes in place of ``append_codes``: where our kernel attends, nothing reads codes before that.

        Not with ``debug``, which looks at the numbers first.
        """
        kept = self.call.kept
        if kept is None or kept.appended is None or kept.appended.args[-1] or self.kernel.name != "pages":
            return (None,) * 6, (Format().to_text(), Format().to_text())
        self.graph.erase_node(kept.appended)
        return (*kept.keys, *kept.values), (kept.forms[0].to_text(), kept.forms[1].to_text())

    def _columns(self) -> Node:
        assert self.call.positions is not None and self.call.positions.q_shift is not None
        return self.call.positions.q_shift

    def _batch(self) -> int | Node | None:
        return emit_int(self.graph, expr_of(self.call.size("q", 0)), self.point)

    def _all_rows(self, scored: Scored) -> bool:
        """Whether these heads are all that are scored together."""
        return scored.selecting.rows == tuple(range(value_of(scored.choice.scores).shape[1]))

    def _in_use(self, state: list[Node]) -> list[Node]:
        """The rows in use of tensors of a cache."""
        batch = self._batch()
        if batch == value_of(state[0]).shape[0]:
            return state
        return [self.graph.call_function(operator.getitem, (x, slice(0, batch))) for x in state]
