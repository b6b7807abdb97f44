"""Check that policies count the tokens of padded texts without a cache, against attention with every pair written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, per_head, sink, sliding_window, strided

N, HEADS = 10, 2
POLICIES: list[Mask] = [
    causal & (sink(2) | sliding_window(3)),
    causal & strided(3, 1),
    per_head([causal, causal & (sink(1) | sliding_window(2))]),
]


def attention(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
    at = torch.arange(q.shape[2])
    seen = (at[:, None] >= at)[None, None] & valid[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)


def expected(q: Tensor, k: Tensor, v: Tensor, valid: list[list[bool]], policy: Mask) -> Tensor:
    """Attention in which the policy sees the number of tokens before each token; NaN for padding."""
    out = torch.full_like(q, torch.nan)
    for b, row in enumerate(valid):
        tokens = [n for n in range(N) if row[n]]
        for h in range(HEADS):
            for i, column in enumerate(tokens):
                seen = [c for j, c in enumerate(tokens) if j <= i and bool(policy.for_heads(HEADS)(0, h, i, j))]
                if seen:
                    weights = (k[b, h, seen] @ q[b, h, column] * q.shape[-1] ** -0.5).softmax(0)
                    out[b, h, column] = weights @ v[b, h, seen]
                else:
                    out[b, h, column] = 0
    return out


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.usefixtures("fresh")
def test_a_policy_counts_tokens_wherever_the_padding_is(policy: Mask) -> None:
    run = torch.compile(attention, backend=sc.Backend(policy, inner="eager"))
    q, k, v = torch.randn(3, 2, HEADS, N, 8, generator=torch.Generator().manual_seed(0)).unbind()

    @settings(max_examples=40)
    @given(st.lists(st.lists(st.booleans(), min_size=N, max_size=N), min_size=2, max_size=2))
    def check(valid: list[list[bool]]) -> None:
        wanted = expected(q, k, v, valid, policy)
        got = run(q, k, v, torch.tensor(valid))
        is_token = torch.tensor(valid)[:, None, :, None].expand_as(got)
        torch.testing.assert_close(got[is_token], wanted[is_token])

    check()


@pytest.mark.usefixtures("fresh")
def test_the_generated_kernel_sees_the_same() -> None:
    policy = POLICIES[0]
    q, k, v = torch.randn(3, 2, HEADS, N, 16, generator=torch.Generator().manual_seed(0)).unbind()
    run = torch.compile(attention, backend=sc.Backend(policy))
    for valid in ([[False] * 4 + [True] * 6, [True] * 10], [[False, True] * 5, [True] * 7 + [False] * 3]):
        got, is_token = run(q, k, v, torch.tensor(valid)), torch.tensor(valid)[:, None, :, None].expand_as(q)
        torch.testing.assert_close(got[is_token], expected(q, k, v, valid, policy)[is_token])


@pytest.mark.usefixtures("fresh")
def test_the_report_has_the_policy_as_it_was_given() -> None:
    policy, backend = POLICIES[0], sc.Backend(POLICIES[0], inner="eager")
    q, k, v = torch.randn(3, 2, HEADS, N, 8, generator=torch.Generator().manual_seed(0)).unbind()
    torch.compile(attention, backend=backend)(q, k, v, torch.ones(2, N, dtype=torch.bool))
    assert [site.policy_mask for site in backend.report.sites] == [str(policy)]
