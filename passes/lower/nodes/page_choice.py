"""Write the page selection of a head group: blocks of keys in a prefill, and pages of a cache in a decode step."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from sparse_compile.passes.choose.block_layout import Layout
from sparse_compile.passes.ir.fx_nodes import expr_of, value_of
from sparse_compile.passes.ir.kv_source import Quantized, Selected
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.rows.cache_rows import rows_in_use
from sparse_compile.passes.ir.rows.ring_rows import new_tokens
from sparse_compile.passes.kernels.operands import PageScoring, SelectPages
from sparse_compile.passes.lower.nodes.cache_writes import append_quantized, write_once
from sparse_compile.passes.lower.nodes.emitter import Emitter
from sparse_compile.passes.ops.cache.page_selection import page_classes, pick_pages, select_pages
from sparse_compile.passes.ops.prefill_block_selection import SelectBlocks, select_blocks
from sparse_compile.passes.storage.codec import Format
from sparse_compile.passes.storage.graph_text import to_text
from sparse_compile.passes.torch_private import overload


def chosen_blocks(emitter: Emitter, layout: Layout) -> Node | Left:
    """Write the selection of a prefill, where blocks of queries select blocks of keys; returns the ``select_blocks`` node."""
    call, point = emitter.call, emitter.point
    at, kv_len = call.positions, emitter.integer(point, expr_of(call.kv_len))
    if kv_len is None:
        return Left(emitter.node, "its length is not known yet where its blocks are selected")
    q_start: Any = emitter.integer(point, at.q_start)
    kv_start: Any = emitter.integer(point, at.kv_start)
    if q_start is None or kv_start is None:
        return Left(emitter.node, f"its positions ({at}) are not known yet where its blocks are selected")
    width: Any = emitter.blocks(point, kv_len, layout.block[1]) if layout.width is None else layout.width
    captures = emitter.captures(layout.mask)
    k, _ = emitter.keys_values()
    operands: Any = SelectBlocks(
        emitter.query(), k, layout.mask, layout.heads, q_start, kv_start, at.q_shift, captures, width, layout.split
    )
    return emitter.call_op(emitter.node, select_blocks, operands)


def chosen_pages(emitter: Emitter, pages: Selected, layout: Layout, *, repeat_for_group: bool = False) -> list[Node]:
    """Write the selection of a decode step; returns the positions of the first query and key, page counts, and page lists.

    With ``layout.split``, empty counts and lists of full pages follow. The tokens of the step are written to the cache before
    the selection, or by the same op.
    """
    point, call, state = emitter.node, emitter.call, pages.state
    write_once(point, pages, call.q, emitter.scene.shared)
    outputs = _classes(emitter, pages, layout)
    first_query, first_key, classes, changed = (emitter.item(point, outputs, n) for n in range(4))
    key = ("selected", state.scores, outputs, pages.selection.budget)
    if pages.appends_with_choice:
        emitter.scene.shared[key] = _append_and_choose(emitter, pages, classes, changed)
    has_width = state.table is not None and value_of(state.table).shape[3] == layout.width
    if key in emitter.scene.shared and has_width and _scores_all_heads(pages):
        lists = [rows_in_use(point, part, call.q) for part in (state.counts, state.table) if part is not None]
    else:
        limits = (emitter.integer(point, expr_of(call.batch)), pages.selection.budget, layout.width, pages.selection.page_size)
        scored = (state.scores, classes, pages.new.start, list(pages.selection.rows))
        picked = emitter.call_function(point, overload(pick_pages), *scored, *limits)
        lists = [emitter.item(point, picked, n) for n in range(2)]
    if repeat_for_group:
        lists = [emitter.call_function(point, torch.repeat_interleave, x, call.group, 1) for x in lists]
    if layout.split:  # the C++ template needs tables of full blocks to compile; these are empty
        lists += [emitter.call_function(point, torch.zeros_like, x) for x in lists]
    return [first_query, first_key, *lists]


def _classes(emitter: Emitter, pages: Selected, layout: Layout) -> Node:
    """The class of each page under the mask: hidden, selectable or always read. Layers share this node."""
    selection, start, text = pages.selection, pages.new.start, to_text(layout.mask)
    sizes = (selection.page_size, pages.length // selection.page_size, selection.selector.every > 1)

    def make() -> Node:
        captures = emitter.captures(layout.mask)
        return emitter.call_function(emitter.node, overload(page_classes), text, layout.heads, start, captures, *sizes)

    key = ("classes", text, layout.heads, start, sizes, str(emitter.call.sources))
    return emitter.share(key, emitter.scene.reads, make)


def _append_and_choose(emitter: Emitter, pages: Selected, classes: Node, changed: Node) -> Node:
    """Append the new token and select pages, in a layer that scores its own pages. The same op writes quantized pages.

    With ``check_finite``, an op of its own first checks the token and appends it to the quantized pages.
    """
    state, selection, selector, new = pages.state, pages.selection, pages.selection.selector, pages.new
    quantized = pages.pages if isinstance(pages.pages, Quantized) else None
    if quantized is not None and quantized.check_finite:
        append_quantized(emitter.node, quantized, None)
        quantized = None
    buffers = pages.pages.tails if isinstance(pages.pages, Quantized) else pages.pages
    k, v = new_tokens(emitter.node, new)
    forms = (Format(), Format()) if quantized is None else quantized.forms
    operands: Any = SelectPages(
        keys=buffers.keys,
        values=buffers.values,
        summary=state.summary,
        scores=state.scores,
        counts=state.counts,
        table=state.table,
        key_quantized=None if quantized is None else quantized.keys,
        value_quantized=None if quantized is None else quantized.values,
        q=emitter.query(),
        k=k,
        v=v,
        classes=classes,
        columns=new.start,
        anchor=new.anchor,
        changed=changed,
        texts=new.texts,
        how=PageScoring(selection.page_size, selector.page, selector.score, selector.group, selector.every),
        budget=selection.budget,
        key_form=forms[0],
        value_form=forms[1],
    )
    return emitter.call_op(emitter.node, select_pages, operands)


def _scores_all_heads(pages: Selected) -> bool:
    """Whether the heads of ``pages`` are all heads that are scored together."""
    return pages.selection.rows == tuple(range(value_of(pages.state.scores).shape[1]))
