"""The blocks of keys that a run of queries sees on a grid: runs of a numbered grid are a few boxes, which axes decide apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sparse_compile.masks.bounds import Sieve

MOST_REMAINDERS = 64  # of a dilation; each is decided apart
Span = tuple[Tensor, Tensor]  # the first and the last coordinate on one axis


class Window(Protocol):
    """A pattern on a grid that is the product of a window on each axis; see ``Neighborhood``."""

    @property
    def grid(self) -> tuple[int, ...]: ...
    @property
    def kernel(self) -> tuple[int, ...]: ...
    @property
    def dilation(self) -> tuple[int, ...]: ...
    @property
    def causal(self) -> tuple[bool, ...]: ...
    def first_row(self, axis: int, row: Tensor, remainder: int) -> Tensor: ...


class Box(NamedTuple):
    """A box of a grid, one span per axis, where ``exists`` holds."""

    spans: tuple[Span, ...]
    exists: Tensor


def boxes(lo: Tensor, hi: Tensor, grid: Sequence[int]) -> list[Box]:
    """Cut the run ``lo..hi`` of a grid that is numbered row by row into boxes: its first line, its last one, and all others."""
    if len(grid) == 1:
        return [Box(((lo, hi),), lo <= hi)]
    line = prod(grid[1:])
    x, y = lo // line, hi // line
    same = x == y
    first, last = lo % line, hi % line
    whole = Box(((x + 1, y - 1), *((lo * 0, lo * 0 + (size - 1)) for size in grid[1:])), y - x > 1)
    head = boxes(first, torch.where(same, last, line - 1), grid[1:])
    tail = boxes(first * 0, last, grid[1:])
    return [
        *(Box(((x, x), *box.spans), box.exists) for box in head),
        *(Box(((y, y), *box.spans), box.exists & ~same) for box in tail),
        whole,
    ]


@dataclass(frozen=True, eq=False)
class GridBlocks(Sieve):
    """The blocks of keys that the queries ``lo..hi`` see in a window on a grid. Runs that leave it are not ``inside``.

    A query box sees a key box if it does on every axis, because a window is a product of windows of the axes.
    """

    window: Window
    lo: Tensor
    hi: Tensor
    inside: Tensor

    @cached_property
    def _queries(self) -> list[Box]:
        return boxes(self.lo.unsqueeze(-1), self.hi.unsqueeze(-1), self.window.grid)

    @cached_property
    def _axes(self) -> list[list[_Axis]]:
        """What each query box sees on each axis."""
        return [[_Axis.of(self.window, axis, span) for axis, span in enumerate(box.spans)] for box in self._queries]

    def some(self, start: Tensor, stop: Tensor) -> Tensor:
        keys = boxes(start, stop.clamp(max=prod(self.window.grid)) - 1, self.window.grid)
        found = torch.zeros((), dtype=torch.bool, device=start.device)
        for query, seen in zip(self._queries, self._axes, strict=True):
            for key in keys:
                near = query.exists & key.exists
                for axis, span in zip(seen, key.spans, strict=True):
                    near = near & axis.some(span)
                found = found | near
        return found

    def every(self, start: Tensor, stop: Tensor) -> Tensor:
        size = prod(self.window.grid)
        keys = boxes(start, stop.clamp(max=size) - 1, self.window.grid)
        whole = self.inside.unsqueeze(-1) & (stop <= size)
        for query, seen in zip(self._queries, self._axes, strict=True):
            for key in keys:
                near = ~(query.exists & key.exists)
                together = torch.ones((), dtype=torch.bool, device=start.device)
                for axis, span in zip(seen, key.spans, strict=True):
                    together = together & axis.every(span)
                whole = whole & (near | together)
        return whole


class _Axis(NamedTuple):
    """The windows of a span of queries on one axis: for each remainder of the dilation, what some and what all queries see.

    A coordinate is ``row * dilation + remainder``. The rows ``first..last`` are those that some query sees, and ``begin..end``
    those that all see, if ``exists``. Windows of neighbors touch, so their union has no gap.
    """

    dilation: int
    parts: tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], ...]
    one: Tensor  # whether the span is a single query

    @staticmethod
    def of(window: Window, axis: int, span: Span) -> _Axis:
        step, width = window.dilation[axis], window.kernel[axis]
        x, y = span
        parts = []
        for remainder in range(step):
            low, high = -((remainder - x) // step), (y - remainder) // step  # the rows of the queries
            first, begin = window.first_row(axis, low, remainder), window.first_row(axis, high, remainder)
            last = high if window.causal[axis] else begin + width - 1
            end = low if window.causal[axis] else first + width - 1
            parts.append((first, last, begin, end, low <= high))
        return _Axis(step, tuple(parts), x == y)

    def some(self, span: Span) -> Tensor:
        """Return whether some query of the span sees a key of ``span``."""
        found = torch.zeros((), dtype=torch.bool, device=span[0].device)
        for remainder, (first, last, _, _, exists) in enumerate(self.parts):
            low, high = self._rows(span, remainder)
            found = found | (exists & (low <= high) & (low <= last) & (high >= first))
        return found

    def every(self, span: Span) -> Tensor:
        """Return whether all queries of the span see all keys of ``span``."""
        if self.dilation > 1:  # neighbors differ in their remainder, so only a single pair can be visible
            return self.one & (span[0] == span[1]) & self.some(span)
        _, _, begin, end, _ = self.parts[0]
        return (span[0] >= begin) & (span[1] <= end)

    def _rows(self, span: Span, remainder: int) -> Span:
        return -((remainder - span[0]) // self.dilation), (span[1] - remainder) // self.dilation
