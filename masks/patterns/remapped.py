"""Masks over keys that are not stored in text order, as a kernel finds them in a cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_compile.masks.bounds import Bounds
from sparse_compile.masks.captured import Captured
from sparse_compile.masks.intervals import INF, Edge, Intervals
from sparse_compile.masks.mask import Index
from sparse_compile.masks.patterns.tensor import INTEGERS, TensorLike, capture, look_up
from sparse_compile.masks.patterns.wrapped import Wrapped, bounds_anywhere


@dataclass(frozen=True, repr=False)
class Remapped(Wrapped):
    """Apply ``mask`` at remapped positions: pair ``(i, j)`` is visible if ``mask`` shows ``(queries[b, i], keys[b, j])``.

    ``queries`` ``[B, Q]`` and ``keys`` ``[B, KV]`` are integer tensors of text positions. Queries and keys with a negative
    position are in no visible pair. With ``ordered``, positions must ascend, apart from negative ones, and block tables are
    tight. Without it, every block is visited.

        >>> print(remapped(causal, [[1, 2]], [[2, -1, 0]]).draw(2, 3))
        ··█
        █·█
    """

    queries: TensorLike
    keys: TensorLike
    ordered: bool = False
    name: ClassVar[str] = "remapped"

    def __post_init__(self) -> None:
        capture(self, "queries", 2, "[batch, queries]", INTEGERS)
        capture(self, "keys", 2, "[batch, keys]", INTEGERS)

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        i = look_up(Captured.of(self.queries).tensor, b, q_idx)
        j = look_up(Captured.of(self.keys).tensor, b, kv_idx)
        return (i >= 0) & (j >= 0) & self.mask.__call__(b, h, i, j)

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        if not self.ordered:
            return Bounds(Intervals.everything(lo), Intervals.nothing(lo))
        queries, keys = _Ascending(Captured.of(self.queries).tensor), _Ascending(Captured.of(self.keys).tensor)
        first, last, whole = queries.over(lo, hi)  # [B, 1, rows]
        inner = bounds_anywhere(self.mask, first, last)
        maybe = keys.places(inner.maybe, some=first <= last)
        return Bounds(maybe, keys.places(inner.surely, some=whole, all_of_them=True))

    def sizes(self) -> tuple[int, int]:
        return Captured.of(self.queries).tensor.shape[0], self.mask.sizes()[1]

    def check(self, batch: int, heads: int, q_len: int, kv_len: int, q_offset: int = 0) -> None:
        """Check only the head count: the positions that ``mask`` sees do not follow from the lengths of the attention."""
        self.mask.check(1, heads, 1, 1)


class _Ascending:
    """Positions ``[B, n]`` that ascend, apart from negative ones in between, which are ignored."""

    def __init__(self, at: Tensor) -> None:
        at = at.long()
        valid = at >= 0
        self.reached = at.cummax(dim=1).values  # the largest position up to each place
        ahead = torch.where(valid, at, INF).flip(1).cummin(dim=1).values.flip(1)  # the next position from each place on
        self.ahead = ahead
        self.count = torch.nn.functional.pad(valid.cumsum(dim=1), (1, 0))  # valid positions before each place: [B, n + 1]

    def over(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first and last position of each run of places, and whether no position is negative: ``[B, 1, rows]``."""
        last_place = self.reached.shape[1] - 1
        lo, hi = lo.clamp(0, last_place), hi.clamp(0, last_place)
        whole = self.count[:, hi + 1] - self.count[:, lo] == hi - lo + 1
        return self.ahead[:, lo].unsqueeze(1), self.reached[:, hi].unsqueeze(1), whole.unsqueeze(1)

    def places(self, seen: Intervals, *, some: Tensor, all_of_them: bool = False) -> Intervals:
        """Return the places whose positions are in ``seen``, and none in rows where ``some`` is False.

        ``all_of_them`` drops runs of places that contain a negative position.
        """
        start, stop = [self._first(edge) for edge, _ in seen.columns], [self._first(edge) for _, edge in seen.columns]
        edges = torch.broadcast_tensors(*start, *stop)
        starts, stops = torch.stack(edges[: len(start)], dim=-1), torch.stack(edges[len(start) :], dim=-1)
        keep = some.unsqueeze(-1).expand(starts.shape[0], starts.shape[1], *some.shape[2:], starts.shape[3])
        starts, stops = starts.expand(keep.shape), stops.expand(keep.shape)
        if all_of_them:
            rows = self.count.view(self.count.shape[0], 1, 1, -1).expand(*starts.shape[:-1], -1)
            keep = keep & (rows.gather(-1, stops) - rows.gather(-1, starts) == stops - starts)
        return Intervals.stacked(starts, torch.where(keep, stops, starts))

    def _first(self, edge: Edge) -> Tensor:
        """Return the first place whose position is at or beyond ``edge``: ``[B, H|1, rows|1]``."""
        batch = self.reached.shape[0]
        if isinstance(edge, int):
            edge = torch.full((batch, 1, 1), edge, device=self.reached.device)
        edge = edge.clamp(min=0).expand(batch, *edge.shape[1:])
        place: Tensor = torch.searchsorted(self.reached, edge.reshape(batch, -1).contiguous())
        return place.view(edge.shape)


@dataclass(frozen=True, repr=False)
class Relaxed(Wrapped):
    """Every query sees all keys from ``start[b]`` on, and the keys that ``mask`` shows to position ``start[b] - 1``.

    DuoAttention prefills its streaming heads this way: each chunk of queries sees the sink, the window before the chunk, and
    itself (variant D in the code of https://arxiv.org/abs/2410.10819). ``start`` is an integer tensor ``[B]``. Combine it
    with ``causal`` to hide later keys.

        >>> print((causal & relaxed(sliding_window(1), [2])).draw(4, 4))
        ····
        ·█··
        ·██·
        ·███
    """

    start: TensorLike
    name: ClassVar[str] = "relaxed"

    def __post_init__(self) -> None:
        capture(self, "start", 1, "[batch]", INTEGERS)

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        start = look_up(Captured.of(self.start).tensor, b)
        return (kv_idx >= start) | self.mask.__call__(b, h, start - 1 + q_idx * 0, kv_idx)

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        start = Captured.of(self.start).tensor.long().view(-1, 1, 1) + lo * 0
        chunk, before = Intervals.of(start, INF), start - 1
        return Bounds(chunk, chunk) | bounds_anywhere(self.mask, before, before)

    def sizes(self) -> tuple[int, int]:
        return Captured.of(self.start).tensor.shape[0], self.mask.sizes()[1]


remapped = Remapped
relaxed = Relaxed
