"""What a run of queries sees: bounds on its keys as intervals, and a test of single key blocks where no few intervals do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_compile.masks.intervals import Intervals, column_of, larger, smaller

MOST_CUTS = 2  # intervals whose parts of a block a sieve tests apart; this happens at every level of a tree


class Sieve(ABC):
    """Tests blocks of keys one by one, for sets that no small number of intervals describes.

    A block is a half-open range ``start..stop`` of key positions: int64 ``[..., rows, blocks]`` each, for the same rows as the
    bounds that hold the sieve. The answers for empty ranges do not matter.
    """

    @abstractmethod
    def some(self, start: Tensor, stop: Tensor) -> Tensor:
        """Return False only for blocks in which no query of the run sees a key."""

    @abstractmethod
    def every(self, start: Tensor, stop: Tensor) -> Tensor:
        """Return True only for blocks in which every query of the run sees every key."""


@dataclass(frozen=True, eq=False)
class Bounds:
    """Outer and inner bounds on the keys that a run of queries sees.

    ``maybe`` contains every key that some query of the run sees, and may contain more. ``surely`` contains only keys that
    all queries of the run see, and may miss some of them. For single queries (``lo is hi``), both are usually the same
    object, which is computed once. ``&``, ``|`` and ``~`` follow Kleene's three-valued logic. A ``sieve`` decides about blocks
    of keys where the intervals are not exact.
    """

    maybe: Intervals
    surely: Intervals
    sieve: Sieve | None = None

    @property
    def certain(self) -> bool:
        """Whether both bounds are the same object, so that the keys are known exactly."""
        return self.maybe is self.surely

    def some(self, start: Tensor, stop: Tensor) -> Tensor:
        """Return for blocks of keys whether some query may see one of their keys; see ``Sieve``."""
        if self.sieve is None:
            return self.maybe.overlap(start, stop) > 0
        if len(self.maybe.columns) > MOST_CUTS:
            return (self.maybe.overlap(start, stop) > 0) & self.sieve.some(start, stop)
        found = torch.zeros((), dtype=torch.bool, device=start.device)
        for low, high in self.maybe.columns:  # the sieve is more exact for the part of a block that can be seen at all
            first, last = larger(column_of(low), start), smaller(column_of(high), stop)
            if isinstance(first, Tensor) and isinstance(last, Tensor):
                found = found | ((last > first) & self.sieve.some(first, last))
        return found

    def every(self, start: Tensor, stop: Tensor) -> Tensor:
        """Return for blocks of keys whether all queries surely see all of their keys; see ``Sieve``."""
        whole = self.surely.overlap(start, stop) >= stop - start
        return whole if self.sieve is None else whole | self.sieve.every(start, stop)

    def __and__(self, other: Bounds) -> Bounds:
        maybe = self.maybe & other.maybe
        surely = maybe if self.certain and other.certain else self.surely & other.surely
        sieve = None if self.sieve is None and other.sieve is None else _Both(self, other)
        return Bounds(maybe, surely, sieve)

    def __or__(self, other: Bounds) -> Bounds:
        maybe = self.maybe | other.maybe
        surely = maybe if self.certain and other.certain else self.surely | other.surely
        sieve = None if self.sieve is None and other.sieve is None else _Opposite(~self & ~other)
        return Bounds(maybe, surely, sieve)

    def __invert__(self) -> Bounds:
        hidden = ~self.maybe
        return Bounds(hidden if self.certain else ~self.surely, hidden, None if self.sieve is None else _Opposite(self))


@dataclass(frozen=True, eq=False)
class _Both(Sieve):
    """The blocks that ``a & b`` shows. ``Bounds.some`` has cut the blocks to what the intervals of both show."""

    a: Bounds
    b: Bounds

    def some(self, start: Tensor, stop: Tensor) -> Tensor:
        sieves = [x.sieve for x in (self.a, self.b) if x.sieve is not None]
        found = sieves[0].some(start, stop)
        return found if len(sieves) == 1 else found & sieves[1].some(start, stop)

    def every(self, start: Tensor, stop: Tensor) -> Tensor:
        return self.a.every(start, stop) & self.b.every(start, stop)


@dataclass(frozen=True, eq=False)
class _Opposite(Sieve):
    """The blocks that ``~bounds`` shows."""

    bounds: Bounds

    def some(self, start: Tensor, stop: Tensor) -> Tensor:
        return ~self.bounds.every(start, stop)

    def every(self, start: Tensor, stop: Tensor) -> Tensor:
        return ~self.bounds.some(start, stop)


@dataclass(frozen=True, eq=False)
class ByHead(Sieve):
    """The blocks that each head shows, with one entry of ``bounds`` per head. Heads may share an object."""

    bounds: Sequence[Bounds]

    def some(self, start: Tensor, stop: Tensor) -> Tensor:
        return self._stacked(start, stop, Bounds.some)

    def every(self, start: Tensor, stop: Tensor) -> Tensor:
        return self._stacked(start, stop, Bounds.every)

    def _stacked(self, start: Tensor, stop: Tensor, test: Callable[[Bounds, Tensor, Tensor], Tensor]) -> Tensor:
        shape = (*start.shape[:-3], len(self.bounds), *start.shape[-2:])
        of_head = [x.expand(shape).split(1, dim=-3) for x in (start, stop)]
        heads: dict[Bounds, list[int]] = {}
        for head, bounds in enumerate(self.bounds):
            heads.setdefault(bounds, []).append(head)
        tested: dict[int, Tensor] = {}
        for bounds, members in heads.items():
            found = test(bounds, *(torch.cat([x[head] for head in members], dim=-3) for x in of_head))
            tested |= dict(zip(members, found.split(1, dim=-3), strict=True))
        return torch.cat(torch.broadcast_tensors(*(tested[head] for head in range(len(self.bounds)))), dim=-3)


@dataclass(frozen=True, eq=False)
class Counted(Sieve):
    """A set of keys that is the same for all queries, or of distances ``i - j``, of which ``below(x)`` are less than ``x``.

    ``run`` holds the first and last query of each run if the set is one of distances. A run and a block are both without gaps,
    so every distance between the smallest and the largest occurs.
    """

    below: Callable[[Tensor], Tensor]
    run: tuple[Tensor, Tensor] | None = None

    def some(self, start: Tensor, stop: Tensor) -> Tensor:
        first, last = self._range(start, stop)
        return self.below(last) > self.below(first)

    def every(self, start: Tensor, stop: Tensor) -> Tensor:
        first, last = self._range(start, stop)
        return self.below(last) - self.below(first) == last - first

    def _range(self, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        if self.run is None:
            return start, stop
        lo, hi = self.run
        return lo.unsqueeze(-1) - stop + 1, hi.unsqueeze(-1) - start + 1


@dataclass(frozen=True, eq=False)
class Moved(Sieve):
    """The sieve of ``bounds`` over other key positions: ``to`` converts a range of keys to the range that it is asked about."""

    sieve: Sieve
    to: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

    def some(self, start: Tensor, stop: Tensor) -> Tensor:
        return self.sieve.some(*self.to(start, stop))

    def every(self, start: Tensor, stop: Tensor) -> Tensor:
        return self.sieve.every(*self.to(start, stop))
