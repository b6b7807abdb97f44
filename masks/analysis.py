"""Find which past keys a mask can still show, and thus which keys a cache has to hold."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from sparse_compile.masks.mask import Mask
from sparse_compile.masks.patterns.positional import causal
from sparse_compile.masks.unknown_tensors import without_tensors

# The first positions of a text, which are all checked. In longer texts, up to as many again are sampled evenly.
ASKED = 1 << 20


class Past(NamedTuple):
    """Queries see only the first ``sink`` keys and the last ``recent`` keys, including their own."""

    sink: int
    recent: int


@lru_cache(maxsize=1024)
def visible_past(mask: Mask, length: int) -> Past | None:
    """Return the smallest (sink, recent) that covers every key ``causal & mask`` shows, or None if all keys are needed.

    The text has ``length`` positions. The result follows from the bounds of single queries and not from known patterns, so
    ``chunked(n)`` and ``dilated(n, step)`` also have a limited past, as a window does. Parts that read tensors count as
    visible. The mask must be the same for all heads.

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
    # An interval that starts at 0 and ends before the query is a sink. All keys beyond the sink have to be recent.
    heads = exists & (start == 0) & (stop < end)
    sink = int(torch.where(heads, stop, 0).max())
    rest = exists & (stop > sink)
    recent = int(torch.where(rest, end - start.clamp(min=sink), 0).max())
    return Past(sink, recent) if sink + recent < length else None
