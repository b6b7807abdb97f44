"""Neighborhood patterns over grids of image and video tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_compile.masks.intervals import Bounds, Intervals, normalize
from sparse_compile.masks.mask import Index, Mask
from sparse_compile.masks.patterns.positional import at_least


@dataclass(frozen=True, repr=False)
class Neighborhood(Mask):
    """Each token of a grid sees ``kernel`` tokens around it along every axis (NATTEN, https://arxiv.org/abs/2204.07143).

    Positions number the grid row by row. As in NATTEN, the window is moved inward at the borders, so that every query sees
    exactly ``kernel`` tokens per axis. With a ``dilation`` of d, the window has only coordinates with the query's remainder
    mod d, also where it is moved. On a ``causal`` axis, a query sees the last ``kernel`` tokens, including its own, and
    fewer at the start of the axis.

    ``grid`` has one to three axes. ``kernel``, ``dilation`` and ``causal`` are one value per axis, or one value for all
    axes. Pairs with a position outside the grid are hidden. Raises ``ValueError`` if ``kernel * dilation`` exceeds the size
    of an axis.

        >>> print(neighborhood(4, 3).draw(4, 4))
        ███·
        ███·
        ·███
        ·███
    """

    grid: tuple[int, ...]
    kernel: tuple[int, ...]
    dilation: tuple[int, ...] = (1,)
    causal: tuple[bool, ...] = (False,)
    name: ClassVar[str] = "neighborhood"

    def __init__(
        self,
        grid: int | tuple[int, ...],
        kernel: int | tuple[int, ...],
        dilation: int | tuple[int, ...] = 1,
        causal: bool | tuple[bool, ...] = False,
    ) -> None:
        axes = tuple(grid) if isinstance(grid, tuple | list) else (grid,)
        if not 1 <= len(axes) <= 3:
            raise ValueError(f"neighborhood needs a grid of one to three axes, got {len(axes)}")
        for field, value in (("kernel", kernel), ("dilation", dilation), ("causal", causal)):
            values = tuple(value) if isinstance(value, tuple | list) else (value,) * len(axes)
            if len(values) != len(axes):
                raise ValueError(f"neighborhood {field} needs one value per grid axis ({len(axes)}), got {len(values)}")
            object.__setattr__(self, field, values)
        object.__setattr__(self, "grid", axes)
        for size, width, step, back in zip(self.grid, self.kernel, self.dilation, self.causal, strict=True):
            at_least("neighborhood grid", size)
            at_least("neighborhood kernel", width)
            at_least("neighborhood dilation", step)
            if not isinstance(back, bool):
                raise TypeError(f"neighborhood causal needs True or False, got {back!r}")
            if width * step > size:
                raise ValueError(
                    f"neighborhood kernel times dilation needs to fit the grid, got {width} x {step} on an axis of {size}"
                )

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        size = _product(self.grid)
        visible = (q_idx < size) & (kv_idx < size)
        stride = size
        for axis, length in enumerate(self.grid):
            stride //= length
            x, y = q_idx // stride % length, kv_idx // stride % length
            start = self._start(axis, x)
            step = self.dilation[axis]
            stop = x + 1 if self.causal[axis] else start + self.kernel[axis] * step
            near = (y >= start) & (y < stop)
            visible = visible & (near if step == 1 else near & (y % step == x % step))
        return visible

    def _start(self, axis: int, x: Any) -> Any:
        """Return the first coordinate that a query at coordinate ``x`` of an axis sees."""
        size, width, step = self.grid[axis], self.kernel[axis], self.dilation[axis]
        if self.causal[axis]:
            return _at_least(x - (width - 1) * step, x % step)
        row, remainder = x // step, x % step
        rows = (size - 1 - remainder) // step + 1  # how many coordinates share this remainder
        first = _at_least(row - width // 2, 0)
        last = rows - width
        return (first - _at_least(first - last, 0)) * step + remainder

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        size = _product(self.grid)
        some, every = lo < size, hi < size  # queries beyond the grid see nothing
        lo, hi = lo.clamp(max=size - 1), hi.clamp(max=size - 1)
        start, stop = self._hull(0, lo, hi)
        maybe = normalize(torch.where(some.unsqueeze(-1), start, stop), stop)
        return Bounds(maybe, self._everyone(lo, hi, every))

    def _hull(self, axis: int, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Return starts and stops ``[rows, n]`` of runs that cover what ``lo..hi`` sees on the sub-grid from ``axis`` on.

        If the queries stay within one line, the runs cover their keys line by line. Otherwise one run covers whole lines.
        """
        stride = _product(self.grid[axis + 1 :])
        x0, x1 = lo // stride, hi // stride
        first, reach = self._span(axis, x0, x1)
        if axis == len(self.grid) - 1:
            return first.unsqueeze(-1), reach.unsqueeze(-1)
        begin = lo - x0 * stride
        inner_start, inner_stop = self._hull(axis + 1, begin, torch.where(x0 == x1, hi - x1 * stride, begin))
        width, step = self.kernel[axis], self.dilation[axis]
        start, stop = [], []
        for k in range(width):
            line = first + k * step
            used = (x0 == x1) & (line < reach)
            start.append(torch.where(used.unsqueeze(-1), inner_start + line.unsqueeze(-1) * stride, 0))
            stop.append(torch.where(used.unsqueeze(-1), inner_stop + line.unsqueeze(-1) * stride, 0))
        crossing = x0 != x1
        start.append(torch.where(crossing, first * stride, 0).unsqueeze(-1))
        stop.append(torch.where(crossing, reach * stride, 0).unsqueeze(-1))
        return torch.cat(start, dim=-1), torch.cat(stop, dim=-1)

    def _span(self, axis: int, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first coordinate, and the end, of what queries at coordinates ``x0..x1`` may see.

        The start of a window may drop by less than one dilation from one query to a later one, hence the slack.
        """
        width, step = self.kernel[axis], self.dilation[axis]
        slack = torch.where(x0 == x1, 0, step - 1)
        first = (self._start(axis, x0) - slack).clamp(min=0)
        end = x1 + 1 if self.causal[axis] else self._start(axis, x1) + (width - 1) * step + 1 + slack
        return first, end.clamp(max=self.grid[axis])

    def _everyone(self, lo: Tensor, hi: Tensor, every: Tensor) -> Intervals:
        """Return the keys that all queries of a run see: one interval on a single axis without dilation, otherwise no key."""
        if len(self.grid) > 1 or self.dilation[0] > 1:
            return Intervals.nothing(lo)
        start = self._start(0, hi)
        stop = lo + 1 if self.causal[0] else self._start(0, lo) + self.kernel[0]
        return Intervals.of(start, torch.where(every, stop, start))


def _product(sizes: tuple[int, ...]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


def _at_least(x: Any, least: Any) -> Any:
    """Return ``max(x, least)`` for an integer or a tensor."""
    return x.clamp(min=least) if isinstance(x, Tensor) else max(x, least)


neighborhood = Neighborhood
