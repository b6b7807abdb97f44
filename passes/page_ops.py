"""Page selection while a compiled graph runs: describe pages as keys arrive, score them, choose, and list what is read.

The ops are opaque: their tables are read by kernels, their state (digests, scores) is written in place, and on CUDA two Triton
kernels do the work of a decode step. Nothing here waits for the device. What an op writes comes first: the passes ask no
further (``graph.writers``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparse_compile.masks import Mask
from sparse_compile.masks.given import Explicit
from sparse_compile.masks.heads import consecutive
from sparse_compile.masks.pages import HIDDEN, KEPT, OFFERED, alive, choose, describe, pool, score_digests, score_keys
from sparse_compile.masks.selectors import offered, static_part
from sparse_compile.passes.tables import batch_of, bind, given, parse, starts


@torch.library.custom_op("sparse_compile::describe_pages", mutates_args=("digest",))
def describe_pages(
    digest: Tensor, keys: Tensor, columns: Tensor, texts: Tensor | None, batch: int, tokens: int, page: int, score: str
) -> None:
    """Describe anew every page that ``tokens`` new tokens from column ``columns`` on went to, from the keys that are there.

    ``keys`` ``[max_batch, H, slots, D]`` has the new ones; ``texts`` ``[B, N]`` is negative for padding. A digest is always
    that of all the keys of its page, so nothing that was overwritten or taken back is left in it.
    """
    pages = digest.shape[2]
    count = min(-(-tokens // page) + 1, pages)
    first = (columns // page).clamp(max=pages - count)
    column = first * page + torch.arange(count * page, device=keys.device)
    new = keys[:batch].index_select(2, column)
    valid = _valid(column, columns + tokens, texts)
    at = first + torch.arange(count, device=keys.device)
    digest[:batch].index_copy_(2, at, describe(new, valid, page, score))


@describe_pages.register_fake
def _(
    digest: Tensor, keys: Tensor, columns: Tensor, texts: Tensor | None, batch: int, tokens: int, page: int, score: str
) -> None:
    return None


def _valid(column: Tensor, stop: Tensor, texts: Tensor | None) -> Tensor:
    """Which columns hold a token: bool ``[B | 1, n]``."""
    there = (column < stop).unsqueeze(0)
    return there if texts is None else there & (texts.index_select(1, column) >= 0)


@torch.library.custom_op("sparse_compile::select_pages", mutates_args=("keys", "values", "digest", "scores", "counts", "table"))
def select_pages(
    keys: Tensor,
    values: Tensor,
    digest: Tensor,
    scores: Tensor,
    counts: Tensor,
    table: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    classes: Tensor,
    columns: Tensor,
    anchor: Tensor,
    changed: Tensor,
    texts: Tensor | None,
    page_size: int,
    page: int,
    score: str,
    group: str,
    every: int,
    budget: int,
) -> None:
    """All that a decode step does to a layer before it attends: append a token, and choose pages; see ``Choice``.

    ``q`` is ``[B, Hq, 1, D]``; ``k`` and ``v`` go to column ``columns`` of ``keys`` and ``values`` ``[max_batch, H, slots,
    D]``, and its page is described anew. Every ``every`` steps from ``anchor`` on all earlier pages are scored; its own page
    and those to come rank above every score until the next time. Pages are chosen when they were scored, and when ``changed``
    says that their ``classes`` did.
    """
    batch, pages = q.shape[0], scores.shape[2]
    if q.is_cuda:
        from sparse_compile.passes import page_kernels

        how: dict[str, Any] = {"page_size": page_size, "page": page, "score": score, "group": group, "every": every}
        if pages <= page_kernels.MOST_PAGES:
            state = (keys, values, digest, scores, counts, table)
            told = (classes, columns, anchor, changed if every > 1 else None, texts)
            page_kernels.select_pages(q, k, v, *state, *told, **how, budget=budget)
            return
    for buffer, new in ((keys, k), (values, v)):
        buffer[:batch].index_copy_(2, columns.view(1), new)
    if q.is_cuda:
        page_kernels.score_pages(q, keys, digest, scores, columns, anchor, texts, **how)
    else:
        describe_pages(digest, keys, columns, texts, batch, 1, page, score)
        due = int(columns - anchor) % every == 0
        if not due and not int(changed):
            return
        if due:
            found = score_digests(q.unflatten(1, (keys.shape[1], -1)).squeeze(3), digest[:batch], score)
            column = torch.arange(keys.shape[2], device=keys.device)
            heard = alive(_valid(column, columns + 1, texts), page).unsqueeze(1)
            _note(scores, pool(found, group, page_size // page, heard), columns // page_size)
    count, index = choose(scores[:batch], classes, budget, table.shape[3])
    counts[:batch], table[:batch] = count.unsqueeze(2), index.unsqueeze(2)


@select_pages.register_fake
def _(
    keys: Tensor,
    values: Tensor,
    digest: Tensor,
    scores: Tensor,
    counts: Tensor,
    table: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    classes: Tensor,
    columns: Tensor,
    anchor: Tensor,
    changed: Tensor,
    texts: Tensor | None,
    page_size: int,
    page: int,
    score: str,
    group: str,
    every: int,
    budget: int,
) -> None:
    return None


@torch.library.custom_op("sparse_compile::score_pages_by_keys", mutates_args=("scores",))
def score_pages_by_keys(
    scores: Tensor,
    q: Tensor,
    keys: Tensor,
    columns: Tensor,
    anchor: Tensor,
    texts: Tensor | None,
    page_size: int,
    page: int,
    group: str,
    every: int,
) -> None:
    """Score pages as ``select_pages`` does, by the keys themselves: the exact choice, which reads all of them."""
    column = torch.arange(keys.shape[2], device=keys.device)
    rows = q.unflatten(1, (keys.shape[1], -1)).squeeze(3)
    found = score_keys(rows, keys[: q.shape[0]], _valid(column, columns + 1, texts), page)
    pooled = pool(found, group, page_size // page)
    due = (columns - anchor) % every == 0
    _note(scores, torch.where(due, pooled, scores[: q.shape[0]]), torch.where(due, columns // page_size, scores.shape[2]))


@score_pages_by_keys.register_fake
def _(
    scores: Tensor,
    q: Tensor,
    keys: Tensor,
    columns: Tensor,
    anchor: Tensor,
    texts: Tensor | None,
    page_size: int,
    page: int,
    group: str,
    every: int,
) -> None:
    return None


def _note(scores: Tensor, pooled: Tensor, newest: Tensor) -> None:
    """Write new scores, and one above all others for the newest page and those to come."""
    later = torch.arange(scores.shape[2], device=scores.device) >= newest
    scores[: pooled.shape[0]] = pooled.masked_fill(later, torch.inf)


@torch.library.custom_op("sparse_compile::page_classes", mutates_args=())
def page_classes(
    mask: str, heads: int, columns: Tensor, captures: list[Tensor], page_size: int, pages: int, compare: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What becomes of each page for the query at column ``columns``: int8 ``[B | 1, H | 1, pages]``.

    Kept are the query's own page and those of which the static part of ``mask`` shows a key, offered those of which it may show
    a key, hidden all others. The positions of the first query and key come first, int32 ``[1]``; last, whether the column
    before had other classes, int32 ``[1]`` (1 unless asked to ``compare``).
    """
    tree = parse(mask)
    shape = (batch_of(captures), heads, pages, page_size)
    first_query, first_key = starts(0, 0, columns, columns.device)
    classes = _classes(tree, captures, first_query, first_key, shape)
    changed = torch.ones(1, dtype=torch.int32, device=columns.device)
    if compare and not any(isinstance(node, Explicit) for node in tree.walk()):  # whose rows begin at this column
        before = _classes(tree, captures, first_query - 1, first_key, shape)
        changed = (before != classes).any().int().view(1)
    return first_query.int(), first_key.int(), classes, changed


