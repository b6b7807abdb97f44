"""Attention that models write as matmul and softmax is read correctly, and other products are not changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

import sparse_compile as sc
from support.comparison import assert_left, assert_read, compare, qkv
from support.spelling import Attention, N, additive, tril


def gpt2_style(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2))
    scores = scores / torch.full([], v.size(-1) ** 0.5, dtype=scores.dtype)
    scores = torch.where(mask, scores.to(scores.dtype), torch.full([], torch.finfo(scores.dtype).min))
    return torch.matmul(F.dropout(nn.Softmax(dim=-1)(scores).type(v.dtype), 0.1, training=False), v)


def llama_style(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.25 + additive(mask)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.0, training=True), v)


SPELLED_OUT: dict[str, tuple[Attention, str]] = {
    "operator": (lambda q, k, v, m: (q @ k.transpose(-2, -1)).softmax(-1) @ v, "full"),
    "matmul method": (lambda q, k, v, m: q.matmul(k.transpose(2, 3)).softmax(dim=3).matmul(v), "full"),
    "mT": (lambda q, k, v, m: (q @ k.mT).softmax(-1) @ v, "full"),
    "permute": (lambda q, k, v, m: (q @ k.permute(0, 1, 3, 2)).softmax(-1) @ v, "full"),
    "swapaxes": (lambda q, k, v, m: (q @ k.swapaxes(-1, -2)).softmax(-1) @ v, "full"),
    "scale before": (lambda q, k, v, m: ((q * 0.2) @ k.mT).softmax(-1) @ v, "full"),
    "scale after": (lambda q, k, v, m: (0.2 * (q @ k.mT)).softmax(-1) @ v, "full"),
    "divided by a root": (lambda q, k, v, m: F.softmax(torch.matmul(q, k.mT) / math.sqrt(q.shape[-1]), -1) @ v, "full"),
    "additive mask": (lambda q, k, v, m: (q @ k.mT + additive(m)).softmax(-1) @ v, "explicit"),
    "mask plus scores": (lambda q, k, v, m: (additive(m) + q @ k.mT).softmax(-1) @ v, "explicit"),
    "in-place sum": (lambda q, k, v, m: F.softmax((q @ k.mT).add_(additive(m)), -1) @ v, "explicit"),
    "masked_fill": (lambda q, k, v, m: (q @ k.mT).masked_fill(~m, -torch.inf).softmax(-1) @ v, "explicit"),
    "where": (lambda q, k, v, m: torch.where(m, q @ k.mT, -torch.inf).softmax(-1) @ v, "explicit"),
    "where, inverted": (lambda q, k, v, m: torch.where(~m, torch.tensor(-1e9), q @ k.mT).softmax(-1) @ v, "explicit"),
    "softcap": (lambda q, k, v, m: (torch.tanh(q @ k.mT * 0.3 / 5.0) * 5.0).softmax(-1) @ v, "full, softcap(5.0)"),
    "float32 softmax": (lambda q, k, v, m: (q @ k.mT).float().softmax(-1).to(v.dtype) @ v, "full"),
    "gpt2": (gpt2_style, "explicit"),
    "llama": (llama_style, "explicit"),
    "two biases": (lambda q, k, v, m: (q @ k.mT + m.float() + m.float() / 2).softmax(-1) @ v, "full, bias >> bias"),
    "grouped": (
        lambda q, k, v, m: (q @ k[:, :2].repeat_interleave(2, 1).mT).softmax(-1) @ v[:, :2].repeat_interleave(2, 1),
        "full",
    ),
}


@pytest.mark.parametrize("form", SPELLED_OUT)
def test_attention_spelled_out_is_read(form: str) -> None:
    attention, mask = SPELLED_OUT[form]
    assert_read(compare(attention, *qkv(), tril()), mask)


def test_learned_sinks_are_read() -> None:
    """gpt-oss adds a column of logits for each head, and cuts it off after the softmax."""

    def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(2, 3)) * 0.3
        sinks = sinks.reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[-2], -1)
        combined = torch.cat([scores, sinks], dim=-1)
        combined = combined - combined.max(dim=-1, keepdim=True).values
        weights = F.softmax(combined, dim=-1, dtype=combined.dtype)[..., :-1]
        return torch.matmul(weights, v)

    assert_read(compare(attention, *qkv(), torch.randn(4)), "full, sink_logits")


def test_weights_that_are_only_stored_before_the_cast_do_not_matter() -> None:
    """If scores or float32 weights are used elsewhere, they are computed for that use, and the attention is still rewritten."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        return scores.softmax(-1).to(v.dtype) @ v + scores.mean()

    assert_read(compare(attention, *qkv()), "full")


