"""The layout of the block tables of one kernel, and the kernel options that go with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from sparse_compile.masks import Mask, full, per_head
from sparse_compile.masks.block_mask import live_width, query_blocks
from sparse_compile.masks.patterns.per_head import PerHead, unions_by_kv_head
from sparse_compile.masks.patterns.tensor import Explicit
from sparse_compile.masks.selection.page_topk import PageTopK, has_selector, static_part
from sparse_compile.masks.unknown_tensors import without_symbols
from sparse_compile.passes.choose.named_mask import NamedMask
from sparse_compile.passes.choose.tuning import TiledPhase, Tiles, kernel_options, splits_for, tiles_for, tiles_for_pages
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_nodes import hint_of
from sparse_compile.passes.ir.kv_source import Selected
from sparse_compile.passes.ir.target import Target
from sparse_compile.passes.ops.block_tables import BLOCK, KV_START, Q_START
from sparse_compile.passes.torch_private import real_tensors


@dataclass(frozen=True)
class Layout:
    """How the visible blocks of ``mask`` are listed in tables for ``heads`` heads.

    ``block`` is the number of queries and of keys in a block. With ``split``, full blocks are listed in tables of their own.
    ``width`` is the number of columns of a table; None means one for each key block. ``group`` query heads are folded into the
    rows of their KV head. ``starts`` are the positions of the first query and key if they are constants; else None.
    """

    mask: Mask
    heads: int
    block: tuple[int, int] = (BLOCK, BLOCK)
    split: bool = True
    width: int | None = None
    group: int = 1
    options: tuple[tuple[str, Any], ...] = ()
    starts: tuple[int, int] | None = None


def dense_layout(call: Attention, seen: NamedMask) -> Layout:
    """The layout of a kernel that reads a dense mask. Only the blocks that a selector selects are listed in tables."""
    width = _selected_width(call, seen) if has_selector(seen.mask) else None
    return Layout(seen.mask, seen.heads, split=False, width=width)


def prefill_layout(
    call: Attention, seen: NamedMask, block: tuple[int, int], options: Mapping[str, Any], *, every_column: bool = False
) -> Layout:
    """The layout for many queries. With ``every_column``, a table has a column for every key block, as the C++ kernel needs."""
    if has_selector(seen.mask):
        width = _selected_width(call, seen)
    else:
        width = _static_width(call, seen.mask.for_heads(seen.heads) if seen.tells_heads_apart else seen.mask, block)
    if every_column and width is not None:
        width = -(-call.kv_len // BLOCK)
    return Layout(seen.mask, seen.heads, block, width=width, options=_sorted(options), starts=_starts(call, seen.mask))


def step_layout(call: Attention, seen: NamedMask, target: Target) -> Layout:
    """The layout of a decode step, or of a verification, whose query heads are folded into the rows of their KV head.

    Full blocks get no tables of their own, because with any full block the kernel spreads the whole length over its splits.
    """
    listed, listed_heads = _of_kv_heads(call, seen)
    tiles = tiles_of(call, "decode", target)
    per_block = BLOCK // (tiles.block_n if tiles is not None else BLOCK)
    live = step_width(listed, hint_of(call.kv_len), BLOCK) * per_block
    splits = splits_for(hint_of(call.batch) * call.kv_heads, live)
    return Layout(
        mask=listed,
        heads=listed_heads,
        split=False,
        width=_static_width(call, listed, (BLOCK, BLOCK)),
        group=call.group,
        options=_sorted(kernel_options(tiles, "decode", splits=splits)),
        starts=_starts(call, seen.mask),
    )


def selection_layout(
    call: Attention,
    pages: Selected,
    seen: NamedMask,
    *,
    group: int = 1,
    options: Mapping[str, Any] | None = None,
    every_column: bool = False,
) -> Layout:
    """The layout of a decode step that reads selected pages. The tables list pages by KV head for every kernel.

    With ``every_column``, a table has a column for every page, and full blocks have tables of their own, as the C++ kernel
    needs.
    """
    listed, listed_heads = _of_kv_heads(call, seen)
    page_size = pages.selection.page_size
    # With padding, the static part of a mask can touch any number of pages.
    width = pages.length // page_size if pages.new.texts is not None or every_column else pages.selection.width
    block = (BLOCK, page_size)
    return Layout(listed, listed_heads, block, split=every_column, width=width, group=group, options=_sorted(options or {}))


def selection_options(call: Attention, pages: Selected, target: Target) -> dict[str, Any]:
    """The options of FlexAttention's decode kernel over selected pages."""
    page_size = pages.selection.page_size
    tiles = tiles_for_pages(tiles_of(call, "decode", target), page_size)
    visited = min(pages.selection.budget, pages.length // page_size) * (page_size // tiles.block_n)
    return kernel_options(tiles, "decode", splits=splits_for(hint_of(call.batch) * call.kv_heads, visited))


def folds(call: Attention, seen: NamedMask, target: Target) -> bool:
    """Whether the queries of a KV head can be rows of one decode kernel, which needs fewer than 128 and a static batch."""
    tells_heads = seen.tells_heads_apart and any(isinstance(node, Explicit) for node in seen.mask.walk())
    fits = isinstance(call.batch, int) and isinstance(call.q_len, int) and call.group * call.q_len < BLOCK
    return (call.is_step or call.verifies) and fits and not target.gradients and not tells_heads


def tiles_of(call: Attention, phase: TiledPhase, target: Target) -> Tiles | None:
    """The pinned tiles for a call; None if Inductor times tiles, or if FlexAttention's own choice is used."""
    query_dim, _, value_dim = call.dims
    return None if target.kernel == "autotune" else tiles_for(target.capability, phase, max(query_dim, value_dim), call.dtype)


def _of_kv_heads(call: Attention, seen: NamedMask) -> tuple[Mask, int]:
    """The union of the masks of each KV head's query heads, and the number of heads for which it is listed."""
    listed = per_kv_head(seen.mask, call.heads, call.kv_heads) if seen.tells_heads_apart else seen.mask
    return listed, call.kv_heads if any(isinstance(node, PerHead) for node in listed.walk()) else 1


def _selected_width(call: Attention, seen: NamedMask) -> int | None:
    """The number of columns that a table of selected blocks needs; None if the number of keys is dynamic.

    Where positions are tensors or the static part of the mask reads one, the table has a column for every block.
    """
    budget = max(-(-node.tokens // BLOCK) for node in seen.mask.walk() if isinstance(node, PageTopK))
    listed, _ = _of_kv_heads(call, seen)
    static = static_part(listed) if all(has_selector(mask) for mask in _of_heads(listed)) else full
    width = None if static.captures() else _static_width(call, static, (BLOCK, BLOCK))
    if not isinstance(call.kv_len, int):
        return None
    blocks = -(-call.kv_len // BLOCK)
    return blocks if width is None else min(blocks, max(budget, width + 2))


def _of_heads(mask: Mask) -> tuple[Mask, ...]:
    parts = [node for node in mask.walk() if isinstance(node, PerHead)]
    return parts[0].children() if parts else (mask,)


def _static_width(call: Attention, mask: Mask, block: tuple[int, int]) -> int | None:
    """The number of columns that a table needs; None if lengths or positions are not constants."""
    at, q_len, kv_len = call.positions, call.q_len, call.kv_len
    if not (isinstance(q_len, int) and isinstance(kv_len, int)):
        return None
    if at.q_shift is not None or not at.q_start.is_Integer or at.kv_start != 0:
        return None
    return table_width(mask, q_len, kv_len, int(at.q_start), block)


def _starts(call: Attention, mask: Mask) -> tuple[int, int] | None:
    """The positions of the first query and key; None if they are not constants, or if the masks read them as tensors."""
    at = call.positions
    reads = {*mask.captures(), *(call.score_mod.captures() if call.score_mod is not None else ())}
    if at.q_shift is not None or not (at.q_start.is_Integer and at.kv_start.is_Integer) or reads & {Q_START, KV_START}:
        return None
    return int(at.q_start), int(at.kv_start)


def _sorted(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(options.items()))


def per_kv_head(mask: Mask, heads: int, kv_heads: int) -> Mask:
    """A mask for KV heads: the union over the query heads of each. The tables of a folded decode step list it."""
    if not any(isinstance(node, PerHead) for node in mask.walk()):
        return mask
    unions = unions_by_kv_head(mask, heads, kv_heads)
    return unions[0] if len(set(unions)) == 1 else per_head(unions)


@lru_cache(maxsize=256)
def table_width(mask: Mask, q_len: int, kv_len: int, q_start: int, block: tuple[int, int]) -> int:
    """The most key blocks that any query block visits. Masks that read tensors of the graph count as full."""
    with real_tensors():
        lo, hi = query_blocks(q_len, block[0], "cpu")
        return live_width(without_symbols(mask), lo + q_start, hi + q_start, kv_len, block[1])


@lru_cache(maxsize=256)
def step_width(mask: Mask, kv_len: int, block: int) -> int:
    """The most key blocks that a single query visits, at any position among ``kv_len`` keys."""
    with real_tensors():
        at = torch.arange(kv_len)
        return live_width(without_symbols(mask), at, at, kv_len, block)