@page_classes.register_fake
def _(
    mask: str, heads: int, columns: Tensor, captures: list[Tensor], page_size: int, pages: int, compare: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    first_query, first_key, changed = (torch.empty(1, dtype=torch.int32, device=columns.device) for _ in range(3))
    return first_query, first_key, columns.new_empty(batch_of(captures), heads, pages, dtype=torch.int8), changed


def _classes(mask: Mask, captures: list[Tensor], query: Tensor, first_key: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    bound = bind(mask, given(mask), captures, query, first_key)
    if shape[1] > 1:
        bound = bound.for_heads(shape[1])
    may, must = (_shown(part, shape, query) for part in (offered(bound), static_part(bound)))
    newest = torch.arange(shape[2], device=query.device) == query // shape[3]
    return torch.where(must | newest, KEPT, torch.where(may, OFFERED, HIDDEN)).to(torch.int8)


def _shown(mask: Mask, shape: tuple[int, int, int, int], at: Tensor) -> Tensor:
    """Which pages hold a key that the query ``at`` sees: bool ``[batch, heads, pages]``; ``shape`` ends in a page's keys."""
    batch, heads, pages, page_size = shape
    bounds = mask.bounds(at, at)
    if bounds.certain:  # a few numbers for each page, not for each key: a tenth of a millisecond at a million keys
        start = torch.arange(pages, device=at.device) * page_size
        found = bounds.maybe.overlap(start, start + page_size) > 0
        return found.view(*found.shape[:-2] or (1, 1), pages).expand(batch, heads, pages)
    b = torch.arange(batch, device=at.device).view(-1, 1, 1)
    h = torch.arange(heads, device=at.device).view(1, -1, 1)
    seen = torch.as_tensor(mask(b, h, at, torch.arange(pages * page_size, device=at.device)))
    shown: Tensor = seen.expand(batch, heads, -1).unflatten(2, (pages, page_size)).any(dim=3)
    return shown


@torch.library.custom_op("sparse_compile::pick_pages", mutates_args=())
def pick_pages(
    scores: Tensor, classes: Tensor, columns: Tensor, rows: list[int], batch: int, budget: int, width: int, page_size: int
) -> tuple[Tensor, Tensor]:
    """The pages each head reads, as a block table of one query block: int32 ``[B, H, 1]`` and ``[B, H, 1, width]``; see
    ``choose``.

    ``rows`` are the places of the heads in ``scores`` ``[max_batch, *, pages]``. Pages beyond column ``columns`` are hidden.
    """
    if rows != list(range(scores.shape[1])):
        scores = torch.cat([scores[:, slice(*run)] for run in consecutive(rows)], dim=1)
    if scores.is_cuda:
        from sparse_compile.passes import page_kernels

        if scores.shape[2] <= page_kernels.MOST_PAGES:
            sizes = {"batch": batch, "budget": budget, "width": width, "page_size": page_size}
            return page_kernels.pick_pages(scores, classes, columns, **sizes)
    count, index = choose(scores[:batch], classes, budget, width)
    return count.unsqueeze(2), index.unsqueeze(2)


@pick_pages.register_fake
def _(
    scores: Tensor, classes: Tensor, columns: Tensor, rows: list[int], batch: int, budget: int, width: int, page_size: int
) -> tuple[Tensor, Tensor]:
    size = (batch, len(rows), 1)
    return scores.new_empty(size, dtype=torch.int32), scores.new_empty(*size, width, dtype=torch.int32)


@torch.library.custom_op("sparse_compile::attend_pages", mutates_args=())
def attend_pages(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    table: Tensor,
    columns: Tensor,
    page_size: int,
    budget: int,
    scale: float,
) -> Tensor:
    """Causal attention of the query at column ``columns`` to the pages listed, ``[B, Hq, 1, Dv]``; on CUDA only.

    FlexAttention's decode kernel does the same under any mask and score mod, and takes half as long again: its splits are
    merged by two more kernels, which cannot start early. ``budget`` is how many pages there usually are.
    """
    from sparse_compile.passes import page_attention

    return page_attention.attend_pages(
        q, keys, values, counts, table, columns, None, page_size=page_size, scale=scale, usual=budget
    )


@attend_pages.register_fake
def _(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    table: Tensor,
    columns: Tensor,
    page_size: int,
    budget: int,
    scale: float,
) -> Tensor:
    return q.new_empty(*q.shape[:3], values.shape[3])
