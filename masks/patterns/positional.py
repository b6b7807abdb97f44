"""Mask patterns that depend only on positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_compile.masks.bounds import Bounds, Counted
from sparse_compile.masks.intervals import INF, Edge, Intervals
from sparse_compile.masks.mask import Index, Mask


def at_least(rule: str, value: int, least: int = 1) -> None:
    """Raise unless ``value`` is an integer of at least ``least``; ``rule`` names the value in the message."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{rule} needs an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{rule} needs to be at least {least}, got {value}")


def before(stop: Edge, rows: Tensor) -> Intervals:
    """Return the keys before ``stop`` (exclusive), one interval per row."""
    return Intervals.of(-INF, stop, rows)


def since(start: Edge, rows: Tensor) -> Intervals:
    """Return the keys from ``start`` on, one interval per row."""
    return Intervals.of(start, INF, rows)


@dataclass(frozen=True, repr=False)
class Causal(Mask):
    """Each query sees its own key and all earlier keys: ``j <= i``.

    >>> print(causal.draw(3, 3))
    █··
    ██·
    ███
    """

    name: ClassVar[str] = "causal"

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        return kv_idx <= q_idx

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        maybe = before(hi + 1, hi)
        return Bounds(maybe, maybe if lo is hi else before(lo + 1, lo))


@dataclass(frozen=True, repr=False)
class Sink(Mask):
    """Each query sees the first ``size`` keys (StreamingLLM's attention sinks, https://arxiv.org/abs/2309.17453).

    >>> print((causal & sink(1)).draw(3, 3))
    █··
    █··
    █··
    """

    size: int
    name: ClassVar[str] = "sink"

    def __post_init__(self) -> None:
        at_least("sink size", self.size)

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        return kv_idx < self.size

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        seen = before(self.size, lo)
        return Bounds(maybe=seen, surely=seen)

    def implies(self, other: Mask) -> bool:
        return super().implies(other) or (isinstance(other, Sink) and self.size <= other.size)


@dataclass(frozen=True, repr=False)
class SlidingWindow(Mask):
    """Each query sees the last ``size`` keys, including its own, and all later keys: ``j > i - size``.

    Combine it with ``causal`` to hide the later keys: ``causal & sliding_window(size)`` is ``config.sliding_window`` of
    transformers.

        >>> print((causal & sliding_window(2)).draw(3, 3))
        █··
        ██·
        ·██
    """

    size: int
    name: ClassVar[str] = "sliding_window"

    def __post_init__(self) -> None:
        at_least("sliding_window size", self.size)

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        return kv_idx > q_idx - self.size

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        maybe = since(lo - (self.size - 1), lo)
        return Bounds(maybe, maybe if lo is hi else since(hi - (self.size - 1), hi))

    def implies(self, other: Mask) -> bool:
        return super().implies(other) or (isinstance(other, SlidingWindow) and self.size <= other.size)


@dataclass(frozen=True, repr=False)
class Chunked(Mask):
    """Each query sees the keys of its own chunk of ``size`` positions: ``i // size == j // size`` (Llama 4).

    >>> print(chunked(2).draw(4, 4))
    ██··
    ██··
    ··██
    ··██
    """

    size: int
    name: ClassVar[str] = "chunked"

    def __post_init__(self) -> None:
        at_least("chunked size", self.size)

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        return q_idx // self.size == kv_idx // self.size

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        first, last = lo // self.size, hi // self.size
        start, stop = first * self.size, (last + 1) * self.size
        return Bounds(maybe=Intervals.of(start, stop), surely=Intervals.of(start, torch.where(first == last, stop, start)))

    def implies(self, other: Mask) -> bool:
        return super().implies(other) or (isinstance(other, Chunked) and other.size % self.size == 0)


@dataclass(frozen=True, repr=False)
class Strided(Mask):
    """Every query sees every ``step``-th key, counted from ``offset``: ``(j - offset) % step == 0``.

    Positions are absolute, so a cache needs only ``1/step`` of the keys (S2-Attention, https://arxiv.org/abs/2407.17678).

        >>> print((causal & strided(2)).draw(4, 4))
        █···
        █···
        █·█·
        █·█·
    """

    step: int
    offset: int = 0
    name: ClassVar[str] = "strided"

    def __post_init__(self) -> None:
        at_least("strided step", self.step)
        at_least("strided offset", self.offset, least=0)

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        return (kv_idx - self.offset) % self.step == 0

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        everything = Intervals.everything(lo)
        if self.step == 1:
            return Bounds(everything, everything)
        # The first visible key is at ``offset % step``.
        sieve = Counted(lambda end: (end - self.offset % self.step + self.step - 1) // self.step)
        return Bounds(everything, Intervals.nothing(lo), sieve)


@dataclass(frozen=True, repr=False)
class Dilated(Mask):
    """Each query sees ``size`` keys at distances 0, ``step``, 2 ``step``, ... on either side (Longformer's dilated window).

    The rule is ``(i - j) % step == 0 and abs(i - j) < size * step``. With a ``step`` of 1, the pattern is a window around
    the query.

        >>> print(dilated(2, 2).draw(4, 4))
        █·█·
        ·█·█
        █·█·
        ·█·█
    """

    size: int
    step: int
    name: ClassVar[str] = "dilated"

    def __post_init__(self) -> None:
        at_least("dilated size", self.size)
        at_least("dilated step", self.step)

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        distance = q_idx - kv_idx
        reach = self.size * self.step
        near = (distance < reach) & (distance > -reach)
        return near if self.step == 1 else near & (distance % self.step == 0)

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        reach = (self.size - 1) * self.step
        maybe = Intervals.of(lo - reach, hi + reach + 1)
        if self.step == 1:
            return Bounds(maybe=maybe, surely=Intervals.of(hi - reach, lo + reach + 1))
        # Distances are multiples of ``step``, of which 1 - size is the first.
        multiples = Counted(lambda end: ((end + self.step - 1) // self.step).clamp(1 - self.size, self.size), run=(lo, hi))
        return Bounds(maybe, Intervals.nothing(lo), multiples)


causal = Causal()
sink = Sink
sliding_window = SlidingWindow
chunked = Chunked
strided = Strided
dilated = Dilated
