"""Masks that repeat: by distance modulo a period, by position modulo a period, and anew in each chunk or document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_compile.masks.bounds import Bounds, Counted, Moved, Sieve
from sparse_compile.masks.captured import Captured
from sparse_compile.masks.intervals import INF, Intervals
from sparse_compile.masks.mask import Index, agree
from sparse_compile.masks.patterns.documents import Document, extent
from sparse_compile.masks.patterns.positional import Chunked, at_least
from sparse_compile.masks.patterns.tensor import INTEGERS, TensorLike, capture, check_batch, check_length, look_up
from sparse_compile.masks.patterns.wrapped import Wrapped, bounds_anywhere, check_inner


@dataclass(frozen=True, repr=False)
class Periodic(Wrapped):
    """Count distances modulo ``period``: ``i - j`` is visible if ``mask`` shows a distance with the same remainder.

    The two distances between ``-period`` and ``period`` count: with ``d = (i - j) % period``, ``mask`` has to show the pair
    ``(d, 0)`` or ``(0, -d % period)``. So ``periodic(chunked(1), n)`` sees every n-th key counted from the query (Sparse
    Transformer, https://arxiv.org/abs/1904.10509), and a window of both sides goes around the ends of a ring of ``period``.

        >>> print(periodic(dilated(2, 1), 4).draw(4, 8))
        ██·███·█
        ███·███·
        ·███·███
        █·███·██
    """

    period: int
    name: ClassVar[str] = "periodic"

    def __post_init__(self) -> None:
        check_inner(self)
        at_least("periodic period", self.period)

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        ahead, back = (q_idx - kv_idx) % self.period, (kv_idx - q_idx) % self.period
        return self.mask.__call__(b, h, ahead, ahead * 0) | self.mask.__call__(b, h, back * 0, back)

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        batch, heads = self.mask.sizes()
        b, h = torch.arange(batch, device=lo.device), torch.arange(heads, device=lo.device)
        distance = torch.arange(self.period, device=lo.device)
        shown = torch.as_tensor(self.__call__(b.view(-1, 1, 1), h.view(-1, 1), distance, distance * 0))
        count = pad(shown.long().expand(batch, heads, self.period).cumsum(dim=-1), (1, 0)).unsqueeze(2)  # [B, H, 1, period + 1]

        def below(distance: Tensor) -> Tensor:
            at = distance % self.period
            lead = torch.broadcast_shapes(count.shape[:-1], at.shape[:-1])
            rest = count.expand(*lead, -1).gather(-1, at.expand(*lead, -1))
            return distance // self.period * count[..., -1:] + rest

        return Bounds(Intervals.everything(lo), Intervals.nothing(lo), Counted(below, run=(lo, hi)))

    def check(self, batch: int, heads: int, q_len: int, kv_len: int, q_offset: int = 0) -> None:
        self.mask.check(batch, heads, self.period, self.period)


@dataclass(frozen=True, repr=False)
class Repeated(Wrapped):
    """Repeat ``mask`` every ``period`` queries and keys: pair ``(i, j)`` is visible if it shows ``(i % period, j % period)``.

    With ``period`` tokens per frame, ``repeated(dilated(w, 1), period)`` sees the same places in all frames, as the temporal
    heads of Sparse VideoGen (https://arxiv.org/abs/2502.01776).

        >>> print(repeated(causal, 2).draw(4, 4))
        █·█·
        ████
        █·█·
        ████
    """

    period: int
    name: ClassVar[str] = "repeated"

    def __post_init__(self) -> None:
        check_inner(self)
        at_least("repeated period", self.period)

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        return self.mask.__call__(b, h, q_idx % self.period, kv_idx % self.period)

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        first, last = (bounds_anywhere(self.mask, *run) for run in _rounds(lo, hi, self.period))
        sieve = _InRounds(first | last, first & last, self.period)
        return Bounds(Intervals.everything(lo), Intervals.nothing(lo), sieve)

    def check(self, batch: int, heads: int, q_len: int, kv_len: int, q_offset: int = 0) -> None:
        self.mask.check(batch, heads, self.period, self.period)


@dataclass(frozen=True, eq=False)
class _InRounds(Sieve):
    """The blocks of keys that hold a key of ``shown``, and those that ``sure`` covers; both repeat every ``period`` keys."""

    shown: Bounds
    sure: Bounds
    period: int

    def some(self, start: Tensor, stop: Tensor) -> Tensor:
        first, last = (self.shown.some(a, b + 1) for a, b in _rounds(start, stop - 1, self.period))
        return first | last

    def every(self, start: Tensor, stop: Tensor) -> Tensor:
        first, last = (self.sure.every(a, b + 1) for a, b in _rounds(start, stop - 1, self.period))
        return first & last


def _rounds(lo: Tensor, hi: Tensor, period: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return two runs of remainders modulo ``period`` that together are those of ``lo..hi``, inclusive."""
    same, round_trip = lo // period == hi // period, hi - lo >= period - 1
    first = torch.where(round_trip, 0, lo % period), torch.where(same & ~round_trip, hi % period, period - 1)
    return first, (torch.where(same, lo % period, 0), hi % period)


@dataclass(frozen=True, repr=False)
class Within(Wrapped):
    """Start ``mask`` anew in each part of the text, and hide all other parts: the first token of a part is at position 0.

    ``parts`` is the size of a chunk, or an integer tensor ``[B, N]`` that holds for each position where its document starts;
    ``chunked(size)`` and ``document(ids)`` work too. Block tables are tight for chunks, and for documents that are one run of
    positions each and of which no block of queries holds three.

        >>> print(within(causal & sink(1), document([[0, 0, 1, 1, 1]])).draw(5, 5))
        █····
        █····
        ··█··
        ··█··
        ··█··
    """

    parts: int | TensorLike | Chunked | Document
    name: ClassVar[str] = "within"

    def __post_init__(self) -> None:
        check_inner(self)
        if isinstance(self.parts, Chunked):
            object.__setattr__(self, "parts", self.parts.size)
        elif isinstance(self.parts, Document):
            ids = Captured.of(self.parts.ids).tensor
            object.__setattr__(self, "parts", Captured(extent(ids, ids)[0]))
        if isinstance(self.parts, int):
            at_least("within parts", self.parts)
        elif isinstance(self.parts, Captured | Tensor | list):
            capture(self, "parts", 2, "[batch, positions]", INTEGERS)
        else:
            raise TypeError(f"within needs parts to be a size, starts, chunked(n) or document(ids), got {self.parts!r}")

    @property
    def _starts(self) -> Tensor:
        assert isinstance(self.parts, Captured)
        return self.parts.tensor

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        if isinstance(self.parts, int):
            same = q_idx // self.parts == kv_idx // self.parts
            return same & self.mask.__call__(b, h, q_idx % self.parts, kv_idx % self.parts)
        first, second = look_up(self._starts, b, q_idx), look_up(self._starts, b, kv_idx)
        return (first == second) & self.mask.__call__(b, h, q_idx - first, kv_idx - second)

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        seen = self._seen(lo, hi)
        if isinstance(self.parts, int):
            return seen
        first, last, size = extent(self._starts, self._starts)
        runs = ((size == last - first + 1) & (first == self._starts)).all(dim=1)  # the rows of the batch that can be followed
        rows = runs.view(-1, 1, 1) & (lo == lo)
        known = Intervals.of(torch.where(rows, -INF, INF), INF)
        return seen & Bounds(Intervals.everything(lo), known) | Bounds(~known, Intervals.nothing(lo))

    def _seen(self, lo: Tensor, hi: Tensor) -> Bounds:
        """Return the bounds if each part is one run of positions."""
        (start, stop), (last_start, last_stop) = self._part(lo), self._part(hi)
        first = self._inside(lo, torch.minimum(hi, stop - 1), start, stop)
        if hi is lo:
            return first
        last = self._inside(torch.maximum(lo, last_start), hi, last_start, last_stop)
        between = Intervals.of(stop, last_start)
        sieve = self._whole_chunk(lo) if isinstance(self.parts, int) else None
        one = Intervals.of(torch.where(start == last_start, start, stop), stop)
        everywhere = Bounds(Intervals.everything(lo), one)  # the keys of one part cannot be visible to another one
        return (first | last | Bounds(between, Intervals.nothing(lo), sieve)) & everywhere

    def _part(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the parts of the positions ``at`` start and stop: ``[rows]`` or ``[B, 1, rows]``."""
        if isinstance(self.parts, int):
            start = at // self.parts * self.parts
            return start, start + self.parts
        first, last, _ = extent(self._starts, self._starts)
        at = at.clamp(0, first.shape[1] - 1)
        return first[:, at].unsqueeze(1), last[:, at].unsqueeze(1) + 1

    def _inside(self, lo: Tensor, hi: Tensor, start: Tensor, stop: Tensor) -> Bounds:
        """Return the bounds for queries of the one part ``start..stop``."""
        inner = bounds_anywhere(self.mask, lo - start, hi - start)
        sieve = Moved(inner.sieve, lambda a, b: (a - start.unsqueeze(-1), b - start.unsqueeze(-1))) if inner.sieve else None
        part = Intervals.of(start, stop)
        return Bounds(inner.maybe - -start, inner.surely - -start, sieve) & Bounds(part, part)

    def _whole_chunk(self, rows: Tensor) -> Sieve:
        """Return the sieve of queries of whole chunks."""
        assert isinstance(self.parts, int)
        inner = bounds_anywhere(self.mask, rows * 0, rows * 0 + (self.parts - 1))
        return _InRounds(inner, inner, self.parts)

    def sizes(self) -> tuple[int, int]:
        batch, heads = self.mask.sizes()
        return batch if isinstance(self.parts, int) else agree("batch", [batch, self._starts.shape[0]]), heads

    def check(self, batch: int, heads: int, q_len: int, kv_len: int, q_offset: int = 0) -> None:
        if isinstance(self.parts, int):
            return self.mask.check(batch, heads, self.parts, self.parts)
        check_batch("within", self._starts, batch)
        check_length("within", self._starts, max(q_len + q_offset, kv_len))
        return self.mask.check(batch, heads, 1, 1)


periodic = Periodic
repeated = Repeated
within = Within
