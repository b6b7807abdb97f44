"""Which keys a cache has to keep: what queries may still see of the past, asked of the mask itself."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from sparse_compile.masks.mask import Mask
from sparse_compile.masks.patterns.positional import causal
from sparse_compile.masks.unknown_tensors import without_tensors

# Positions that are asked one by one; of longer texts as many again, evenly spread.
ASKED = 1 << 20


class Past(NamedTuple):
    """Queries see no key but the first ``sink`` and the last ``recent``, their own included."""

    sink: int
    recent: int


@lru_cache(maxsize=1024)
def visible_past(mask: Mask, length: int) -> Past | None:
    """The least that ``causal & mask`` can do with in a text of ``length`` positions; None if that is no less than all.

    Found by asking for the bounds of single queries, not by knowing patterns: ``chunked(n)`` and ``dilated(n, step)`` forget as
    a window does. Parts that read tensors count as visible. The mask is the same for all heads.

        >>> visible_past(sink(4) | sliding_window(16), 1000)
        Past(sink=4, recent=16)
    """
    step = max(1, length // ASKED)
    at = torch.arange(min(length, ASKED))
    if step > 1:
        at = torch.cat([at, torch.arange(ASKED, length, step), torch.tensor([length - 1])])
    seen = (causal & without_tensors(mask)).bounds(at, at).maybe.clamp(0, length)
    start, stop = seen.start, seen.stop  # [positions, n]
    end = at.unsqueeze(-1) + 1
    exists = stop > start
    # What begins the text and does not reach the query is a sink; whatever lies beyond it has to be recent.
    heads = exists & (start == 0) & (stop < end)
    sink = int(torch.where(heads, stop, 0).max())
    rest = exists & (stop > sink)
    recent = int(torch.where(rest, end - start.clamp(min=sink), 0).max())
    return Past(sink, recent) if sink + recent < length else None
