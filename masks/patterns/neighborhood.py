"""Neighborhood patterns over grids of image and video tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_compile.masks.bounds import Bounds
from sparse_compile.masks.captured import Captured
from sparse_compile.masks.intervals import Intervals, normalize
from sparse_compile.masks.mask import Index, Mask
from sparse_compile.masks.patterns.grid_blocks import MOST_REMAINDERS, GridBlocks
from sparse_compile.masks.patterns.positional import at_least

MOST_LINES = 512  # runs of keys of a single query that are written out


@dataclass(frozen=True, repr=False)
class Neighborhood(Mask):
    """Each token of a grid sees ``kernel`` tokens around it along every axis (NATTEN, https://arxiv.org/abs/2204.07143).

    Positions number the grid row by row. As in NATTEN, the window is moved inward at the borders, so that every query sees
    exactly ``kernel`` tokens per axis. An even ``kernel`` reaches one token further back than ahead. With a ``dilation`` of d,
    the window has only coordinates with the query's remainder mod d, also where it is moved. On a ``causal`` axis, a query sees
    the last ``kernel`` tokens, including its own, and fewer at the start of the axis.

    With a ``stride``, runs of ``stride`` queries share the window of their leader (GNA, https://arxiv.org/abs/2504.16922). The
    leader is the one in the middle, and the right one of two. On a ``causal`` axis, it is the last one, and each query sees its
    window up to itself.

    ``grid`` has one to three axes. ``kernel``, ``dilation``, ``causal`` and ``stride`` are one value per axis, or one value for
    all axes. Pairs with a position outside the grid are hidden. Raises ``ValueError`` if ``kernel * dilation`` exceeds the size
    of an axis, or ``stride`` the ``kernel``.

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
    stride: tuple[int, ...] = (1,)
    name: ClassVar[str] = "neighborhood"

    def __init__(
        self,
        grid: int | tuple[int, ...],
        kernel: int | tuple[int, ...],
        dilation: int | tuple[int, ...] = 1,
        causal: bool | tuple[bool, ...] = False,
        stride: int | tuple[int, ...] = 1,
    ) -> None:
        axes = tuple(grid) if isinstance(grid, tuple | list) else (grid,)
        if not 1 <= len(axes) <= 3:
            raise ValueError(f"neighborhood needs a grid of one to three axes, got {len(axes)}")
        for field, value in (("kernel", kernel), ("dilation", dilation), ("causal", causal), ("stride", stride)):
            values = tuple(value) if isinstance(value, tuple | list) else (value,) * len(axes)
            if len(values) != len(axes):
                raise ValueError(f"neighborhood {field} needs one value per grid axis ({len(axes)}), got {len(values)}")
            object.__setattr__(self, field, values)
        object.__setattr__(self, "grid", axes)
        for size, width, step, back, group in zip(self.grid, self.kernel, self.dilation, self.causal, self.stride, strict=True):
            at_least("neighborhood grid", size)
            at_least("neighborhood kernel", width)
            at_least("neighborhood dilation", step)
            at_least("neighborhood stride", group)
            if not isinstance(back, bool):
                raise TypeError(f"neighborhood causal needs True or False, got {back!r}")
            if width * step > size:
                raise ValueError(
                    f"neighborhood kernel times dilation needs to fit the grid, got {width} x {step} on an axis of {size}"
                )
            if group > width:
                raise ValueError(
                    f"neighborhood stride needs to be at most the kernel, got {group} for a kernel of {width}: "
                    "with a larger one, some tokens are seen by no query"
                )

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        size = prod(self.grid)
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
        step = self.dilation[axis]
        return self.first_row(axis, x // step, x % step) * step + x % step

    def first_row(self, axis: int, row: Any, remainder: Any) -> Any:
        """Do the same among the coordinates with one remainder of the dilation, which are numbered by ``row``."""
        size, width, step, group = self.grid[axis], self.kernel[axis], self.dilation[axis], self.stride[axis]
        last = (size - 1 - remainder) // step  # the last row with this remainder
        leader = row // group * group + (group - 1 if self.causal[axis] else group // 2)
        leader = leader - _at_least(leader - last, 0)
        if self.causal[axis]:
            return _at_least(leader - (width - 1), 0)
        first = _at_least(leader - width // 2, 0)
        return first - _at_least(first - (last + 1 - width), 0)

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        size, line = prod(self.grid), prod(self.grid[1:])
        some, every = lo < size, hi < size  # queries beyond the grid see nothing
        first, last = lo.clamp(max=size - 1), hi.clamp(max=size - 1)
        if hi is lo and prod(self.kernel[:-1]) * (self.kernel[-1] if self.dilation[-1] > 1 else 1) <= MOST_LINES:
            start, stop = self._keys(0, first)
            keys = normalize(torch.where(some.unsqueeze(-1), start, stop), stop)
            return Bounds(keys, keys)
        start, stop = (x * line for x in self._span(first // line, last // line))
        maybe = Intervals.of(torch.where(some, start, stop), stop)
        if len(self.grid) == 1 and self.dilation[0] == 1:
            return Bounds(maybe, self._everyone(first, last, every))
        sieve = GridBlocks(self, first, last, every) if max(self.dilation) <= MOST_REMAINDERS else None
        return Bounds(maybe, Intervals.nothing(lo), sieve)

    def text(self, tensor: Callable[[Captured], str]) -> str:
        """Write a value that is the same for all axes once, and leave out what is not set."""
        grid = self.grid if len(self.grid) > 1 else self.grid[0]
        once = {field.name: _once(getattr(self, field.name)) for field in fields(self)[1:]}
        written = [repr(grid), repr(once["kernel"])]
        unset = {"dilation": 1, "causal": False, "stride": 1}
        named = [f"{name}={once[name]!r}" for name, value in unset.items() if once[name] != value]
        return f"{self.name}({', '.join(written + named)})"

    def _keys(self, axis: int, at: Tensor) -> tuple[Tensor, Tensor]:
        """Return starts and stops ``[rows, n]`` of the keys that single queries see on the sub-grid from ``axis`` on."""
        line = prod(self.grid[axis + 1 :])
        x = at // line
        start, width, step = self._start(axis, x), self.kernel[axis], self.dilation[axis]
        last_axis = axis == len(self.grid) - 1
        if last_axis and step == 1:
            return start.unsqueeze(-1), (x + 1 if self.causal[axis] else start + width).unsqueeze(-1)
        coordinate = start.unsqueeze(-1) + torch.arange(width, device=at.device) * step  # [rows, width]
        used = coordinate <= x.unsqueeze(-1) if self.causal[axis] else coordinate == coordinate
        if last_axis:
            return coordinate, torch.where(used, coordinate + 1, coordinate)
        first, stop = self._keys(axis + 1, at % line)
        begin = (coordinate * line).unsqueeze(-1) + first.unsqueeze(-2)  # [rows, width, n]
        end = torch.where(used.unsqueeze(-1), (coordinate * line).unsqueeze(-1) + stop.unsqueeze(-2), begin)
        return begin.flatten(-2), end.flatten(-2)

    def _span(self, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first coordinate, and the end, of what queries at coordinates ``x0..x1`` of the first axis may see.

        The start of a window may drop by less than one dilation from one query to a later one, hence the slack.
        """
        width, step = self.kernel[0], self.dilation[0]
        slack = torch.where(x0 == x1, 0, step - 1)
        first = (self._start(0, x0) - slack).clamp(min=0)
        end = x1 + 1 if self.causal[0] else self._start(0, x1) + (width - 1) * step + 1 + slack
        return first, end.clamp(max=self.grid[0])

    def _everyone(self, lo: Tensor, hi: Tensor, every: Tensor) -> Intervals:
        """Return the keys that all queries of a run on a single axis without dilation see."""
        start = self._start(0, hi)
        stop = lo + 1 if self.causal[0] else self._start(0, lo) + self.kernel[0]
        return Intervals.of(start, torch.where(every, stop, start))


def _once(values: tuple[Any, ...]) -> Any:
    return values[0] if len(set(values)) == 1 else values


def _at_least(x: Any, least: Any) -> Any:
    """Return ``max(x, least)`` for an integer or a tensor."""
    return x.clamp(min=least) if isinstance(x, Tensor) else max(x, least)


neighborhood = Neighborhood
