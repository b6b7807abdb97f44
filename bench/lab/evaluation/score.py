"""Scores: exact match under teacher forcing, and perplexity by position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.lab.data.haystack import Text
from bench.lab.data.items import Items, Task
from bench.lab.data.words import START

CHUNK = 1 << 16  # tokens of a forward pass


def exact_match(model: Any, items: Items) -> Tensor:
    """Return ``[B, turns]``: whether every token of a turn's answer is the most likely one, given the right tokens before."""
    tokens = items.tokens()
    right = torch.cat([_guesses(model, rows) == rows[:, 1:] for rows in _chunks(tokens)])
    right = torch.cat([torch.ones_like(right[:, :1]), right], dim=1)  # the first token is given
    turns, end = [], items.context.shape[1]
    for question, answer in items.turns:
        begin, end = end + question.shape[1], end + question.shape[1] + answer.shape[1]
        turns.append(right[:, begin:end].all(1))
    return torch.stack(turns, dim=1)


def accuracy(model: Any, task: Task, length: int, rng: torch.Generator, *, items: int) -> float:
    """Return the share of a task's questions whose whole answer is right, over ``items`` contexts."""
    return float(exact_match(model, task.make(items, length, rng)).float().mean())


@torch.no_grad()
def perplexity_by_position(model: Any, text: Text, length: int, bucket: int, *, rows: int = 32) -> Tensor:
    """Return ``[length // bucket]``: the perplexity of each ``bucket`` of tokens, over ``rows`` stretches of ``text``.

    The stretches begin at equal distances. Raises ``ValueError`` unless ``length`` is a multiple of ``bucket`` and no longer
    than the text.
    """
    if length % bucket or length > len(text.pool):
        raise ValueError(f"length needs to be a multiple of {bucket} and <= {len(text.pool)}, got {length}")
    begins = torch.linspace(0, len(text.pool) - length, rows, device=text.pool.device).long()
    stretches = text.pool[begins[:, None] + torch.arange(length, device=begins.device)]
    tokens = torch.cat([stretches.new_full((rows, 1), START), stretches], dim=1)
    losses = torch.cat([_losses(model, chunk) for chunk in _chunks(tokens)])
    return losses.view(rows, length // bucket, bucket).double().mean((0, 2)).exp()


def _chunks(tokens: Tensor) -> list[Tensor]:
    return list(tokens.split(max(1, CHUNK // tokens.shape[1])))


@torch.no_grad()
def _guesses(model: Any, tokens: Tensor) -> Tensor:
    guesses: Tensor = model(input_ids=tokens, use_cache=False).logits[:, :-1].argmax(-1)
    return guesses


def _losses(model: Any, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    return cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
