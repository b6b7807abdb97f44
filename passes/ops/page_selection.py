"""The state of page selection while a compiled graph runs: pages are described as keys arrive, scored and chosen.

The ops are opaque: what they keep is written in place, and on CUDA one or two Triton kernels do all the work of a step. Nothing
here waits for the device. What an op writes comes first: the passes ask no further (``graph.writers``).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sparse_compile.masks.selection.page_scoring import alive, choose, describe, pool, score_digests, score_keys
from sparse_compile.passes.ops.quantized_append import PARTS, appending
from sparse_compile.passes.storage.codec import Codes, Format


@torch.library.custom_op("sparse_compile::describe_pages", mutates_args=("digest",))
def describe_pages(
    digest: Tensor, keys: Tensor, columns: Tensor, texts: Tensor | None, batch: int, tokens: int, page: int, score: str
) -> None:
    """Describe anew every page that ``tokens`` new tokens from column ``columns`` on went to, from the keys that are there.

    ``keys`` ``[max_batch, H, slots, D]`` has the new ones, column ``n`` in slot ``n % slots``; ``texts`` ``[B, N]`` is negative
    for padding. A digest is always that of all keys of its page, so nothing that was overwritten or taken back is left in it.
    """
    pages = digest.shape[2]
    count = min(-(-tokens // page) + 1, pages)
    first = (columns // page).clamp(max=pages - count)
    column = first * page + torch.arange(count * page, device=keys.device)
    new = keys[:batch].index_select(2, column % keys.shape[2])
    valid = _valid(column, columns + tokens, texts)
    at = first + torch.arange(count, device=keys.device)
    digest[:batch].index_copy_(2, at, describe(new, valid, page, score))


@describe_pages.register_fake
def _(*operands: Any) -> None:
    return None


def _valid(column: Tensor, stop: Tensor, texts: Tensor | None) -> Tensor:
    """Which columns hold a token: bool ``[B | 1, n]``."""
    there = (column < stop).unsqueeze(0)
    return there if texts is None else there & (texts.index_select(1, column) >= 0)


CHOICE = ("keys", "values", "digest", "scores", "counts", "table")


@torch.library.custom_op("sparse_compile::select_pages", mutates_args=(*CHOICE, *PARTS))
def select_pages(
    keys: Tensor,
    values: Tensor,
    digest: Tensor,
    scores: Tensor,
    counts: Tensor,
    table: Tensor,
    key_data: Tensor | None,
    key_scale: Tensor | None,
    key_offset: Tensor | None,
    value_data: Tensor | None,
    value_scale: Tensor | None,
    value_offset: Tensor | None,
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
    key_form: str,
    value_form: str,
) -> None:
    """All that a decode step does to a layer before it attends: append a token, and choose pages; see ``Choice``.

    ``q`` is ``[B, Hq, 1, D]``; ``k`` and ``v`` go to slot ``columns % slots`` of ``keys`` and ``values``
    ``[max_batch, H, slots, D]``, and the page is described anew; where these are tails, the codes of ``append_codes`` follow
    the table. Every ``every`` steps from ``anchor`` on all earlier pages are scored; its own page and those to come rank above
    every score until the next time. Pages are chosen when they were scored, and when ``changed`` says so of ``classes``.
    """
    how: dict[str, Any] = {"page_size": page_size, "page": page, "score": score, "group": group, "every": every}
    codes, forms = None, (Format.from_text(key_form), Format.from_text(value_form))
    if key_data is not None and value_data is not None:
        codes = Codes(key_data, key_scale, key_offset), Codes(value_data, value_scale, value_offset)
    batch, kernels = q.shape[0], triton_kernels() if q.is_cuda else None
    if kernels is not None and scores.shape[2] <= kernels.MOST_PAGES:
        state = (keys, values, digest, scores, counts, table)
        told = (classes, columns, anchor, changed if every > 1 else None, texts)
        kernels.select_pages(q, k, v, *state, *told, codes, forms, **how, budget=budget)
        return
    if codes is not None:
        appending(k)(keys, values, *codes, None, k, v, columns, texts, *forms, page, score)
    else:
        for buffer, new in ((keys, k), (values, v)):
            buffer[:batch].index_copy_(2, columns.view(1) % buffer.shape[2], new)
    if kernels is not None:  # it scores any number of pages, and picks from no more than its registers hold
        kernels.score_pages(q, keys, digest, scores, columns, anchor, texts, **how)
    else:
        describe_pages(digest, keys, columns, texts, batch, 1, page, score)
        due = int(columns - anchor) % every == 0
        if not due and not int(changed):
            return
        if due:
            found = score_digests(q.unflatten(1, (keys.shape[1], -1)).squeeze(3), digest[:batch], score)
            column = torch.arange(digest.shape[2] * page, device=keys.device)
            heard = alive(_valid(column, columns + 1, texts), page).unsqueeze(1)
            _note(scores, pool(found, group, page_size // page, heard), columns // page_size)
    count, index = choose(scores[:batch], classes, budget, table.shape[3])
    counts[:batch], table[:batch] = count.unsqueeze(2), index.unsqueeze(2)


def triton_kernels() -> ModuleType:
    """The Triton kernels, which torch for CPU comes without."""
    from sparse_compile.passes.kernels import page_scores

    return page_scores


@select_pages.register_fake
def _(*operands: Any) -> None:
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
def _(*operands: Any) -> None:
    return None


def _note(scores: Tensor, pooled: Tensor, newest: Tensor) -> None:
    """Write new scores, and one above all others for the newest page and those to come."""
    later = torch.arange(scores.shape[2], device=scores.device) >= newest
    scores[: pooled.shape[0]] = pooled.masked_fill(later, torch.inf)
