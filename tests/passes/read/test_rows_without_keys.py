"""The report says where a query that sees no key, or a weakly hidden key, gets another result than in the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.comparison import compare, qkv
from support.spelling import SMALLEST, Attention, N, additive, sdpa, tril


def one_blind(m: Tensor) -> Tensor:
    """``m`` without any key for the last query."""
    return m & (torch.arange(N).view(-1, 1) < N - 1)


BLIND: dict[str, tuple[Attention, float, str]] = {
    "finite": (lambda q, k, v, m: (q @ k.mT + additive(m, -1e9)).softmax(-1) @ v, 1.0, "the mean of all values"),
    "filled": (lambda q, k, v, m: (q @ k.mT).masked_fill(~m, SMALLEST).softmax(-1) @ v, 1.0, "the mean of all values"),
    "infinite": (lambda q, k, v, m: (q @ k.mT + additive(m)).softmax(-1) @ v, torch.nan, "NaN"),
    "no smaller": (
        lambda q, k, v, m: (q @ k.mT + additive(m)).clamp(min=SMALLEST).softmax(-1) @ v,
        1.0,
        "the mean of all values",
    ),
    "no NaN": (lambda q, k, v, m: (q @ k.mT + additive(m)).softmax(-1).nan_to_num() @ v, 0.0, ""),
    "zeroed": (
        lambda q, k, v, m: (q @ k.mT).masked_fill(h := ~m, -1e9).softmax(-1).masked_fill(h, 0.0) @ v,
        0.0,
        "",
    ),
    "sdpa": (lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), 0.0, ""),
    "sdpa with numbers": (lambda q, k, v, m: sdpa(q, k, v, attn_mask=additive(m, SMALLEST)), 1.0, "the mean of all values"),
}


@pytest.mark.parametrize("form", BLIND)
def test_the_report_says_what_a_query_without_keys_gets(form: str) -> None:
    """All values are 1 here, so a mean of values is 1. Queries that see a key get the same as in the model."""
    attention, blind, words = BLIND[form]
    q, k, v = qkv()
    result = compare(attention, q, k, torch.ones_like(v), one_blind(tril()))
    last = result.wanted[..., -1, :]
    torch.testing.assert_close(last, torch.full_like(last, blind), equal_nan=True)
    assert bool((result.got[..., -1, :] == 0).all())
    torch.testing.assert_close(result.got[..., :-1, :], result.wanted[..., :-1, :])
    (site,) = result.report.sites
    said = f"a query that sees no key gets zeros, and in the model {words}"
    assert (said in site.reason) if words else ("sees no key" not in site.reason)


def test_the_report_says_that_a_small_fill_counts_as_hidden() -> None:
    causal_only = compare(lambda q, k, v, m: torch.where(m, q @ k.mT, -1e4).softmax(-1) @ v, *qkv(), tril())
    assert "keys with a score of -10000 get no weight" in causal_only.report.sites[0].reason
    smallest = compare(lambda q, k, v, m: torch.where(m, q @ k.mT, SMALLEST).softmax(-1) @ v, *qkv(), tril())
    assert "get no weight" not in smallest.report.sites[0].reason
