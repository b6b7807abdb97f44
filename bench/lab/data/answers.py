"""Tasks without a needle: a count over the whole context, and long answers whose decoding is the task."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.lab.data.haystack import Haystack, noise
from bench.lab.data.items import Items, distinct, drawn, filled, spread, written
from bench.lab.data.words import CLOSE, COUNT, DIGITS, KEYS, SUM, TALLY


@dataclass(frozen=True)
class Counting:
    """``TALLY`` occurs one to ``most`` times in the haystack. ``COUNT`` asks how often, and the answer is one digit.

    The answer needs every ``TALLY``, so the task is hard for top-k selection.
    """

    name: str = "counting"
    most: int = 8
    haystack: Haystack = noise
    remapped: bool = False

    def make(self, batch: int, length: int, rng: torch.Generator, *, depth: float | None = None) -> Items:
        _refuse(self.name, depth)
        size = length - 2
        context = filled(self.haystack, batch, size, rng, needed=self.most)
        count = torch.randint(1, self.most + 1, (batch, 1), generator=rng, device=rng.device)
        begins = spread(batch, self.most, 1, size - 1, rng)
        begins = begins.gather(1, torch.rand(begins.shape, generator=rng, device=rng.device).argsort(-1))
        is_kept = torch.arange(self.most, device=rng.device) >= count
        tokens = context[:, 1:].gather(1, begins).where(is_kept, TALLY)
        question = torch.full((batch, 1), COUNT, device=rng.device)
        return Items(written(context, begins, tokens[:, :, None]), ((question, count + DIGITS.start),))


@dataclass(frozen=True)
class Sums:
    """The question is ``SUM``, ``size`` digits and ``SUM``. The answer is the running sums of the digits, modulo 16.

    Digits are 0 to ``most``. The digit that a step needs is always ``size + 1`` tokens back.
    """

    name: str = "sums"
    size: int = 32
    most: int = 3
    haystack: Haystack = noise
    remapped: bool = False

    def make(self, batch: int, length: int, rng: torch.Generator, *, depth: float | None = None) -> Items:
        _refuse(self.name, depth)
        context = filled(self.haystack, batch, length - 2 * self.size - 2, rng)
        digits = drawn(batch, self.size, DIGITS[: self.most + 1], rng)
        answer = (digits - DIGITS.start).cumsum(1) % len(DIGITS) + DIGITS.start
        return Items(context, ((_between(SUM, digits), answer),))


@dataclass(frozen=True)
class Brackets:
    """The question opens ``size`` different names between two ``CLOSE``. The answer closes them, the last one first."""

    name: str = "brackets"
    size: int = 16
    haystack: Haystack = noise
    remapped: bool = False

    def make(self, batch: int, length: int, rng: torch.Generator, *, depth: float | None = None) -> Items:
        _refuse(self.name, depth)
        context = filled(self.haystack, batch, length - 2 * self.size - 2, rng)
        opened = distinct(batch, self.size, KEYS, rng)
        return Items(context, ((_between(CLOSE, opened), opened.flip(1)),))


def _between(marker: int, tokens: Tensor) -> Tensor:
    edge = tokens.new_full((len(tokens), 1), marker)
    return torch.cat([edge, tokens, edge], dim=1)


def _refuse(name: str, depth: float | None) -> None:
    if depth is not None:
        raise ValueError(f"{name} has no needle that a depth could place: depth must be None, got {depth}")
