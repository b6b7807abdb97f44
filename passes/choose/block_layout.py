"""How the block tables of one kernel are cut, and the kernel options that go with them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import torch

from sparse_compile.masks import Mask, full, per_head
from sparse_compile.masks.block_mask import live_width, query_blocks
from sparse_compile.masks.patterns.per_head import PerHead
from sparse_compile.masks.patterns.tensor import Explicit
from sparse_compile.masks.selection.page_topk import PageTopK, has_selector, static_part
from sparse_compile.masks.unknown_tensors import without_symbols
from sparse_compile.passes.choose.kernel_choice import FLEX
from sparse_compile.passes.choose.tuning import (
    FLASH_TILES,
    Phase,
    Tiles,
    kernel_options,
    splits_for,
    tiles_for,
    tiles_for_pages,
)
from sparse_compile.passes.ir.attention_call import AttentionCall, Scored, is_decode_step
from sparse_compile.passes.ir.fx_nodes import hint_of, value_of
from sparse_compile.passes.ir.target import Kernel, Target
from sparse_compile.passes.ops.block_tables import BLOCK, KV_START, Q_START
from sparse_compile.passes.torch_private import real_tensors


@dataclass(frozen=True)
class Layout:
    """``mask`` is listed for ``heads`` heads, in blocks of ``block`` queries and keys, with full blocks apart if ``split``.

    ``width`` is the number of columns, None for one per key block. ``group`` query heads are rows of their KV head.
    ``starts`` are the positions of the first query and key where the kernel may know them.
    """

    mask: Mask
    heads: int
    block: tuple[int, int] = (BLOCK, BLOCK)
    split: bool = True
    width: int | None = None
    group: int = 1
    options: tuple[tuple[str, Any], ...] = ()
    starts: tuple[int, int] | None = None


def layout_of(call: AttentionCall, mask: Mask, heads: int, kernel: Kernel, target: Target) -> Layout:
    """The layout for ``mask``, in which tensors have names. ``heads`` is how many it tells apart, or 1."""
    if call.scored is not None:
        return _selecting(call, call.scored, mask, heads, kernel, target)
    if kernel.name not in FLEX:
        return Layout(mask, heads, split=False, width=_selected_width(call, mask, heads) if has_selector(mask) else None)
    starts = _starts(call, mask)
    block = (BLOCK, BLOCK)
    if kernel.name == "triton" and _folds(call, mask, heads, target):
        return _folded(call, mask, heads, target, starts)
    options: dict[str, Any] = {}
    if kernel.name == "flash":
        major, _ = target.capability or (9, 0)
        block, options = FLASH_TILES[major][hint_of(call.size("q", 3))], {"BACKEND": "FLASH"}
    elif kernel.name == "triton":
        options = kernel_options(_tiles(call, "prefill", target), "prefill")
    if has_selector(mask):
        width = _selected_width(call, mask, heads)
    else:
        width = _static_width(call, mask.for_heads(heads) if heads > 1 else mask, block)
    if kernel.name == "cpp" and width is not None:
        width = -(-call.size("k", 2) // BLOCK)  # the C++ kernel wants a column for every block
    return Layout(mask, heads, block, width=width, options=_sorted(options), starts=starts)


def _selecting(call: AttentionCall, scored: Scored, mask: Mask, heads: int, kernel: Kernel, target: Target) -> Layout:
    """A decode step that reads some pages. Tables are those of the KV heads, whatever the kernel."""
    listed = per_kv_head(mask, call.heads, call.kv_heads) if heads > 1 else mask
    page_size = scored.selecting.page_size
    pages = call.size("k", 2) // page_size
    # The C++ kernel wants a column for every page.
    width = pages if scored.padding or kernel.name == "cpp" else scored.selecting.width
    options: dict[str, Any] = {}
    folds = kernel.name == "triton" and _folds(call, mask, heads, target)
    if kernel.name == "triton":
        tiles = tiles_for_pages(_tiles(call, "decode", target), page_size)
        visited = min(scored.selecting.budget, pages) * (page_size // tiles.block_n)
        splits = splits_for(hint_of(call.size("q", 0)) * call.kv_heads, visited)
        options = kernel_options(tiles, "decode", splits=splits)
    listed_heads = call.kv_heads if any(isinstance(node, PerHead) for node in listed.walk()) else 1
    group = call.heads // call.kv_heads if folds else 1
    block = (BLOCK, page_size)
    return Layout(listed, listed_heads, block, split=kernel.name == "cpp", width=width, group=group, options=_sorted(options))


def _selected_width(call: AttentionCall, mask: Mask, heads: int) -> int | None:
    """The columns that a table of chosen blocks needs, if lengths and positions are numbers and no tensor has a say."""
    budget = max(-(-node.tokens // BLOCK) for node in mask.walk() if isinstance(node, PageTopK))
    listed = per_kv_head(mask, call.heads, call.kv_heads) if heads > 1 else mask
    static = static_part(listed) if all(has_selector(m) for m in _of_heads(listed)) else full
    width = None if static.captures() else _static_width(call, static, (BLOCK, BLOCK))
    kv_len = call.size("k", 2)
    if not isinstance(kv_len, int):
        return None
    if width is None:
        return -(-kv_len // BLOCK)
    return min(-(-kv_len // BLOCK), max(budget, width + 2))


def _of_heads(mask: Mask) -> tuple[Mask, ...]:
    parts = [node for node in mask.walk() if isinstance(node, PerHead)]
    return parts[0].children() if parts else (mask,)


def _folded(call: AttentionCall, mask: Mask, heads: int, target: Target, starts: tuple[int, int] | None) -> Layout:
    """A decode step. Full blocks are not told apart: given any, the kernel spreads the whole length over its splits."""
    listed = per_kv_head(mask, call.heads, call.kv_heads) if heads > 1 else mask
    listed_heads = call.kv_heads if any(isinstance(node, PerHead) for node in listed.walk()) else 1
    tiles = _tiles(call, "decode", target)
    per_block = BLOCK // (tiles.block_n if tiles is not None else BLOCK)
    live = step_width(listed, hint_of(call.size("k", 2)), BLOCK) * per_block
    splits = splits_for(hint_of(call.size("q", 0)) * call.kv_heads, live)
    return Layout(
        mask=listed,
        heads=listed_heads,
        split=False,
        width=_static_width(call, listed, (BLOCK, BLOCK)),
        group=call.heads // call.kv_heads,
        options=_sorted(kernel_options(tiles, "decode", splits=splits)),
        starts=starts,
    )


def _folds(call: AttentionCall, mask: Mask, heads: int, target: Target) -> bool:
    """Whether the query heads of a KV head can be rows of one decode kernel, which takes fewer than 128 and a static batch."""
    tells_heads = heads > 1 and any(isinstance(node, Explicit) for node in mask.walk())
    fits = isinstance(call.size("q", 0), int) and call.heads // call.kv_heads < BLOCK
    return is_decode_step(call) and fits and not target.gradients and not tells_heads


def _tiles(call: AttentionCall, phase: Phase, target: Target) -> Tiles | None:
    dtype: torch.dtype = value_of(call.q).dtype
    largest = max(hint_of(call.size("q", 3)), hint_of(call.size("v", 3)))
    return None if target.kernel == "autotune" else tiles_for(target.capability, phase, largest, dtype)


def _static_width(call: AttentionCall, mask: Mask, block: tuple[int, int]) -> int | None:
    """The columns that a table needs, if lengths and positions are numbers."""
    at, q_len, kv_len = call.positions, call.size("q", 2), call.size("k", 2)
    assert at is not None
    if not (isinstance(q_len, int) and isinstance(kv_len, int)):
        return None
    if at.q_shift is not None or not at.q_start.is_Integer or at.kv_start != 0:
        return None
    return table_width(mask, q_len, kv_len, int(at.q_start), block)


def _starts(call: AttentionCall, mask: Mask) -> tuple[int, int] | None:
    """The positions of the first query and key, if they are numbers and nothing else needs them as tensors."""
    at = call.positions
    assert at is not None
    reads = {*mask.captures(), *(call.score_mod.captures() if call.score_mod is not None else ())}
    if at.q_shift is not None or not (at.q_start.is_Integer and at.kv_start.is_Integer) or reads & {Q_START, KV_START}:
        return None
    return int(at.q_start), int(at.kv_start)


def _sorted(options: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(options.items()))


def per_kv_head(mask: Mask, heads: int, kv_heads: int) -> Mask:
    """What any query head of each KV head sees: a mask of the KV heads, as lists of a folded decode step need it."""
    if not any(isinstance(node, PerHead) for node in mask.walk()):
        return mask
    group = heads // kv_heads
    seen = [[mask.for_head(head, heads) for head in range(k * group, (k + 1) * group)] for k in range(kv_heads)]
    unions = [reduce(lambda a, b: a | b, dict.fromkeys(masks)) for masks in seen]
    return unions[0] if len(set(unions)) == 1 else per_head(unions)


@lru_cache(maxsize=256)
def table_width(mask: Mask, q_len: int, kv_len: int, q_start: int, block: tuple[int, int]) -> int:
    """The most key blocks that a query block of a static shape visits; masks that read tensors of the graph count as full."""
    with real_tensors():
        lo, hi = query_blocks(q_len, block[0], "cpu")
        return live_width(without_symbols(mask), lo + q_start, hi + q_start, kv_len, block[1])


@lru_cache(maxsize=256)
def step_width(mask: Mask, kv_len: int, block: int) -> int:
    """The most key blocks that a single query visits, wherever among ``kv_len`` keys it stands."""
    with real_tensors():
        at = torch.arange(kv_len)
        return live_width(without_symbols(mask), at, at, kv_len, block)
