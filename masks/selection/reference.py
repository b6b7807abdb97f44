"""Select pages for one attention in slow, plain code: the reference for page selection."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.masks.mask import Mask, check_sizes, view
from sparse_compile.masks.operators import union
from sparse_compile.masks.patterns.per_head import PerHead
from sparse_compile.masks.patterns.tensor import Explicit
from sparse_compile.masks.selection.budget import check_pages
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
from sparse_compile.masks.selection.page_topk import PageTopK, choosing_together, has_selector, offered, static_part


@view
def selected(mask: Mask, q: Tensor, k: Tensor, *, q_offset: int, page_size: int, q_block: int, valid: Tensor | None) -> Mask:
    """See ``Mask.selected``."""
    if not has_selector(mask):
        return mask
    if q.dim() != 4 or k.dim() != 4 or q.shape[1] % k.shape[1] or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"selected needs q [B, Hq, Q, D] and k [B, Hkv, KV, D], got {list(q.shape)} and {list(k.shape)}")
    heads, kv_heads, kv_len = q.shape[1], k.shape[1], k.shape[2]
    if valid is not None and (valid.dim() != 2 or valid.shape[0] not in (1, q.shape[0]) or valid.shape[1] != kv_len):
        raise ValueError(f"selected needs valid [B, KV] for {q.shape[0]} rows of {kv_len} keys, got {list(valid.shape)}")
    check_sizes(q_offset=q_offset, page_size=page_size, q_block=q_block)
    valid = torch.ones(1, kv_len, dtype=torch.bool, device=k.device) if valid is None else valid.bool()
    group = heads // kv_heads
    seen_by: list[Mask] = [mask.for_head(head, heads) for head in range(heads)]
    for kv_head in range(kv_heads):
        in_group = slice(kv_head * group, (kv_head + 1) * group)
        selector, seen_by[in_group] = choosing_together(seen_by[in_group])
        if selector is None:
            continue
        whole = union(seen_by[in_group])
        kept = _kept(whole, selector, q[:, in_group], k[:, kv_head : kv_head + 1], valid, q_offset, page_size, q_block)
        chosen = Explicit(kept[..., :kv_len].unsqueeze(1), q_start=q_offset)
        seen_by[in_group] = [_replaced(head, chosen) for head in seen_by[in_group]]
    return seen_by[0] if len(set(seen_by)) == 1 else PerHead(seen_by)


def _kept(
    mask: Mask, selector: PageTopK, q: Tensor, k: Tensor, valid: Tensor, q_offset: int, page_size: int, q_block: int
) -> Tensor:
    """Return which keys the selected pages of one KV head hold: bool ``[B, Q, pages * page_size]``."""
    check_pages(selector, page_size)
    q_len, kv_len = q.shape[2], k.shape[2]
    pages = -(-kv_len // page_size)
    room = pages * page_size - kv_len
    k, valid = torch.nn.functional.pad(k, (0, 0, 0, room)), torch.nn.functional.pad(valid, (0, room))
    at = torch.arange(q_offset, q_offset + q_len, device=k.device)
    rows = []
    for first in range(0, q_len, q_block):
        last = min(first + q_block, q_len) - 1
        classes = torch.full((q.shape[0], pages), HIDDEN, device=k.device)
        for part, rank in ((offered(mask), OFFERED), (static_part(mask), KEPT)):
            classes = torch.where(_pages_of(part, at[first : last + 1], kv_len, pages, page_size), rank, classes)
        classes[:, int(at[first]) // page_size : int(at[last]) // page_size + 1] = KEPT
        mean = _mean(q[:, :, first : last + 1], valid, at[first : last + 1]).unsqueeze(1)  # [B, 1, G, D]
        if selector.score == "keys":
            scores = score_keys(mean, k, valid, selector.page)
        else:
            scores = score_summaries(mean, summarize(k, valid, selector.page, selector.score), selector.score)
        with_keys = alive(valid, selector.page).unsqueeze(1)
        pooled = pool(scores, selector.group, page_size // selector.page, with_keys)[:, 0]
        count, listed = choose(pooled, classes, -(-selector.tokens // page_size), pages)
        kept = torch.zeros(classes.shape, dtype=torch.bool, device=k.device)
        for row, (number, table) in enumerate(zip(count.tolist(), listed, strict=True)):
            kept[row, table[:number].long()] = True
        rows.append(kept.repeat_interleave(page_size, dim=1).unsqueeze(1).expand(-1, last - first + 1, -1))
    return torch.cat(rows, dim=1)


def _mean(q: Tensor, valid: Tensor, at: Tensor) -> Tensor:
    """Return the mean of the queries ``[B, G, n, D]`` that are not padding: fp32 ``[B, G, D]``. One query is its own mean."""
    if q.shape[2] == 1:
        return q.float().squeeze(2)
    counts = valid.index_select(1, at.clamp(max=valid.shape[1] - 1)).float()[:, None, :, None]  # [B | 1, 1, n, 1]
    mean: Tensor = (q.float() * counts).sum(dim=2) / counts.sum(dim=2).clamp(min=1)
    return mean


def _pages_of(mask: Mask, at: Tensor, kv_len: int, pages: int, page_size: int) -> Tensor:
    """Return which pages hold a key that any of the queries sees: bool ``[B | 1, pages]``."""
    batch, _ = mask.sizes()
    b = torch.arange(batch, device=at.device).view(-1, 1, 1)
    j = torch.arange(kv_len, device=at.device)
    seen = torch.as_tensor(mask(b, b * 0, at.view(1, -1, 1), j)).expand(batch, at.numel(), kv_len).any(dim=1)
    paged: Tensor = torch.nn.functional.pad(seen, (0, pages * page_size - kv_len)).unflatten(1, (pages, page_size))
    return paged.any(dim=2)


def _replaced(mask: Mask, chosen: Mask) -> Mask:
    if isinstance(mask, PageTopK):
        return chosen
    children = mask.children()
    return mask.rebuild([_replaced(child, chosen) for child in children]) if children else mask
