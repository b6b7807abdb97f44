"""How many pairs a mask shows, exactly and without visiting them where its bounds already tell."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.masks.mask import Mask, check_sizes
from sparse_compile.masks.selectors import offered, selector_of

ROWS_AT_ONCE = 1 << 16
PAIRS_AT_ONCE = 1 << 24


def density(mask: Mask, q_len: int, kv_len: int, q_offset: int, batch: int | None, heads: int | None) -> float:
    """See ``Mask.density``."""
    default_batch, default_heads = mask.sizes()
    batch, heads = default_batch if batch is None else batch, default_heads if heads is None else heads
    check_sizes(q_offset=q_offset, q_len=q_len, kv_len=kv_len, batch=batch, heads=heads)
    mask.check(batch, heads, q_len, kv_len, q_offset)
    return _counted(mask, q_len, kv_len, q_offset, batch, heads)


def largest_density(mask: Mask, q_len: int, kv_len: int, q_offset: int, heads: int) -> float:
    """The density of a mask in which every selector takes its whole budget; without selectors, the density."""
    return _counted(mask, q_len, kv_len, q_offset, mask.sizes()[0], heads)


def _counted(mask: Mask, q_len: int, kv_len: int, q_offset: int, batch: int, heads: int) -> float:
    visible = 0
    for group, members in mask.head_groups(heads).items():
        selector = selector_of(group)
        shared = batch if group.sizes()[0] == 1 else 1
        most = kv_len if selector is None else min(selector.tokens, kv_len)
        visible += _visible(offered(group), q_len, kv_len, q_offset, most) * shared * len(members)
    return visible / (q_len * kv_len * batch * heads)


def _visible(mask: Mask, q_len: int, kv_len: int, q_offset: int, limit: int) -> int:
    """The visible pairs, no more than ``limit`` for each query."""
    total = 0
    for first in range(q_offset, q_offset + q_len, ROWS_AT_ONCE):
        rows = torch.arange(first, min(first + ROWS_AT_ONCE, q_offset + q_len))
        bounds = mask.bounds(rows, rows)
        most, least = bounds.maybe.clamp(0, kv_len).count(), bounds.surely.clamp(0, kv_len).count()
        most, least = most.expand(*mask.sizes(), -1), least.expand(*mask.sizes(), -1)
        certain = (most == least).flatten(0, -2).all(0)  # [rows]
        total += int(most[..., certain].clamp(max=limit).sum())
        total += _one_by_one(mask, rows[~certain], kv_len, limit)
    return total


def _one_by_one(mask: Mask, rows: Tensor, kv_len: int, limit: int) -> int:
    """Ask the mask about every pair of the given query positions."""
    batch, heads = mask.sizes()
    b = torch.arange(batch).view(-1, 1, 1, 1)
    h = torch.arange(heads).view(1, -1, 1, 1)
    j = torch.arange(kv_len)
    total = 0
    for part in rows.split(max(PAIRS_AT_ONCE // (kv_len * batch * heads), 1)):
        seen = torch.as_tensor(mask(b, h, part.view(1, 1, -1, 1), j))
        total += int(seen.expand(batch, heads, part.numel(), kv_len).sum(dim=-1).clamp(max=limit).sum())
    return total
