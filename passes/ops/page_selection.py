"""The state of page selection while a compiled graph runs: pages are described as keys arrive, scored and chosen.

The ops are opaque: what they keep is written in place, and on CUDA one or two Triton kernels do all the work of a step. Nothing
here waits for the device. What an op writes comes first: the passes ask no further (``graph.writers``).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparse_compile.masks.selection.page_scoring import alive, choose, pool, score_keys, score_summaries, summarize
from sparse_compile.passes.kernels.operands import Append, SelectPages
from sparse_compile.passes.ops.quantized_append import append
from sparse_compile.passes.ops.structured import StructuredOp


@torch.library.custom_op("sparse_compile::describe_pages", mutates_args=("summary",))
def summarize_pages(
    summary: Tensor, keys: Tensor, columns: Tensor, texts: Tensor | None, batch: int, tokens: int, page: int, score: str
) -> None:
    """Describe anew every page that ``tokens`` new tokens from column ``columns`` on went to, from the keys that are there.

    ``keys`` ``[max_batch, H, slots, D]`` has the new ones, column ``n`` in slot ``n % slots``; ``texts`` ``[B, N]`` is negative
    for padding. A digest is always that of all keys of its page, so nothing that was overwritten or taken back is left in it.
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
    """Which columns hold a token: bool ``[B | 1, n]``."""
    there = (column < stop).unsqueeze(0)
    return there if texts is None else there & (texts.index_select(1, column) >= 0)


def _select(new: SelectPages[Tensor]) -> None:
    kernels = triton_kernels() if new.q.is_cuda else None
    if kernels is not None and new.scores.shape[2] <= kernels.MOST_PAGES:
        kernels.launch_select_pages(new, always=new.how.every == 1)
        return
    _append(new)
    if kernels is not None:  # it scores any number of pages, and picks from no more than its registers hold
        kernels.launch_score_pages(new)
    elif not _score(new):
        return
    batch = new.q.shape[0]
    count, index = choose(new.scores[:batch], new.classes, new.budget, new.table.shape[3])
    new.counts[:batch], new.table[:batch] = count.unsqueeze(2), index.unsqueeze(2)


def _append(new: SelectPages[Tensor]) -> None:
    """Append the token, and quantize it if the buffers are tails."""
    if new.key_quantized is not None and new.value_quantized is not None:
        tails = (new.keys, new.values, new.key_quantized, new.value_quantized, None)
        append(Append(*tails, new.k, new.v, new.columns, new.texts, new.key_form, new.value_form, new.how.page, new.how.score))
        return
    for buffer, token in ((new.keys, new.k), (new.values, new.v)):
        buffer[: new.q.shape[0]].index_copy_(2, new.columns.view(1) % buffer.shape[2], token)


def _score(new: SelectPages[Tensor]) -> bool:
    """Summarize the newest page, and score all pages when that is due; returns whether pages must be chosen."""
    batch, how = new.q.shape[0], new.how
    summarize_pages(new.summary, new.keys, new.columns, new.texts, batch, 1, how.page, how.score)
    due = int(new.columns - new.anchor) % how.every == 0
    if due:
        found = score_summaries(new.q.unflatten(1, (new.keys.shape[1], -1)).squeeze(3), new.summary[:batch], how.score)
        column = torch.arange(new.summary.shape[2] * how.page, device=new.keys.device)
        filled = alive(_valid(column, new.columns + 1, new.texts), how.page).unsqueeze(1)
        _note(new.scores, pool(found, how.group, how.page_size // how.page, filled), new.columns // how.page_size)
    return due or bool(int(new.changed))


# All that a decode step does to a layer before it attends: append a token, and choose pages; see ``SelectionState``.
select_pages = StructuredOp(
    "select_pages",
    SelectPages,
    _select,
    fake=lambda operands: None,
    mutates=("keys", "values", "summary", "scores", "counts", "table", "key_quantized", "value_quantized"),
)


def triton_kernels() -> ModuleType:
    """The Triton kernels, which torch for CPU comes without."""
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
    """Score pages as ``select_pages`` does, by the keys themselves: the exact choice, which reads all of them."""
    column = torch.arange(keys.shape[2], device=keys.device)
    rows = q.unflatten(1, (keys.shape[1], -1)).squeeze(3)
    found = score_keys(rows, keys[: q.shape[0]], _valid(column, columns + 1, texts), page)
    pooled = pool(found, group, page_size // page)
    due = (columns - anchor) % every == 0
    _note(scores, torch.where(due, pooled, scores[: q.shape[0]]), torch.where(due, columns // page_size, scores.shape[2]))


@score_pages_by_keys.register_fake
def _(*operands: Any) -> None:
    return None


def _note(scores: Tensor, pooled: Tensor, newest: Tensor) -> None:
    """Write new scores, and one above all others for the newest page and those to come."""
    later = torch.arange(scores.shape[2], device=scores.device) >= newest
    scores[: pooled.shape[0]] = pooled.masked_fill(later, torch.inf)
