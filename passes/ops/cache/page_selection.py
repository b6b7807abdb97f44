"""Page selection while a compiled graph runs: summarize pages as keys arrive, classify and score them, and choose.

The ops are opaque. They write their state in place, and on CUDA one or two Triton kernels do all the work of a step. Nothing
here waits for the device.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparse_compile.masks import Mask
from sparse_compile.masks.patterns.per_head import consecutive
from sparse_compile.masks.selection.page_scoring import (
    HIDDEN,
    KEPT,
    OFFERED,
    alive,
    choose,
    pool,
    score_keys,
    score_summaries,
    summarize,
)
from sparse_compile.masks.selection.page_topk import offered, static_part
from sparse_compile.passes.kernels.operands import Append, SelectPages
from sparse_compile.passes.ops.block_tables import batch_of, bind, starts, tensor_names
from sparse_compile.passes.ops.cache.quantized_append import append
from sparse_compile.passes.ops.small_steps import in_few_kernels
from sparse_compile.passes.ops.structured import StructuredOp
from sparse_compile.passes.storage.graph_text import from_text


@torch.library.custom_op("sparse_compile::summarize_pages", mutates_args=("summary",))
def summarize_pages(
    summary: Tensor, keys: Tensor, columns: Tensor, texts: Tensor | None, batch: int, tokens: int, page: int, score: str
) -> None:
    """Summarize every page again that received some of the ``tokens`` new tokens from column ``columns`` on.

    ``keys`` ``[max_batch, H, slots, D]`` already contain the new keys, column ``n`` in slot ``n % slots``. ``texts`` ``[B, N]``
    is negative for padding. A summary is always computed from all keys of its page, so keys that were overwritten or rolled
    back leave nothing in it.
    """
    pages = summary.shape[2]
    count = min(-(-tokens // page) + 1, pages)
    first = (columns // page).clamp(max=pages - count)
    column = first * page + torch.arange(count * page, device=keys.device)
    new = keys[:batch].index_select(2, column % keys.shape[2])
    valid = _valid(column, columns + tokens, texts)
    at = first + torch.arange(count, device=keys.device)
    summary[:batch].index_copy_(2, at, summarize(new, valid, page, score))


@summarize_pages.register_fake
def _(*operands: Any) -> None:
    return None


def _valid(column: Tensor, stop: Tensor, texts: Tensor | None) -> Tensor:
    """Return which columns before ``stop`` hold a token that is not padding: bool ``[B | 1, n]``."""
    written = (column < stop).unsqueeze(0)
    return written if texts is None else written & (texts.index_select(1, column) >= 0)


def _select(new: SelectPages[Tensor]) -> None:
    kernels = triton_kernels() if new.q.is_cuda else None
    if kernels is not None and new.scores.shape[2] <= kernels.MOST_PAGES:
        kernels.launch_select_pages(new, always=new.how.every == 1)
        return
    _append(new)
    if kernels is not None:  # the kernels score any number of pages, but select only from as many as fit registers
        kernels.launch_score_pages(new)
    elif not _score(new):
        return
    batch = new.q.shape[0]
    count, index = choose(new.scores[:batch], new.classes, new.budget, new.table.shape[3])
    new.counts[:batch], new.table[:batch] = count.unsqueeze(2), index.unsqueeze(2)


def _append(new: SelectPages[Tensor]) -> None:
    """Append the token, and also quantize it if the buffers are tails."""
    if new.key_quantized is not None and new.value_quantized is not None:
        tails = (new.keys, new.values, new.key_quantized, new.value_quantized, None)
        append(Append(*tails, new.k, new.v, new.columns, new.texts, new.key_form, new.value_form, new.how.page, new.how.score))
        return
    for buffer, token in ((new.keys, new.k), (new.values, new.v)):
        buffer[: new.q.shape[0]].index_copy_(2, new.columns.view(1) % buffer.shape[2], token)


def _score(new: SelectPages[Tensor]) -> bool:
    """Summarize the newest page, and score all pages if scoring is due. Returns whether pages must be selected."""
    batch, how = new.q.shape[0], new.how
    summarize_pages(new.summary, new.keys, new.columns, new.texts, batch, 1, how.page, how.score)
    due = int(new.columns - new.anchor) % how.every == 0
    if due:
        scores = score_summaries(new.q.unflatten(1, (new.keys.shape[1], -1)).squeeze(3), new.summary[:batch], how.score)
        column = torch.arange(new.summary.shape[2] * how.page, device=new.keys.device)
        filled = alive(_valid(column, new.columns + 1, new.texts), how.page).unsqueeze(1)
        _note(new.scores, pool(scores, how.group, how.page_size // how.page, filled), new.columns // how.page_size)
    return due or bool(int(new.changed))


# Everything that a decode step does to a layer before attention: append a token and select pages. See ``SelectionState``.
select_pages = StructuredOp(
    "select_pages",
    SelectPages,
    _select,
    fake=lambda operands: None,
    mutates=("keys", "values", "summary", "scores", "counts", "table", "key_quantized", "value_quantized"),
)


def triton_kernels() -> ModuleType:
    """Import and return the Triton kernels. torch for CPU comes without Triton."""
    from sparse_compile.passes.kernels import page_scores

    return page_scores


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
    """Score pages as ``select_pages`` does, but by the keys themselves. This is exact, and it reads all keys."""
    column = torch.arange(keys.shape[2], device=keys.device)
    rows = q.unflatten(1, (keys.shape[1], -1)).squeeze(3)
    by_head = score_keys(rows, keys[: q.shape[0]], _valid(column, columns + 1, texts), page)
    pooled = pool(by_head, group, page_size // page)
    due = (columns - anchor) % every == 0
    _note(scores, torch.where(due, pooled, scores[: q.shape[0]]), torch.where(due, columns // page_size, scores.shape[2]))


@score_pages_by_keys.register_fake
def _(*operands: Any) -> None:
    return None


def _note(scores: Tensor, pooled: Tensor, newest: Tensor) -> None:
    """Write new scores. The newest page and the pages after it get inf, which ranks above all others."""
    later = torch.arange(scores.shape[2], device=scores.device) >= newest
    scores[: pooled.shape[0]] = pooled.masked_fill(later, torch.inf)


@torch.library.custom_op("sparse_compile::page_classes", mutates_args=())
def page_classes(
    mask: str, heads: int, columns: Tensor, captures: list[Tensor], page_size: int, pages: int, compare: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Classify each page for the query at column ``columns``: int8 ``[B | 1, H | 1, pages]``.

    | class     | pages                                                                             |
    |-----------|-----------------------------------------------------------------------------------|
    | `KEPT`    | the query's own page, and pages with a key that the static part of ``mask`` shows |
    | `OFFERED` | other pages with a key that ``mask`` may show                                     |
    | `HIDDEN`  | all other pages                                                                   |

    Returns the positions of the first query and key (int32 ``[1]`` each), the classes, and whether the classes differ from
    those at the column before (int32 ``[1]``). The last is always 1 without ``compare``, or if ``mask`` reads tensors.
    """
    return in_few_kernels(_page_classes, from_text(mask), heads, columns, captures, page_size, pages, compare)


