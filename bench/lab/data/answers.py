"""Tasks without a needle: a count over all of the context, and answers so long that decoding them is the task."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.lab.data.haystack import Haystack, noise
from bench.lab.data.items import Items, distinct, drawn, filled, spread, written
from bench.lab.data.words import CLOSE, COUNT, DIGITS, KEYS, SUM, TALLY


@dataclass(frozen=True)
class Counting:
    """``TALLY`` one to ``most`` times in the haystack; ``COUNT`` asks how often: one digit. Top-k must fail here."""

    name: str = "counting"
    most: int = 8
    haystack: Haystack = noise
    placed: bool = False

    def make(self, batch: int, length: int, rng: torch.Generator, *, depth: float | None = None) -> Items:
        _refuse(self.name, depth)
        size = length - 2
        context = filled(self.haystack, batch, size, rng, needed=self.most)
        count = torch.randint(1, self.most + 1, (batch, 1), generator=rng, device=rng.device)
        begins = spread(batch, self.most, 1, size - 1, rng)
        begins = begins.gather(1, torch.rand(begins.shape, generator=rng, device=rng.device).argsort(-1))
        untold = torch.arange(self.most, device=rng.device) >= count
        told = context[:, 1:].gather(1, begins).where(untold, TALLY)
        question = torch.full((batch, 1), COUNT, device=rng.device)
        return Items(written(context, begins, told[:, :, None]), ((question, count + DIGITS.start),))


@dataclass(frozen=True)
class Sums:
    """``SUM`` and ``size`` digits, then ``SUM``: the answer is the sum modulo 16 of the first digit, of the first two, ...

    Digits are 0 to ``most``. The digit that a step needs is always ``size + 1`` tokens back.
    """

    name: str = "sums"
    size: int = 32
    most: int = 3
    haystack: Haystack = noise
    placed: bool = False

    def make(self, batch: int, length: int, rng: torch.Generator, *, depth: float | None = None) -> Items:
        _refuse(self.name, depth)
        context = filled(self.haystack, batch, length - 2 * self.size - 2, rng)
        digits = drawn(batch, self.size, DIGITS[: self.most + 1], rng)
        answer = (digits - DIGITS.start).cumsum(1) % len(DIGITS) + DIGITS.start
        return Items(context, ((_between(SUM, digits), answer),))


@dataclass(frozen=True)
class Brackets:
    """``size`` different names are opened between two ``CLOSE``: the answer closes them, the last one first."""

    name: str = "brackets"
    size: int = 16
    haystack: Haystack = noise
    placed: bool = False

    def make(self, batch: int, length: int, rng: torch.Generator, *, depth: float | None = None) -> Items:
        _refuse(self.name, depth)
        context = filled(self.haystack, batch, length - 2 * self.size - 2, rng)
        opened = distinct(batch, self.size, KEYS, rng)
        return Items(context, ((_between(CLOSE, opened), opened.flip(1)),))


def _between(marker: int, told: Tensor) -> Tensor:
    edge = told.new_full((len(told), 1), marker)
    return torch.cat([edge, told, edge], dim=1)


def _refuse(name: str, depth: float | None) -> None:
    if depth is not None:
        raise ValueError(f"{name} has no needle that a depth could place: depth must be None, got {depth}")
