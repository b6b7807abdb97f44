"""Batches for training: rows of several tasks and of text, and the weight of each token in the loss."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.lab.data.answers import Brackets, Counting, Sums
from bench.lab.data.haystack import Text, noise
from bench.lab.data.items import Items, Task, filled
from bench.lab.data.tasks import Copy, Needles, Recall, Variables

GROUPS = 8  # groups of a batch; the rows of a group come from one task
OTHERS = 0.3  # weight of a row's other tokens together; its answer tokens together weigh 1

MIXTURES: dict[str, dict[str, float]] = {
    # Without many copies at first, no induction heads appear, and the model retrieves nothing after 2,500 steps.
    "early": {"needles": 0.3, "copy": 0.5, "text": 0.2},
    "late": {
        "needles": 0.4, "copy": 0.1, "text": 0.2, "together": 0.06, "variables": 0.08, "recall": 0.06,
        "counting": 0.03, "sums": 0.03, "brackets": 0.04,
    },
    # For what the first 8,000 steps teach too slowly.
    "hard": {
        "needles": 0.25, "copy": 0.08, "text": 0.15, "together": 0.06, "variables": 0.16, "recall": 0.04,
        "counting": 0.06, "sums": 0.1, "brackets": 0.1,
    },
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Batch:
    """Tokens and the weight of each in the loss. The first token of a row is never an answer and has weight 0."""

    tokens: Tensor  # [B, N]
    weights: Tensor  # [B, N], their sum is about 1


def mixed(
    rows: int, length: int, shares: Mapping[str, float], text: Text, *, chance: random.Random, rng: torch.Generator
) -> Batch:
    """Return ``rows`` of ``length`` tokens with these ``shares`` of kinds. ``chance`` draws the tasks, ``rng`` their tokens."""
    groups = []
    for kind in chance.choices(list(shares), list(shares.values()), k=GROUPS):
        if kind == "text":
            tokens = filled(text, rows // GROUPS, length, rng)
            groups.append((tokens, torch.zeros_like(tokens, dtype=torch.bool)))
        else:
            items: Items = drawn_task(kind, length, text, chance).make(rows // GROUPS, length, rng)
            groups.append((items.tokens(), items.asked()))
    tokens, asked = (torch.cat(side) for side in zip(*groups, strict=True))
    return Batch(tokens, _weights(asked))


def drawn_task(kind: str, length: int, text: Text, chance: random.Random) -> Task:
    """Return a task of this kind with random parameters and haystack. Raises ``ValueError`` for unknown kinds."""
    haystack = chance.choice((noise, text))
    match kind:
        case "needles":
            needles = chance.choice((1, 2, 3, 4, 5, 6, 8, 12, 16))
            return Needles(kind, needles, min(needles, 5), haystack=haystack)
        case "together":
            return Needles(kind, chance.choice((2, 4, 8)), 2, together=True, haystack=haystack)
        case "copy":
            return Copy(size=chance.randint(24, min(128, length // 3)))
        case "variables":
            return Variables(hops=chance.choice((1, 2, 3)), haystack=haystack)
        case "recall":
            return Recall(pairs=chance.choice((16, 32)), haystack=haystack)
        case "counting":
            return Counting(haystack=haystack)
        case "sums":
            return Sums(haystack=haystack)
        case "brackets":
            return Brackets(haystack=haystack)
    raise ValueError(f"a kind needs to be a name in MIXTURES, got {kind!r}")


def _weights(asked: Tensor) -> Tensor:
    """Weigh rows alike: answer tokens together 1 and the others together 0.3, or 1 in a row without answers."""
    count = asked.sum(1, keepdim=True)
    others = torch.where(count > 0, OTHERS, 1.0) / (asked.shape[1] - 1 - count)
    weights = torch.where(asked, 1.0 / count.clamp(min=1), others) / len(asked)
    return torch.cat([torch.zeros_like(weights[:, :1]), weights[:, 1:]], dim=1)
