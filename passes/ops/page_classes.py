"""Which pages a decode step reads: their classes under a mask, and the pick among scored pages."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from sparse_compile.masks import Mask
from sparse_compile.masks.patterns.per_head import consecutive
from sparse_compile.masks.selection.page_scoring import HIDDEN, KEPT, OFFERED, choose
from sparse_compile.masks.selection.page_topk import offered, static_part
from sparse_compile.passes.ops.block_tables import batch_of, bind, starts, tensor_names
from sparse_compile.passes.ops.small_steps import in_few_kernels
from sparse_compile.passes.storage.graph_text import from_text


@torch.library.custom_op("sparse_compile::page_classes", mutates_args=())
def page_classes(
    mask: str, heads: int, columns: Tensor, captures: list[Tensor], page_size: int, pages: int, compare: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What becomes of each page for the query at column ``columns``: int8 ``[B | 1, H | 1, pages]``.

    Kept are the query's own page and those of which the static part of ``mask`` shows a key, offered those of which it may show
    a key, hidden all others. The positions of the first query and key come first, int32 ``[1]``; last, whether the column
    before had other classes, int32 ``[1]`` (1 unless asked to ``compare``).
    """
    return in_few_kernels(_page_classes, from_text(mask), heads, columns, captures, page_size, pages, compare)


def _page_classes(
    tree: Mask, heads: int, columns: Tensor, captures: list[Tensor], page_size: int, pages: int, compare: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (batch_of(captures), heads, pages, page_size)
    first_query, first_key = starts(0, 0, columns, columns.device)
    classes = _classes(tree, captures, first_query, first_key, shape)
    changed = torch.ones(1, dtype=torch.int32, device=columns.device)
    if compare and not tree.captures():  # tensors may say today what they did not say yesterday
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
    """Which pages hold a key that the query ``at`` sees: bool ``[batch, heads, pages]``; ``shape`` ends in a page's keys."""
    batch, heads, pages, page_size = shape
    bounds = mask.bounds(at, at)
    if bounds.certain:  # a few numbers for each page, not for each key
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
    if scores.is_cuda and scores.shape[2] <= triton_picks().MOST_PAGES:
        sizes = {"batch": batch, "budget": budget, "width": width, "page_size": page_size}
        picked: tuple[Tensor, Tensor] = triton_picks().pick_pages(scores, classes, columns, **sizes)
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
    """The Triton kernels of the pick, which torch for CPU comes without."""
    from sparse_compile.passes.kernels import topk_pages

    return topk_pages
