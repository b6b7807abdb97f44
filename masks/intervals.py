"""Sets of keys as sorted, disjoint intervals: one set per (batch, head, run of queries), all at once and without host syncs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Stands for "no limit". Far beyond any position, and small enough that adding positions to it cannot overflow int64.
INF = 1 << 60


@dataclass(frozen=True, eq=False)
class Intervals:
    """Half-open intervals ``[start, stop)`` of key positions, ascending and disjoint; empty ones have ``start == stop``.

    ``start`` and ``stop`` are int64 of shape ``[B|1, H|1, rows, n]``. The number of columns ``n`` depends only on how the
    set was written, never on data, so every operation below runs on an accelerator without asking it anything.
    """

    start: Tensor
    stop: Tensor

    @staticmethod
    def of(start: Tensor, stop: Tensor) -> Intervals:
        """One interval per row, from tensors that broadcast to ``[B, H, rows]``."""
        start, stop = torch.broadcast_tensors(start, stop)
        return Intervals(start.unsqueeze(-1), torch.maximum(start, stop).unsqueeze(-1))

    @staticmethod
    def everything(like: Tensor) -> Intervals:
        """All keys, for each of the rows of ``like`` ``[..., rows]``."""
        return Intervals.of(torch.full_like(like, -INF), torch.full_like(like, INF))

    @staticmethod
    def nothing(like: Tensor) -> Intervals:
        """No key, for each of the rows of ``like`` ``[..., rows]``."""
        return Intervals.of(torch.zeros_like(like), torch.zeros_like(like))

    def __and__(self, other: Intervals) -> Intervals:
        start = torch.maximum(self.start.unsqueeze(-1), other.start.unsqueeze(-2)).flatten(-2)
        stop = torch.minimum(self.stop.unsqueeze(-1), other.stop.unsqueeze(-2)).flatten(-2)
        # Two disjoint lists of n and m intervals meet in at most n + m - 1 places.
        most = self.start.shape[-1] + other.start.shape[-1] - 1
        met = normalise(start, stop)
        return Intervals(met.start[..., :most], met.stop[..., :most])

    def __or__(self, other: Intervals) -> Intervals:
        lead = torch.broadcast_shapes(self.start.shape[:-1], other.start.shape[:-1])
        start = torch.cat([s.start.expand(*lead, -1) for s in (self, other)], dim=-1)
        stop = torch.cat([s.stop.expand(*lead, -1) for s in (self, other)], dim=-1)
        return normalise(start, stop)

    def __invert__(self) -> Intervals:
        low = torch.full_like(self.start[..., :1], -INF)
        high = torch.full_like(self.start[..., :1], INF)
        return normalise(torch.cat([low, self.stop], dim=-1), torch.cat([self.start, high], dim=-1))

    def overlap(self, start: Tensor, stop: Tensor) -> Tensor:
        """How many keys of ``[start, stop)`` (each ``[..., rows, w]``) belong to the set: ``[..., rows, w]``."""
        total = torch.zeros((), dtype=torch.int64, device=start.device)
        for k in range(self.start.shape[-1]):
            shared = torch.minimum(self.stop[..., k, None], stop) - torch.maximum(self.start[..., k, None], start)
            total = total + shared.clamp(min=0)
        return total

    def clamp(self, low: int, high: int) -> Intervals:
        """The part of the set within ``[low, high)``."""
        return Intervals(self.start.clamp(low, high), self.stop.clamp(low, high))

    def count(self) -> Tensor:
        """The number of keys in each set: ``[B|1, H|1, rows]``."""
        return (self.stop - self.start).clamp(min=0).sum(-1)


def normalise(start: Tensor, stop: Tensor) -> Intervals:
    """Sort intervals and cut what overlaps an earlier one. Empty intervals go last, so columns can be dropped from the end."""
    start, stop = torch.broadcast_tensors(start, stop)
    empty = stop <= start
    start = torch.where(empty, INF, start)
    stop = torch.where(empty, INF, stop)
    start, order = start.sort(dim=-1)
    stop = stop.gather(-1, order)
    reached = stop.cummax(dim=-1).values
    before = torch.cat([torch.full_like(reached[..., :1], -INF), reached[..., :-1]], dim=-1)
    start = torch.maximum(start, before)
    return Intervals(start, torch.maximum(start, stop))


@dataclass(frozen=True, eq=False)
class Bounds:
    """What is known of the keys that a run of queries sees.

    ``maybe`` holds every key that some query of the run sees (it may hold more); ``surely`` holds only keys that all of
    them see (it may hold fewer). For a single query the two are usually equal. ``&``, ``|`` and ``~`` follow Kleene's
    three-valued logic.
    """

    maybe: Intervals
    surely: Intervals

    def __and__(self, other: Bounds) -> Bounds:
        return Bounds(self.maybe & other.maybe, self.surely & other.surely)

    def __or__(self, other: Bounds) -> Bounds:
        return Bounds(self.maybe | other.maybe, self.surely | other.surely)

    def __invert__(self) -> Bounds:
        return Bounds(~self.surely, ~self.maybe)
