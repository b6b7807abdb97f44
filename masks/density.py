"""Count the pairs that a mask shows exactly, visiting only pairs that its bounds leave undecided."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.masks.block_mask import Runs
from sparse_compile.masks.intervals import Intervals
from sparse_compile.masks.mask import Mask, check_sizes, view
from sparse_compile.masks.selection.page_topk import PageTopK, offered, selector_of, static_part

ROWS_AT_ONCE = 1 << 16
PAIRS_AT_ONCE = 1 << 24


@view
def density(mask: Mask, q_len: int, kv_len: int, q_offset: int, batch: int | None, heads: int | None) -> float:
    """See ``Mask.density``."""
    default_batch, default_heads = mask.sizes()
    batch, heads = default_batch if batch is None else batch, default_heads if heads is None else heads
    check_sizes(q_offset=q_offset, q_len=q_len, kv_len=kv_len, batch=batch, heads=heads)
    mask.check(batch, heads, q_len, kv_len, q_offset)
    return _counted(mask, q_len, kv_len, q_offset, batch, heads)


def largest_density(mask: Mask, q_len: int, kv_len: int, q_offset: int, heads: int, block: tuple[int, int]) -> float:
    """Return the density of a mask if every selector uses its whole budget; without selectors, this is the density.

    ``block`` holds the number of queries that share a selection, and the number of keys in a page.
    """
    return _counted(mask, q_len, kv_len, q_offset, mask.sizes()[0], heads, block)


def _counted(
    mask: Mask, q_len: int, kv_len: int, q_offset: int, batch: int, heads: int, block: tuple[int, int] = (1, 1)
) -> float:
    visible = 0
    for group, members in mask.head_groups(heads).items():
        shared = batch if group.sizes()[0] == 1 else 1
        visible += _visible(group, q_len, kv_len, q_offset, block) * shared * len(members)
    return visible / (q_len * kv_len * batch * heads)


def _visible(mask: Mask, q_len: int, kv_len: int, q_offset: int, block: tuple[int, int]) -> int:
    """Count the visible pairs. With a selector, count at most as many for each query as its pages can hold."""
    selector, shown = selector_of(mask), offered(mask)
    total, at_once = 0, ROWS_AT_ONCE // block[0] * block[0]
    for first in range(q_offset, q_offset + q_len, at_once):
        rows = torch.arange(first, min(first + at_once, q_offset + q_len))
        limit = None if selector is None else _limits(mask, selector, rows, kv_len, block)
        bounds = shown.bounds(rows, rows)
        most, least = bounds.maybe.clamp(0, kv_len).count(), bounds.surely.clamp(0, kv_len).count()
        most, least = most.expand(*shown.sizes(), -1), least.expand(*shown.sizes(), -1)
        certain = (most == least).flatten(0, -2).all(0)  # [rows]
        sure = most[..., certain]
        total += int((sure if limit is None else torch.minimum(sure, limit[..., certain])).sum())
        total += _one_by_one(shown, rows[~certain], kv_len, None if limit is None else limit[..., ~certain])
    return total


def _limits(mask: Mask, selector: PageTopK, rows: Tensor, kv_len: int, block: tuple[int, int]) -> Tensor:
    """Return the most keys that the pages of each query can hold: ``[..., rows]``.

    The pages are those of the budget, or those that are always read if these are more.
    """
    queries, page = block
    lo = rows[::queries]
    hi = (lo + (queries - 1)).clamp(max=int(rows[-1]))
    kept = static_part(mask).bounds(lo, hi).maybe | Intervals.of(lo, hi + 1)
    pages = Runs.of(kept.clamp(0, kv_len), page).end[..., -1]
    keys = pages.clamp(min=-(-selector.tokens // page)) * page
    # A query may see only some keys of the pages that hold its block of queries; the others do not count.
    start, stop = ((x.repeat_interleave(queries)[: rows.numel()] // page) * page for x in (lo, hi + page))
    seen = offered(mask).bounds(rows, rows).maybe.overlap(start.unsqueeze(-1), stop.unsqueeze(-1)).squeeze(-1)
    return keys.repeat_interleave(queries, dim=-1)[..., : rows.numel()] - (stop - start - seen)


def _one_by_one(mask: Mask, rows: Tensor, kv_len: int, limit: Tensor | None) -> int:
    """Count visible pairs by evaluating the mask for every pair of the query positions ``rows``."""
    batch, heads = mask.sizes()
    b = torch.arange(batch).view(-1, 1, 1, 1)
    h = torch.arange(heads).view(1, -1, 1, 1)
    j = torch.arange(kv_len)
    total = 0
    size = max(PAIRS_AT_ONCE // (kv_len * batch * heads), 1)
    limits = [None] * rows.numel() if limit is None else limit.split(size, dim=-1)
    for part, most in zip(rows.split(size), limits, strict=False):
        seen = torch.as_tensor(mask(b, h, part.view(1, 1, -1, 1), j))
        count = seen.expand(batch, heads, part.numel(), kv_len).sum(dim=-1)
        total += int((count if most is None else torch.minimum(count, most)).sum())
    return total
