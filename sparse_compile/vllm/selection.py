"""The arithmetic of page selection over paged caches: page summaries in blocks, and block tables of the chosen pages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.masks import Mask
from sparse_compile.masks.operators import union
from sparse_compile.masks.selection.page_scoring import HIDDEN, KEPT, OFFERED, alive, choose, pool, score_summaries
from sparse_compile.masks.selection.page_topk import PageTopK, offered, static_part


@dataclass(frozen=True)
class Step:
    """A decode step: the row of its request, the index of its token in the batch, and the length of the text up to it."""

    row: int
    token: int
    length: int


def decode_steps(rows: list[int], starts: list[int], lengths: list[int]) -> list[Step]:
    """Return the decode steps of the requests ``rows``. One that was preempted may repeat several steps at once.

    The tokens of request ``n`` are ``starts[n]`` to ``starts[n + 1]`` of the batch, and its text ends with them after
    ``lengths[n]`` tokens.

        >>> decode_steps([1], [0, 3, 5], [40, 12])
        [Step(row=1, token=3, length=11), Step(row=1, token=4, length=12)]
    """
    counts = [(row, starts[row + 1] - starts[row]) for row in rows]
    return [Step(row, starts[row] + n, lengths[row] - count + n + 1) for row, count in counts for n in range(count)]


def update_summaries(summaries: Tensor, keys: Tensor, slots: Tensor, page: int) -> None:
    """Extend the minima and maxima of pages by new keys, in place.

    ``summaries`` is ``[blocks, KV heads, pages of a block, 2 * D]``, ``keys`` ``[tokens, KV heads, D]``, and ``slots``
    ``[tokens]`` has the slot of each key, negative for padding. The first key of a page begins a new summary, so nothing is
    left of a text that held the block before.
    """
    real = slots >= 0
    slots, keys = slots[real], keys[: len(real)][real]
    pages, place = (slots // page).unique(return_inverse=True)
    block, inside = pages // summaries.shape[2], pages % summaries.shape[2]
    begun = torch.zeros(len(pages), dtype=torch.bool, device=keys.device)
    begun[place[slots % page == 0]] = True
    low, high = summaries[block, :, inside].chunk(2, dim=-1)  # [pages, KV heads, D]
    fresh, index = begun[:, None, None], place[:, None, None].expand_as(keys)
    low = torch.where(fresh, torch.inf, low).scatter_reduce(0, index, keys, "amin")
    high = torch.where(fresh, -torch.inf, high).scatter_reduce(0, index, keys, "amax")
    summaries[block, :, inside] = torch.cat([low, high], dim=-1)


def choose_pages(
    q: Tensor, summaries: Tensor, masks: tuple[Mask, ...], selector: PageTopK, length: int, page_size: int
) -> tuple[Tensor, Tensor]:
    """Choose the pages that one decode step reads, as a ``SparseCache`` of the same page size does.

    ``q`` is ``[KV heads, query heads of each, D]`` of the token at position ``length - 1``, ``summaries`` ``[KV heads, pages,
    2 * D]`` by logical page, and ``masks`` are those of the query heads of a KV head. Returns int32 counts ``[KV heads]`` and
    ascending page numbers ``[KV heads, pages]``, which end with zeros.
    """
    pages, whole = -(-length // page_size), union(masks)
    at = torch.tensor([length - 1], device=q.device)
    classes = torch.full((pages,), HIDDEN, device=q.device)
    for part, rank in ((offered(whole), OFFERED), (static_part(whole), KEPT)):
        classes = torch.where(_shown(part, at, pages, page_size), rank, classes)
    classes[-1] = KEPT
    filled = alive((torch.arange(pages * page_size, device=q.device) < length)[None], selector.page)[0]
    scores = score_summaries(q[None], summaries[None, :, : len(filled)], selector.score)[0]  # [KV heads, query heads, L]
    pooled = pool(scores, selector.group, page_size // selector.page, filled)
    return choose(pooled, classes, -(-selector.tokens // page_size), pages)


def one_head_tables(tables: Tensor, counts: Tensor, chosen: Tensor) -> Tensor:
    """Return the blocks of the chosen pages for a cache that is viewed as one of a single head: int32 ``[KV heads, pages]``.

    ``tables`` ``[pages]`` has the block of each page. A block holds its heads one after the other, so that head ``h`` of block
    ``b`` is block ``b * KV heads + h`` of that view. Entries beyond ``counts`` are 0.
    """
    heads, width = chosen.shape
    head = torch.arange(heads, device=chosen.device)[:, None]
    blocks = tables[chosen.long()] * heads + head
    used = torch.arange(width, device=chosen.device) < counts[:, None]
    return torch.where(used, blocks, 0).int()


def _shown(mask: Mask, at: Tensor, pages: int, page_size: int) -> Tensor:
    """Return which pages hold a key that the query ``at`` sees: bool ``[pages]``."""
    start = torch.arange(pages, device=at.device) * page_size
    bounds = mask.bounds(at, at)
    if bounds.certain:
        seen: Tensor = bounds.maybe.overlap(start, start + page_size) > 0
        return seen.reshape(pages)
    keys = torch.arange(pages * page_size, device=at.device)
    every: Tensor = torch.as_tensor(mask(0, 0, at, keys)).expand(pages * page_size).unflatten(0, (pages, page_size))
    return every.any(dim=1)
