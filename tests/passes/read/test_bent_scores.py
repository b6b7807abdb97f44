"""Scores that a model scales, caps or clamps after other changes are read in this order, or left where keys would come back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.comparison import assert_left, assert_read, compare, qkv
from support.spelling import Attention, H, N, additive, tril


def heads() -> Tensor:
    return torch.arange(1.0, H + 1).view(H, 1, 1) / 2


BENT: dict[str, tuple[Attention, str]] = {
    "a cap of a bias": (
        lambda q, k, v, m: (((q @ k.mT + m.float()) / 3).tanh() * 3).softmax(-1) @ v,
        "full, bias >> scaled(3.0) >> softcap(3.0)",
    ),
    "a cap, then a factor by head": (
        lambda q, k, v, m: ((q @ k.mT).tanh() * heads()).softmax(-1) @ v,
        "full, softcap(1.0) >> scaled",
    ),
    "a bias, then a factor by head": (
        lambda q, k, v, m: ((q @ k.mT + m.float()) / heads()).softmax(-1) @ v,
        "full, bias >> scaled",
    ),
    "a bias, then a factor by query": (
        lambda q, k, v, m: ((q @ k.mT + m.float()) * (torch.arange(N).view(N, 1) + 1.0).log()).softmax(-1) @ v,
        "full, bias >> scaled",
    ),
    "a bias, then a negative number": (
        lambda q, k, v, m: (-0.5 * (q @ k.mT + m.float())).softmax(-1) @ v,
        "full, bias >> scaled(-0.5)",
    ),
    "a clamp": (lambda q, k, v, m: (q @ k.mT).clamp(-0.5, 0.5).softmax(-1) @ v, "full, clamped(-0.5, 0.5)"),
    "a clamp from above": (lambda q, k, v, m: (q @ k.mT).clamp(max=0.5).softmax(-1) @ v, "full, clamped(-inf, 0.5)"),
    "a minimum": (lambda q, k, v, m: torch.minimum(q @ k.mT, torch.tensor(0.5)).softmax(-1) @ v, "full, clamped(-inf, 0.5)"),
    "a clamp, then a mask": (
        lambda q, k, v, m: (((q @ k.mT).clamp(-0.5, 0.5) * 2) + additive(m)).softmax(-1) @ v,
        "explicit, clamped(-0.5, 0.5) >> scaled(2.0)",
    ),
    "a clamp of a cap of a bias": (
        lambda q, k, v, m: ((q @ k.mT + m.float()).tanh().clamp(min=0.1)).masked_fill(~m, -torch.inf).softmax(-1) @ v,
        "explicit, bias >> softcap(1.0) >> clamped(0.1, inf)",
    ),
}


@pytest.mark.parametrize("form", BENT)
def test_changes_are_read_in_their_order(form: str) -> None:
    attention, mask = BENT[form]
    assert_read(compare(attention, *qkv(), tril()), mask)


def of_maximum(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = q @ k.mT
    return (scores - scores.amax(-1, keepdim=True)).clamp(min=-1.0).softmax(-1) @ v


def test_a_maximum_below_a_clamp_is_a_bias() -> None:
    assert_read(compare(of_maximum, *qkv(), tril()), "full, bias >> clamped(-1.0, inf)")


LEFT: dict[str, Attention] = {
    "a cap of a mask": lambda q, k, v, m: ((q @ k.mT).masked_fill(~m, -1e9).tanh() * 5).softmax(-1) @ v,
    "a clamp of a mask": lambda q, k, v, m: (q @ k.mT).masked_fill(~m, -1e9).clamp(-3.0, 3.0).softmax(-1) @ v,
    "a mask times a negative number": lambda q, k, v, m: ((q @ k.mT).masked_fill(~m, -1e9) * -0.5).softmax(-1) @ v,
    "a mask times a factor by head": lambda q, k, v, m: ((q @ k.mT).masked_fill(~m, -1e9) * heads()).softmax(-1) @ v,
}


def test_kernels_take_all_of_them() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
        scores = ((q @ k.mT + m.float()).tanh() * heads()).clamp(-0.75, 1.0)
        return scores.masked_fill(~m, -torch.inf).softmax(-1) @ v

    result = compare(attention, *qkv(), tril(), inner="inductor")
    assert_read(result, "explicit, bias >> softcap(1.0) >> scaled >> clamped(-0.75, 1.0)")
    assert [site.kernel for site in result.report.rewritten] == ["FlexAttention"]


@pytest.mark.parametrize("form", LEFT)
def test_what_would_show_hidden_keys_again_is_left(form: str) -> None:
    report = compare(LEFT[form], *qkv(), tril())
    assert_left(report, "scores are scaled, capped or clamped after keys were hidden: hide keys in the last step")
