"""Retrieval tasks, from one needle to chains of variables, and all tasks by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.lab.data.answers import Brackets, Counting, Sums
from bench.lab.data.haystack import Haystack, noise
from bench.lab.data.items import Items, Task, at_depth, distinct, drawn, filled, inserted, written
from bench.lab.data.words import ASK, COPY, EACH, KEYS, NEEDLE, SET, SYMBOLS, VALUES

ANSWER = 4  # values of a needle
NEEDLE_SIZE = 2 + ANSWER


@dataclass(frozen=True)
class Needles:
    """``needles`` needles ``NEEDLE key v v v v`` are hidden. ``ASK key`` asks for ``asked`` of them, one after the other.

    With ``together``, one question ``EACH key key`` names all of them, and the answer repeats each key before its values.
    """

    name: str
    needles: int
    asked: int
    together: bool = False
    haystack: Haystack = noise
    remapped: bool = True

    def make(self, batch: int, length: int, rng: torch.Generator, *, depth: float | None = None) -> Items:
        size = length - self.asked * NEEDLE_SIZE - self.together
        context = filled(self.haystack, batch, size, rng, needed=self.needles * NEEDLE_SIZE)
        keys = distinct(batch, self.needles, KEYS, rng)
        values = drawn(batch, self.needles * ANSWER, VALUES, rng).unflatten(1, (self.needles, ANSWER))
        first = at_depth(batch, 1, NEEDLE_SIZE, size - 1, depth, rng)
        begins = inserted(first, self.needles - 1, NEEDLE_SIZE, size - 1, rng)
        needles = torch.cat([torch.full_like(keys, NEEDLE)[:, :, None], keys[:, :, None], values], dim=2)
        return Items(written(context, begins, needles), self._turns(keys, values))

    def _turns(self, keys: Tensor, values: Tensor) -> tuple[tuple[Tensor, Tensor], ...]:
        if not self.together:
            return tuple((_asks(ASK, keys[:, at : at + 1]), values[:, at]) for at in range(self.asked))
        keys = keys[:, : self.asked]
        answer = torch.cat([keys[:, :, None], values[:, : self.asked]], dim=2).flatten(1)
        return ((_asks(EACH, keys), answer),)


@dataclass(frozen=True)
class Variables:
    """``SET name value`` is followed by a ``SET name name`` for each hop, in this order.

    ``ASK name`` asks for the value of the last name.
    """

    name: str = "variables"
    hops: int = 2
    chains: int = 2
    haystack: Haystack = noise
    remapped: bool = True

    def make(self, batch: int, length: int, rng: torch.Generator, *, depth: float | None = None) -> Items:
        size, links = length - 3, self.hops + 1
        context = filled(self.haystack, batch, size, rng, needed=3 * self.chains * links)
        names = distinct(batch, self.chains * links, KEYS, rng).unflatten(1, (self.chains, links))
        values = drawn(batch, self.chains, VALUES, rng)
        pinned = at_depth(batch, links, 3, size - 1, depth, rng)
        begins = (
            inserted(pinned, (self.chains - 1) * links, 3, size - 1, rng).unflatten(1, (self.chains, links)).sort(-1).values
        )
        chains = torch.stack(
            [torch.full_like(names, SET), names, torch.cat([values[:, :, None], names[:, :, :-1]], dim=2)], dim=3
        )
        context = written(context, begins.flatten(1), chains.flatten(1, 2))
        return Items(context, ((_asks(ASK, names[:, 0, -1:]), values[:, :1]),))


@dataclass(frozen=True)
class Copy:
    """``COPY`` and a block of ``size`` different symbols are in the haystack. A second ``COPY`` asks for the block."""

    name: str = "copy"
    size: int = 32
    haystack: Haystack = noise
    remapped: bool = True

    def make(self, batch: int, length: int, rng: torch.Generator, *, depth: float | None = None) -> Items:
        size = length - self.size - 1
        context = filled(self.haystack, batch, size, rng, needed=self.size + 1)
        block = distinct(batch, self.size, SYMBOLS, rng)
        begins = at_depth(batch, 1, self.size + 1, size - 1, depth, rng)
        question = block.new_full((batch, 1), COPY)
        context = written(context, begins, torch.cat([question, block], dim=1)[:, None])
        return Items(context, ((question, block),))


@dataclass(frozen=True)
class Recall:
    """A block of ``pairs`` pairs ``key value`` has nothing between them. ``ASK key`` asks for ``asked`` of them."""

    name: str = "recall"
    pairs: int = 32
    asked: int = 8
    haystack: Haystack = noise
    remapped: bool = True

    def make(self, batch: int, length: int, rng: torch.Generator, *, depth: float | None = None) -> Items:
        size = length - 3 * self.asked
        context = filled(self.haystack, batch, size, rng, needed=2 * self.pairs)
        block = torch.stack([distinct(batch, self.pairs, KEYS, rng), drawn(batch, self.pairs, VALUES, rng)], dim=2)
        begins = at_depth(batch, 1, 2 * self.pairs, size - 1, depth, rng)
        context = written(context, begins, block.flatten(1)[:, None])
        order = torch.rand(batch, self.pairs, generator=rng, device=rng.device).argsort(-1)[:, : self.asked]
        asked = block.gather(1, order[:, :, None].expand(-1, -1, 2))
        turns = tuple((_asks(ASK, asked[:, at, :1]), asked[:, at, 1:]) for at in range(self.asked))
        return Items(context, turns)


def _asks(marker: int, names: Tensor) -> Tensor:
    return torch.cat([names.new_full((len(names), 1), marker), names], dim=1)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Needles("single", 1, 1),
        Needles("multi", 4, 4),
        Needles("multi_key", 16, 1),
        Needles("multi_query", 8, 2, together=True),
        Variables(),
        Copy(),
        Recall(),
        Counting(),
        Needles("turns", 8, 5),
        Sums(),
        Brackets(),
    )
}
