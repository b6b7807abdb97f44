"""Write new tokens to a cache, and read its content as dense tensors for kernels that cannot read the cache in place."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_emit import emit, inline
from sparse_compile.passes.ir.fx_nodes import value_of
from sparse_compile.passes.ir.kv_source import Dense, KVSource, NewTokens, Paged, Prompt, Quantized, Ring, Selected
from sparse_compile.passes.ir.rows.cache_rows import put_tokens, rows_in_use, size_at
from sparse_compile.passes.ir.rows.ring_rows import new_tokens, ring_rows
from sparse_compile.passes.kernels.operands import Append
from sparse_compile.passes.ops.cache.page_selection import score_pages_by_keys, summarize_pages
from sparse_compile.passes.ops.cache.quantized_append import CheckedAppend, ReadQuantized, quantized_append, read_quantized
from sparse_compile.passes.torch_private import overload


def dense_tensors(point: Node, call: Attention, shared: dict[object, Any]) -> tuple[Node, Node]:
    """Write new tokens to the cache; returns the keys and values ``[B, Hkv, KV, D]`` of ``call``. Head groups share them."""
    key = ("dense", call.kv)
    if key not in shared:
        shared[key] = _dense(point, call.kv, call.q, shared)
    k, v = shared[key]
    return k, v


def _dense(point: Node, kv: KVSource, q: Node, shared: dict[object, Any]) -> tuple[Node, Node]:
    match kv:
        case Dense():
            return kv.k, kv.v
        case Prompt():
            write_tokens(point, kv.into, q)
            return new_tokens(point, kv.new)
        case Ring():
            return ring_rows(point, kv, *new_tokens(point, kv.new), q)
        case Selected():
            write_once(point, kv, q, shared)
            return page_rows(point, kv.pages, q)
        case _:
            write_once(point, kv, q, shared)
            return page_rows(point, kv, q)


def write_once(point: Node, kv: Paged | Quantized | Selected, q: Node, shared: dict[object, Any]) -> None:
    """Do the same as ``write_tokens``, unless another head group has done so already."""
    if ("written", kv) not in shared:
        shared["written", kv] = True
        write_tokens(point, kv, q)


def write_tokens(point: Node, kv: Paged | Quantized | Selected | Ring, q: Node) -> None:
    """Write the new tokens to their storage, in as many rows as ``q`` has, and update the summaries of their pages."""
    match kv:
        case Ring():
            ring_rows(point, kv, *new_tokens(point, kv.new), q)
        case Quantized():
            append_quantized(point, kv, None)
        case Paged():
            for buffer, x in zip((kv.keys, kv.values), new_tokens(point, kv.new), strict=True):
                _append(point, buffer, kv.new, x, q)
        case Selected():
            _write_selected(point, kv, q)


def _write_selected(point: Node, kv: Selected, q: Node) -> None:
    """Do the same as ``write_tokens`` for selected pages. If one op appends and selects, that op writes the tokens instead."""
    summarizes = kv.leads and kv.state.summary is not None and not kv.new.is_step
    if kv.appends_with_choice:
        return
    if isinstance(kv.pages, Quantized):
        append_quantized(point, kv.pages, kv if summarizes else None)
    else:
        write_tokens(point, kv.pages, q)
    selector = kv.selection.selector
    if summarizes and isinstance(kv.pages, Paged):
        assert kv.state.summary is not None
        state = (kv.state.summary, kv.pages.keys, kv.new.start, kv.new.texts, size_at(point, q, 0), size_at(point, q, 2))
        emit(point, overload(summarize_pages), *state, selector.page, selector.score)
    elif kv.leads and kv.state.summary is None and kv.new.is_step:
        keys = _read(point, kv.pages, 0) if isinstance(kv.pages, Quantized) else kv.pages.keys
        how = (kv.selection.page_size, selector.page, selector.group, selector.every)
        emit(point, overload(score_pages_by_keys), kv.state.scores, q, keys, kv.new.start, kv.new.anchor, kv.new.texts, *how)


def append_quantized(point: Node, pages: Quantized, summarized: Selected | None) -> None:
    """Append new tokens to quantized pages, and update the page summaries of ``summarized`` (None: there are none)."""
    k, v = new_tokens(point, pages.new)
    selector = summarized.selection.selector if summarized is not None else None
    new: Append[Node] = Append(
        key_tail=pages.tails.keys,
        value_tail=pages.tails.values,
        keys=pages.keys,
        values=pages.values,
        summary=summarized.state.summary if summarized is not None else None,
        k=k,
        v=v,
        columns=pages.new.start,
        texts=pages.new.texts,
        key_form=pages.forms[0],
        value_form=pages.forms[1],
        page=selector.page if selector is not None else 1,
        score=selector.score if selector is not None else "",
    )
    emit(point, quantized_append.target, *quantized_append.arguments(CheckedAppend(new, pages.check_finite)))


def _append(point: Node, buffer: Node, new: NewTokens, x: Node, q: Node) -> None:
    """Write new tokens to their columns in a buffer of pages."""
    if size_at(point, q, 0) == value_of(buffer).shape[0]:
        write = (buffer, new.columns, x)
        inline(point, lambda buffer, columns, x: buffer.index_copy_(2, columns[0], x), *write)
    else:
        put_tokens(point, buffer, new.columns, x, q)


def page_rows(point: Node, pages: Paged | Quantized, q: Node) -> tuple[Node, Node]:
    """The keys and values of the rows in use. Quantized pages are dequantized, but a chunk sees its own tokens unquantized."""
    if isinstance(pages, Quantized):
        return _read(point, pages, 0), _read(point, pages, 1)
    return rows_in_use(point, pages.keys, q), rows_in_use(point, pages.values, q)


def _read(point: Node, pages: Quantized, side: int) -> Node:
    quantized, form = (pages.keys, pages.values)[side], pages.forms[side]
    new, exact = new_tokens(point, pages.new)[side], not pages.new.is_step
    operands: ReadQuantized[Node] = ReadQuantized(quantized, new, pages.new.start, form, exact)
    return emit(point, read_quantized.target, *read_quantized.arguments(operands))
