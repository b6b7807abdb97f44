"""Sets of keys as sorted, disjoint intervals: one set per (batch, head, run of queries), all at once and without host syncs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Stands for "no limit". Far beyond any position, and small enough that adding positions to it cannot overflow int64.
INF = 1 << 60

Edge = int | Tensor  # int64, broadcasts to [B|1, H|1, rows]


@dataclass(frozen=True, eq=False)
class Intervals:
    """Half-open intervals ``[start, stop)`` of key positions, in columns: ``start <= stop <= start of the next``.

    An edge is an int where it is the same for all rows: such arithmetic costs no kernel launch, and launches are what small
    tables cost on an accelerator. ``rows`` is any tensor whose last axis are the rows. The number of columns depends only on
    how the set was written, never on data, so nothing below waits for the device.
    """

    columns: tuple[tuple[Edge, Edge], ...]
    rows: Tensor

    @staticmethod
    def of(start: Edge, stop: Edge, rows: Tensor | None = None) -> Intervals:
        """One interval per row; empty where ``stop <= start``. ``rows`` is needed if both are ints."""
        if rows is None:
            rows = start if isinstance(start, Tensor) else stop if isinstance(stop, Tensor) else None
        assert rows is not None, "the rows of a set need a tensor"
        return Intervals(((start, larger(start, stop)),), rows)

    @staticmethod
    def stacked(start: Tensor, stop: Tensor) -> Intervals:
        """Sorted, disjoint intervals side by side on the last axis: ``[B|1, H|1, rows, n]`` each."""
        start, stop = torch.broadcast_tensors(start, stop)
        return Intervals(tuple(zip(start.unbind(-1), stop.unbind(-1), strict=True)), start[..., 0])

    @staticmethod
    def everything(rows: Tensor) -> Intervals:
        """All keys, for each of the rows ``[..., rows]``."""
        return Intervals(((-INF, INF),), rows)

    @staticmethod
    def nothing(rows: Tensor) -> Intervals:
        """No key, for each of the rows ``[..., rows]``."""
        return Intervals(((0, 0),), rows)

    @cached_property
    def start(self) -> Tensor:
        """int64 ``[..., rows, n]``."""
        return self._side(0)

    @cached_property
    def stop(self) -> Tensor:
        """int64 ``[..., rows, n]``."""
        return self._side(1)

    def _side(self, side: int) -> Tensor:
        tensors = [edge for column in self.columns for edge in column if isinstance(edge, Tensor)]
        shape = torch.broadcast_shapes(self.rows.shape, *(edge.shape for edge in tensors))
        edges = [column[side] for column in self.columns]
        rows = [torch.full(shape, e, device=self.rows.device) if isinstance(e, int) else e.expand(shape) for e in edges]
        return torch.stack(rows, dim=-1)

    def __and__(self, other: Intervals) -> Intervals:
        rows = self.rows if self.rows.dim() >= other.rows.dim() else other.rows
        met = [(start := larger(a[0], b[0]), larger(start, smaller(a[1], b[1]))) for a in self.columns for b in other.columns]
        if min(len(self.columns), len(other.columns)) == 1:
            return Intervals(tuple(met), rows)
        found = Intervals(tuple(met), rows)
        ordered = normalise(found.start, found.stop)
        # Two disjoint lists of n and m intervals meet in at most n + m - 1 places; empty ones are last.
        return Intervals(ordered.columns[: len(self.columns) + len(other.columns) - 1], ordered.rows)

    def __or__(self, other: Intervals) -> Intervals:
        rows = self.rows if self.rows.dim() >= other.rows.dim() else other.rows
        columns = (*self.columns, *other.columns)
        if len(columns) == 2:
            for (start, stop), (later, end) in (columns, columns[::-1]):
                if isinstance(start, int) and start == -INF:  # surely the first of the two
                    later = larger(later, stop)
                    return Intervals(((start, stop), (later, larger(later, end))), rows)
        found = Intervals(columns, rows)
        return normalise(found.start, found.stop)

    def __invert__(self) -> Intervals:
        starts = (-INF, *(stop for _, stop in self.columns))
        stops = (*(start for start, _ in self.columns), INF)
        return Intervals(tuple(zip(starts, stops, strict=True)), self.rows)

    def __sub__(self, shift: Edge) -> Intervals:
        """The set moved down by ``shift``."""
        if isinstance(shift, int) and shift == 0:
            return self
        return Intervals(tuple((_moved(a, shift), _moved(b, shift)) for a, b in self.columns), self.rows)

    def overlap(self, start: Tensor, stop: Tensor) -> Tensor:
        """How many keys of ``[start, stop)`` (each ``[..., rows, w]``) belong to the set: ``[..., rows, w]``."""
        total = torch.zeros((), dtype=start.dtype, device=start.device)
        for low, high in self.columns:
            total = total + torch.sub(smaller(_column(high), stop), larger(_column(low), start)).clamp(min=0)
        return total

    def clamp(self, low: int, high: int) -> Intervals:
        """The part of the set within ``[low, high)``."""
        return Intervals(tuple((_within(a, low, high), _within(b, low, high)) for a, b in self.columns), self.rows)

    def count(self) -> Tensor:
        """The number of keys in each set: ``[B|1, H|1, rows]``."""
        return (self.stop - self.start).sum(-1)


def larger(a: Edge, b: Edge) -> Edge:
    """The larger of two edges."""
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    if isinstance(a, int):
        a, b = b, a
    assert isinstance(a, Tensor)
    if isinstance(b, int):
        return a if b == -INF else INF if b == INF else a.clamp(min=b)
    return torch.maximum(a, b)


def smaller(a: Edge, b: Edge) -> Edge:
    """The smaller of two edges."""
    if isinstance(a, int) and isinstance(b, int):
        return min(a, b)
    if isinstance(a, int):
        a, b = b, a
    assert isinstance(a, Tensor)
    if isinstance(b, int):
        return a if b == INF else -INF if b == -INF else a.clamp(max=b)
    return torch.minimum(a, b)


def _moved(edge: Edge, shift: Edge) -> Edge:
    return edge if isinstance(edge, int) and abs(edge) == INF else edge - shift


def _within(edge: Edge, low: int, high: int) -> Edge:
    return edge.clamp(low, high) if isinstance(edge, Tensor) else min(max(edge, low), high)


def _column(edge: Edge) -> Edge:
    return edge if isinstance(edge, int) else edge.unsqueeze(-1)


def normalise(start: Tensor, stop: Tensor) -> Intervals:
    """Sort intervals ``[..., rows, n]`` and cut what overlaps an earlier one. Empty ones go last and can be dropped there."""
    start, stop = torch.broadcast_tensors(start, stop)
    if start.shape[-1] == 1:
        return Intervals.stacked(start, torch.maximum(start, stop))
    empty = stop <= start
    start = torch.where(empty, INF, start)
    stop = torch.where(empty, INF, stop)
    start, order = start.sort(dim=-1)
    reached = stop.gather(-1, order).cummax(dim=-1).values
    start = torch.cat([start[..., :1], torch.maximum(start[..., 1:], reached[..., :-1])], dim=-1)
    return Intervals.stacked(start, torch.maximum(start, reached))


def beside(sets: Sequence[Intervals]) -> Intervals:
    """Sets of single heads ``[B|1, 1, rows]`` side by side: ``[B, H, rows]``. Heads may share a set."""
    widest = max(len(s.columns) for s in sets)
    lead = torch.broadcast_shapes(*(s.start.shape[:-1] for s in sets))

    def fit(x: Tensor) -> Tensor:
        x = x.expand(*lead, -1)
        x = x[None, None] if x.dim() == 2 else x  # [rows, n]: the same for all batches
        missing = widest - x.shape[-1]
        return torch.nn.functional.pad(x, (0, missing), value=INF) if missing else x

    fitted = {id(s): (fit(s.start), fit(s.stop)) for s in sets}
    starts, stops = zip(*(fitted[id(s)] for s in sets), strict=True)
    return Intervals.stacked(torch.cat(starts, dim=1), torch.cat(stops, dim=1))


@dataclass(frozen=True, eq=False)
class Bounds:
    """What is known of the keys that a run of queries sees.

    ``maybe`` holds every key that some query of the run sees (it may hold more); ``surely`` holds only keys that all of
    them see (it may hold fewer). For single queries (``lo is hi``) the two are usually one object, computed once. ``&``,
    ``|`` and ``~`` follow Kleene's three-valued logic.
    """

    maybe: Intervals
    surely: Intervals

    @property
    def certain(self) -> bool:
        """Whether the two are known to be one."""
        return self.maybe is self.surely

    def __and__(self, other: Bounds) -> Bounds:
        maybe = self.maybe & other.maybe
        return Bounds(maybe, maybe if self.certain and other.certain else self.surely & other.surely)

    def __or__(self, other: Bounds) -> Bounds:
        maybe = self.maybe | other.maybe
        return Bounds(maybe, maybe if self.certain and other.certain else self.surely | other.surely)

    def __invert__(self) -> Bounds:
        hidden = ~self.maybe
        return Bounds(hidden if self.certain else ~self.surely, hidden)
