"""Sets of keys as sorted, disjoint intervals, one per (batch, head, run of queries), computed without host syncs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Means "no limit". It is far beyond any position, yet small enough that adding positions to it cannot overflow int64.
INF = 1 << 60

Edge = int | Tensor  # int64, broadcasts to [B|1, H|1, rows]


@dataclass(frozen=True, eq=False)
class Intervals:
    """Half-open intervals ``[start, stop)`` of key positions in columns, with ``start <= stop <= start of the next column``.

    An edge is an int if it is the same for all rows. Arithmetic on ints needs no kernel launch, and launches dominate the
    cost of small tables on an accelerator. ``rows`` is any tensor whose last axis has one entry per row. The number of
    columns depends only on how the set was written, never on data, so no operation below waits for the device.
    """

    columns: tuple[tuple[Edge, Edge], ...]
    rows: Tensor

    @staticmethod
    def of(start: Edge, stop: Edge, rows: Tensor | None = None) -> Intervals:
        """Return one interval per row, empty where ``stop <= start``. ``rows`` is required if both edges are ints."""
        if rows is None:
            rows = start if isinstance(start, Tensor) else stop if isinstance(stop, Tensor) else None
        assert rows is not None, "two int edges need the rows tensor"
        return Intervals(((start, larger(start, stop)),), rows)

    @staticmethod
    def stacked(start: Tensor, stop: Tensor) -> Intervals:
        """Build a set from sorted, disjoint intervals along the last axis: ``[B|1, H|1, rows, n]`` each."""
        start, stop = torch.broadcast_tensors(start, stop)
        return Intervals(tuple(zip(start.unbind(-1), stop.unbind(-1), strict=True)), start[..., 0])

    @staticmethod
    def everything(rows: Tensor) -> Intervals:
        """Return the set of all keys for each of the rows ``[..., rows]``."""
        return Intervals(((-INF, INF),), rows)

    @staticmethod
    def nothing(rows: Tensor) -> Intervals:
        """Return the empty set for each of the rows ``[..., rows]``."""
        return Intervals(((0, 0),), rows)

    @cached_property
    def start(self) -> Tensor:
        """The starts of all intervals: int64 ``[..., rows, n]``."""
        return self._side(0)

    @cached_property
    def stop(self) -> Tensor:
        """The ends (exclusive) of all intervals: int64 ``[..., rows, n]``."""
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
        unordered = Intervals(tuple(met), rows)
        ordered = normalize(unordered.start, unordered.stop)
        # Lists of n and m disjoint intervals have at most n + m - 1 non-empty intersections, and empty ones are last.
        return Intervals(ordered.columns[: len(self.columns) + len(other.columns) - 1], ordered.rows)

    def __or__(self, other: Intervals) -> Intervals:
        rows = self.rows if self.rows.dim() >= other.rows.dim() else other.rows
        columns = (*self.columns, *other.columns)
        if len(columns) == 2:
            for (start, stop), (later, end) in (columns, columns[::-1]):
                if isinstance(start, int) and start == -INF:  # it begins before any other interval
                    later = larger(later, stop)
                    return Intervals(((start, stop), (later, larger(later, end))), rows)
        unordered = Intervals(columns, rows)
        return normalize(unordered.start, unordered.stop)

    def __invert__(self) -> Intervals:
        starts = (-INF, *(stop for _, stop in self.columns))
        stops = (*(start for start, _ in self.columns), INF)
        return Intervals(tuple(zip(starts, stops, strict=True)), self.rows)

    def __sub__(self, shift: Edge) -> Intervals:
        """Return the set moved down by ``shift``."""
        if isinstance(shift, int) and shift == 0:
            return self
        return Intervals(tuple((_moved(a, shift), _moved(b, shift)) for a, b in self.columns), self.rows)

    def overlap(self, start: Tensor, stop: Tensor) -> Tensor:
        """Count the keys of ``[start, stop)`` (each ``[..., rows, w]``) that belong to the set: ``[..., rows, w]``."""
        total = torch.zeros((), dtype=start.dtype, device=start.device)
        for low, high in self.columns:
            total = total + torch.sub(smaller(column_of(high), stop), larger(column_of(low), start)).clamp(min=0)
        return total

    def clamp(self, low: int, high: int) -> Intervals:
        """Return the part of the set within ``[low, high)``."""
        return Intervals(tuple((_within(a, low, high), _within(b, low, high)) for a, b in self.columns), self.rows)

    def count(self) -> Tensor:
        """Return the number of keys in each set: ``[B|1, H|1, rows]``."""
        return (self.stop - self.start).sum(-1)


def larger(a: Edge, b: Edge) -> Edge:
    """Return the larger of two edges."""
    if isinstance(a, int) and isinstance(b, int):
        return max(a, b)
    if isinstance(a, int):
        a, b = b, a
    assert isinstance(a, Tensor)
    if isinstance(b, int):
        return a if b == -INF else INF if b == INF else a.clamp(min=b)
    return torch.maximum(a, b)


def smaller(a: Edge, b: Edge) -> Edge:
    """Return the smaller of two edges."""
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


def column_of(edge: Edge) -> Edge:
    """Return an edge with an axis for the blocks that it is compared with."""
    return edge if isinstance(edge, int) else edge.unsqueeze(-1)


def normalize(start: Tensor, stop: Tensor) -> Intervals:
    """Sort intervals ``[..., rows, n]`` and cut off overlaps with earlier ones. Empty ones go last and can be dropped there."""
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
    """Join sets of single heads ``[B|1, 1, rows]`` into one set ``[B, H, rows]``. Heads may share a set object."""
    widest = max(len(s.columns) for s in sets)
    lead = torch.broadcast_shapes(*(s.start.shape[:-1] for s in sets))

    def fit(x: Tensor) -> Tensor:
        x = x.expand(*lead, -1)
        x = x[None, None] if x.dim() == 2 else x  # [rows, n]: the same for all batch rows
        missing = widest - x.shape[-1]
        return torch.nn.functional.pad(x, (0, missing), value=INF) if missing else x

    fitted = {id(s): (fit(s.start), fit(s.stop)) for s in sets}
    starts, stops = zip(*(fitted[id(s)] for s in sets), strict=True)
    return Intervals.stacked(torch.cat(starts, dim=1), torch.cat(stops, dim=1))
