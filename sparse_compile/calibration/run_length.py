"""Estimate how long the rest of a run takes from the steps that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean


class RunLength:
    """The seconds that steps over texts of some length take: ``linear * tokens + square * tokens ** 2``.

    Attention takes time with the square of the length, and everything else with the length itself.

        >>> run = RunLength()
        >>> run.note(1000, 3.0, compiled=False)
        >>> run.note(2000, 8.0, compiled=False)
        >>> run.of([4000, 4000])
        48.0
    """

    def __init__(self) -> None:
        self._compiled: list[tuple[int, float]] = []
        self._measured: list[tuple[int, float]] = []

    @property
    def is_rough(self) -> bool:
        """Whether every step so far also compiled."""
        return not self._measured

    def note(self, tokens: int, seconds: float, *, compiled: bool) -> None:
        """Add a step. One that also compiled counts only as long as there is no other."""
        (self._compiled if compiled else self._measured).append((tokens, seconds))

    def of(self, lengths: Sequence[int] | int) -> float:
        """The seconds of steps over texts of these ``lengths``, or of a number of steps like those that were measured."""
        steps = self._measured or self._compiled
        if isinstance(lengths, int):
            return lengths * fmean(seconds for _, seconds in steps)
        linear, square = _fit(steps)
        return sum(linear * tokens + square * tokens**2 for tokens in lengths)


def _fit(steps: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Fit a line to the seconds of a token by the length of its text. Neither factor is negative."""
    lengths, rates = [tokens for tokens, _ in steps], [seconds / tokens for tokens, seconds in steps]
    length, rate = fmean(lengths), fmean(rates)
    spread = sum((one - length) ** 2 for one in lengths)
    square = sum((one - length) * other for one, other in zip(lengths, rates, strict=True)) / spread if spread else 0.0
    if square <= 0:
        return rate, 0.0
    if rate < square * length:
        return 0.0, sum(one * other for one, other in zip(lengths, rates, strict=True)) / sum(one**2 for one in lengths)
    return rate - square * length, square