def _page_classes(
    tree: Mask, heads: int, columns: Tensor, captures: list[Tensor], page_size: int, pages: int, compare: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (batch_of(captures), heads, pages, page_size)
    first_query, first_key = starts(0, 0, columns, columns.device)
    classes = _classes(tree, captures, first_query, first_key, shape)
    changed = torch.ones(1, dtype=torch.int32, device=columns.device)
    if compare and not tree.captures():  # captured tensors may have changed since the last step
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
    bound = bind(mask, tensor_names(mask), captures, query, first_key)
    if shape[1] > 1:
        bound = bound.for_heads(shape[1])
    may, must = (_shown(part, shape, query) for part in (offered(bound), static_part(bound)))
    newest = torch.arange(shape[2], device=query.device) == query // shape[3]
    return torch.where(must | newest, KEPT, torch.where(may, OFFERED, HIDDEN)).to(torch.int8)


def _shown(mask: Mask, shape: tuple[int, int, int, int], at: Tensor) -> Tensor:
    """Return which pages hold a key that the query ``at`` sees, bool ``[batch, heads, pages]``.

    ``shape`` is (batch, heads, pages, keys of a page).
    """
    batch, heads, pages, page_size = shape
    bounds = mask.bounds(at, at)
    if bounds.certain:  # a few numbers for each page, not for each key
        start = torch.arange(pages, device=at.device) * page_size
        visible = bounds.maybe.overlap(start, start + page_size) > 0
        return visible.view(*visible.shape[:-2] or (1, 1), pages).expand(batch, heads, pages)
    b = torch.arange(batch, device=at.device).view(-1, 1, 1)
    h = torch.arange(heads, device=at.device).view(1, -1, 1)
    seen = torch.as_tensor(mask(b, h, at, torch.arange(pages * page_size, device=at.device)))
    shown: Tensor = seen.expand(batch, heads, -1).unflatten(2, (pages, page_size)).any(dim=3)
    return shown


@torch.library.custom_op("sparse_compile::pick_pages", mutates_args=())
def pick_pages(
    scores: Tensor, classes: Tensor, columns: Tensor, rows: list[int], batch: int, budget: int, width: int, page_size: int
) -> tuple[Tensor, Tensor]:
    """Select the pages that each head reads, as ``choose`` does.

    Returns a block table of one query block: counts int32 ``[B, H, 1]`` and pages int32 ``[B, H, 1, width]``. ``rows`` are the
    indices of the heads in ``scores`` ``[max_batch, *, pages]``. ``classes`` hide the pages beyond column ``columns``.
    """
    if rows != list(range(scores.shape[1])):
        scores = torch.cat([scores[:, slice(*run)] for run in consecutive(rows)], dim=1)
    picks = triton_picks() if scores.is_cuda else None
    if picks is not None and scores.shape[2] <= picks.MOST_PAGES:
        sizes = {"batch": batch, "budget": budget, "width": width, "page_size": page_size}
        picked: tuple[Tensor, Tensor] = picks.pick_pages(scores, classes, columns, **sizes)
        return picked
    count, index = choose(scores[:batch], classes, budget, width)
    return count.unsqueeze(2), index.unsqueeze(2)


@pick_pages.register_fake
def _(
    scores: Tensor, classes: Tensor, columns: Tensor, rows: list[int], batch: int, budget: int, width: int, page_size: int
) -> tuple[Tensor, Tensor]:
    size = (batch, len(rows), 1)
    return scores.new_empty(size, dtype=torch.int32), scores.new_empty(*size, width, dtype=torch.int32)


def triton_picks() -> ModuleType:
    """Import and return the Triton kernels of page selection. torch for CPU comes without Triton."""
    from sparse_compile.passes.kernels import topk_pages

    return topk_pages
