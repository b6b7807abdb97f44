"""The items of a task (contexts with questions and answers), and functions that place tokens in a context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bench.lab.data.haystack import Haystack
from bench.lab.data.words import START


@dataclass(frozen=True, eq=False)
class Items:
    """A batch of contexts, each with the same number of turns; a turn is a question and its answer."""

    context: Tensor  # [B, C]
    turns: tuple[tuple[Tensor, Tensor], ...]  # ([B, q], [B, a]) in order

    def tokens(self) -> Tensor:
        """Return ``[B, N]``: the context, then the question and the answer of every turn."""
        return torch.cat([self.context, *(part for turn in self.turns for part in turn)], dim=1)

    def asked(self) -> Tensor:
        """Return ``[B, N]``, true at the tokens of answers."""
        parts = [torch.zeros_like(self.context, dtype=torch.bool)]
        for question, answer in self.turns:
            parts += [torch.zeros_like(question, dtype=torch.bool), torch.ones_like(answer, dtype=torch.bool)]
        return torch.cat(parts, dim=1)


class Task(Protocol):
    """A maker of items with exact answers."""

    @property
    def name(self) -> str:
        """The name of the task in results."""
        ...

    @property
    def remapped(self) -> bool:
        """Whether ``depth`` can place something."""
        ...

    def make(self, batch: int, length: int, rng: torch.Generator, *, depth: float | None = None) -> Items:
        """Make items of exactly ``length`` tokens on the generator's device.

        ``depth`` places what the first question asks for: 0 is the beginning of the context, 1 is its end. The place is exact
        up to the size of a needle. None places it anywhere. Raises ``ValueError`` if ``length`` is too small, or if ``depth``
        is given to a task that places nothing.
        """
        ...


def drawn(batch: int, count: int, words: range, rng: torch.Generator) -> Tensor:
    """Draw ``[batch, count]`` of ``words``, with repetitions."""
    return torch.randint(words.start, words.stop, (batch, count), generator=rng, device=rng.device)


def distinct(batch: int, count: int, words: range, rng: torch.Generator) -> Tensor:
    """Draw ``[batch, count]`` of ``words``, without repetitions within a row of the batch."""
    return torch.rand(batch, len(words), generator=rng, device=rng.device).argsort(-1)[:, :count] + words.start


def filled(haystack: Haystack, batch: int, length: int, rng: torch.Generator, *, needed: int = 0) -> Tensor:
    """Return a context ``[batch, length]``: START and a haystack, which must have room for ``needed`` tokens."""
    if length < needed + 1:
        raise ValueError(f"a context with room for {needed} tokens needs length > {needed}, got {length}")
    start = torch.full((batch, 1), START, device=rng.device)
    return torch.cat([start, haystack(batch, length - 1, rng)], dim=1)


def spread(batch: int, count: int, width: int, room: int, rng: torch.Generator) -> Tensor:
    """Return ``[batch, count]``: ascending beginnings of disjoint stretches of ``width`` tokens within ``room`` tokens."""
    free = torch.randint(room - count * width + 1, (batch, count), generator=rng, device=rng.device)
    return free.sort(-1).values + width * torch.arange(count, device=rng.device)


def at_depth(batch: int, count: int, width: int, room: int, depth: float | None, rng: torch.Generator) -> Tensor:
    """Return what ``spread`` returns, with the first stretch at ``depth``.

    Depth 0 is the first place, and 1 the last place that leaves room for the other stretches. None is any place.
    """
    if depth is None:
        return spread(batch, count, width, room, rng)
    if not 0 <= depth <= 1:
        raise ValueError(f"depth needs 0 <= depth <= 1, got {depth}")
    first = round(depth * (room - count * width))
    begin = torch.full((batch, 1), first, device=rng.device)
    return torch.cat([begin, first + width + spread(batch, count - 1, width, room - first - width, rng)], dim=1)


def inserted(pinned: Tensor, others: int, width: int, room: int, rng: torch.Generator) -> Tensor:
    """Return ``[batch, pinned + others]``: beginnings of disjoint stretches within ``room`` tokens.

    The first columns are those of ``pinned``, which ascends. A pinned stretch moves back by less than ``width`` where it would
    cut another one in two.
    """
    batch, count = pinned.shape
    begins = spread(batch, others, width, room - count * width, rng)
    begins = begins.gather(1, torch.rand(begins.shape, generator=rng, device=rng.device).argsort(-1))
    for column in range(count):
        at = pinned[:, column : column + 1]
        cut = (begins < at) & (at < begins + width)
        at = torch.where(cut, begins, at).amin(1, keepdim=True) if begins.shape[1] else at
        begins = torch.cat([begins + width * (begins >= at), at], dim=1)
    return torch.cat([begins[:, others:], begins[:, :others]], dim=1)


def written(context: Tensor, begins: Tensor, told: Tensor) -> Tensor:
    """Return ``context`` with ``told`` ``[B, count, width]`` written at ``begins`` ``[B, count]``, counted from after START."""
    where = 1 + begins[:, :, None] + torch.arange(told.shape[2], device=told.device)
    return context.scatter(1, where.flatten(1), told.flatten(1))
