"""Attention that the passes do not read is in the report, with the operation that they do not understand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.comparison import assert_left, compare, qkv
from support.spelling import Attention, B, D, H, N, additive, merged, tril

LEFT: dict[str, tuple[Attention, str]] = {
    "a part of the scores written": (lambda q, k, v, m: part_written(q, k, v), "pass through setitem"),
    "relu below a mask": (lambda q, k, v, m: ((q @ k.mT).relu() / 2 + additive(m)).softmax(-1) @ v, "pass through relu"),
    "roll inside a sum": (lambda q, k, v, m: ((q @ k.mT).roll(1, -1) + m.float()).softmax(-1) @ v, "pass through roll"),
    "scores times a matrix": (lambda q, k, v, m: (q @ k.mT * m).softmax(-1) @ v, "mul multiplies each score by another number"),
    "softmax over queries": (lambda q, k, v, m: (q @ k.mT).softmax(-2) @ v, "softmax runs over axis -2"),
    "softmax by hand": (
        lambda q, k, v, m: ((e := (q @ k.mT).exp()) / e.sum(-1, keepdim=True)) @ v,
        "written with exp",
    ),
    "logsumexp": (
        lambda q, k, v, m: ((s := q @ k.mT) - s.logsumexp(-1, keepdim=True)).exp() @ v,
        "written with exp",
    ),
    "two axes": (lambda q, k, v, m: (q[0, 0] @ k[0, 0].mT).softmax(-1) @ v[0, 0], "the query has 2 axes"),
    "other weights zeroed": (
        lambda q, k, v, m: (q @ k.mT).softmax(-1).masked_fill(~m, 0) @ v,
        "whose mask does not hide scores",
    ),
    "weights on the right": (lambda q, k, v, m: v.mT @ (q @ k.mT).softmax(-1), "not the left operand"),
    "weights used twice": (lambda q, k, v, m: (w := (q @ k.mT).softmax(-1)) @ v + w @ k, "used by several products"),
    "a view of the weights returned": (
        lambda q, k, v, m: ((w := (q @ k.mT).softmax(-1)).view(B * H, N, N) @ merged(v)).view(B, H, N, D) + w.sum(),
        "the attention weights are also used by",
    ),
    "a negative scale after a mask": (
        lambda q, k, v, m: ((q @ k.mT + additive(m, -1e9)) * -1.0).softmax(-1) @ v,
        "scores are scaled, capped or clamped after keys were hidden",
    ),
    "scores broadcast by a mask": (
        lambda q, k, v, m: (q[:1] @ k[:1].mT + torch.zeros(B, 1, N, N)).softmax(-1) @ v,
        "broadcasts the scores",
    ),
    "a number below a cap": (lambda q, k, v, m: ((q @ k.mT + 1).tanh() * 5).softmax(-1) @ v, "pass through add"),
    "chunks": (
        lambda q, k, v, m: (q @ k.mT).unflatten(-1, (3, 4)).softmax(-1).flatten(-2) @ v,
        "pass through flatten",
    ),
}


def part_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT
    scores[..., 3:] = 0
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("form", LEFT)
def test_what_is_not_understood_is_left_and_names_the_culprit(form: str) -> None:
    attention, reason = LEFT[form]
    assert_left(compare(attention, *qkv(), tril()), reason)