LEFT: dict[str, tuple[Attention, str]] = {
    "weights returned": (lambda q, k, v: ((w := (q @ k.mT).softmax(-1)) @ v) + w.sum(), "attention weights are also used by"),
    "weights dropped": (
        lambda q, k, v: F.dropout((q @ k.mT).softmax(-1), 1e-9) @ v,
        "dropout of attention weights with p=1e-09",
    ),
    "relu of scores": (lambda q, k, v: (q @ k.mT).relu().softmax(-1) @ v, "scores pass through relu, which"),
    "scores assigned": (lambda q, k, v: overwrite(q, k, v, lambda s: s[..., 0].fill_(-torch.inf)), "overwritten in place"),
    "weights masked": (lambda q, k, v: (q @ k.mT).softmax(-1).masked_fill(~tril(), 0) @ v, "weights pass through masked_fill"),
    "weights scaled": (lambda q, k, v: ((q @ k.mT).softmax(-1) * 0.5) @ v, "weights pass through mul"),
}


def overwrite(q: Tensor, k: Tensor, v: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
    scores = q @ k.transpose(-1, -2)
    change(scores)
    return scores.softmax(dim=-1) @ v


@pytest.mark.parametrize("form", LEFT)
def test_what_cannot_be_rewritten_is_left_with_its_reason(form: str) -> None:
    attention, reason = LEFT[form]
    assert_left(compare(attention, *qkv()), reason)


def test_weights_overwritten_in_place_are_left() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = (q @ k.mT).softmax(-1)
        dropped = F.dropout(weights, 0.1, training=False)  # without training, dropout returns the same tensor
        weights[..., 0] = 0
        return dropped @ v

    assert_left(compare(attention, *qkv()), "overwritten in place")


def test_operands_overwritten_between_the_products_are_left() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = q @ k.transpose(2, 3) + bias
        k.zero_()
        return scores.softmax(-1) @ v

    assert_left(compare(attention, *qkv(), torch.randn(N, N)), "overwritten in place")

    def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = q @ k.transpose(2, 3) + bias
        bias.zero_()
        return scores.softmax(-1) @ v

    assert_left(compare(biased, *qkv(), torch.randn(N, N)), "overwritten in place")


def test_a_float_attribute_that_became_a_symbol_is_read() -> None:
    """``dynamic=True`` makes float attributes of modules dynamic too. The graph holds for their current value."""

    class Scaled(nn.Module):
        scaling = 0.3

        def forward(self, x: Tensor) -> Any:
            q = x.unflatten(-1, (4, 8)).transpose(1, 2)
            return (q @ q.transpose(2, 3) * self.scaling).softmax(-1) @ q

    model, x = Scaled(), torch.randn(2, N, 32)
    assert_read(compare(model, x, dynamic=True), "full")
    fast = torch.compile(model, backend=sc.Backend(inner="eager"), dynamic=True)
    for scaling in (0.3, 0.6):
        model.scaling = scaling
        torch.testing.assert_close(fast(x), model(x))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")  # from the eager model
def test_flex_attention_of_the_model_is_left() -> None:
    assert_left(compare(lambda q, k, v: flex_attention(q, k, v), *qkv()), "the model calls FlexAttention itself")


# -- no attention ---------------------------------------------------------------------------------------------------------


NO_ATTENTION: dict[str, Attention] = {
    "no softmax": lambda q, k, v: (q @ k.mT).sigmoid() @ v,
    "matmul chain": lambda q, k, v: q @ k.mT @ v,
    "classifier": lambda q, k, v: (q[:, 0] @ k[0, 0, :8]).softmax(-1),
    "softmax of no product": lambda q, k, v: (q + k).softmax(-1) @ v.mT,
}


@pytest.mark.parametrize("form", NO_ATTENTION)
def test_what_is_no_attention_is_not_in_the_report(form: str) -> None:
    result = compare(NO_ATTENTION[form], *qkv())
    assert result.report.sites == []
    assert result.report.compiles == 1
    assert result.error < 1e-5


def gate(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mixture of experts: the softmax over the outputs of an MLP, times a table."""
    return F.linear(q.relu(), k[0, 0]).softmax(-1) @ v


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).transpose(2, 3) @ v)


@pytest.mark.parametrize("mixture", [gate, linear_attention], ids=lambda f: f.__name__)
def test_a_softmax_of_no_product_is_not_rewritten(mixture: Attention) -> None:
    result = compare(mixture, *qkv())
    assert result.report.rewritten == []
    assert all(reason.startswith("scores pass through") for reason in result.reasons)
    assert result.error == 0
