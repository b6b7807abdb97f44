"""FlexAttention's C++ kernel on CPU. A compile takes ten seconds, so there are few cases, each for a known trap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F
from transformers import StaticCache

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, document, per_head, sink, sliding_window
from support.models import DECODERS, left_padding, tokens

STREAMING = causal & (sink(4) | sliding_window(100))

pytestmark = pytest.mark.usefixtures("fresh")


def both(model: Any, *args: Any, policy: Mask | None = None, dynamic: bool | None = None) -> tuple[Any, Any, sc.Backend]:
    """Run the model through FlexAttention and through the dense reference."""
    backend = sc.Backend(policy, kernel="flex")
    fused = torch.compile(model, backend=backend, dynamic=dynamic)
    dense = torch.compile(model, backend=sc.Backend(policy, inner="eager"), dynamic=dynamic)
    return fused, dense, backend


def assert_equal(got: Tensor, wanted: Tensor) -> None:
    assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-5


def assert_fused(backend: sc.Backend) -> None:
    assert {site.kernel for site in backend.report.sites} == {"FlexAttention"}, str(backend.report)


class Projections(nn.Module):
    """Attention whose q and k are views of a linear layer's output (no rotary embeddings), with operations after it."""

    def __init__(self, heads: int = 4, kv_heads: int = 2, *, softcap: float = 0.0) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.softcap = heads, kv_heads, softcap
        self.qkv = nn.Linear(32, 16 * (heads + 2 * kv_heads))
        self.out = nn.Linear(16 * heads, 32)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        sizes = [16 * self.heads, 16 * self.kv_heads, 16 * self.kv_heads]
        q, k, v = (y.unflatten(-1, (-1, 16)).transpose(1, 2) for y in self.qkv(x).split(sizes, dim=-1))
        if self.softcap:
            group = self.heads // self.kv_heads
            k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
            scores = torch.tanh(q @ k.transpose(-1, -2) / 4 / self.softcap) * self.softcap
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            out = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
        elif bias is not None:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return torch.relu(out.transpose(1, 2).flatten(2) + 1)  # a pointwise epilogue on the output of the kernel


def test_views_of_one_projection_grouped_heads_and_an_epilogue_with_a_mask_per_head() -> None:
    model, x = Projections(), torch.randn(2, 300, 32)
    fused, dense, backend = both(model, policy=per_head([causal, STREAMING]))
    with torch.no_grad():
        assert_equal(fused(x), dense(x))
    assert_fused(backend)


def test_one_compile_serves_growing_lengths() -> None:
    model = Projections()
    fused, dense, backend = both(model, policy=STREAMING, dynamic=True)
    with torch.no_grad():
        for length in (256, 384, 300, 1000):
            x = torch.randn(1, length, 32)
            assert_equal(fused(x), dense(x))
    assert_fused(backend)
    assert backend.report.compiles == 1


def test_a_bias_is_read_by_the_kernel() -> None:
    """T5's relative positions and ALiBi reach attention as float masks."""
    model, x, bias = Projections(), torch.randn(2, 150, 32), torch.randn(1, 4, 150, 150)
    fused, dense, backend = both(model)
    with torch.no_grad():
        assert_equal(fused(x, bias), dense(x, bias))
    assert_fused(backend)
    assert "bias" in backend.report.sites[0].score_mod


def test_a_soft_cap_that_is_spelled_out_becomes_a_score_mod() -> None:
    model, x = Projections(softcap=2.0), torch.randn(1, 140, 32)
    fused, dense, backend = both(model)
    with torch.no_grad():
        assert_equal(fused(x), dense(x))
        assert_equal(fused(x), model(x))
    assert_fused(backend)
    assert backend.report.sites[0].score_mod == "softcap(2.0)"


def test_documents_of_a_policy_reach_the_kernel() -> None:
    model, x = Projections(), torch.randn(2, 200, 32)
    ids = torch.arange(200).div(60, rounding_mode="floor").expand(2, -1)
    fused, dense, backend = both(model, policy=document(ids))
    with torch.no_grad():
        assert_equal(fused(x), dense(x))
    assert_fused(backend)


def test_tensors_of_a_policy_with_lists_for_query_and_for_kv_heads() -> None:
    """A policy by KV head names its tensors in another order once it is expanded to query heads."""
    one, other = (document(torch.arange(40).div(n, rounding_mode="floor")[None]) for n in (7, 11))
    policy = per_head([one, other]) & per_head([other & one, one, other, other])
    fused, dense, _ = both(Projections(), policy=policy)
    x = torch.randn(2, 40, 32)
    with torch.no_grad():
        assert_equal(fused(x), dense(x))


@pytest.mark.parametrize("pattern", [[causal, STREAMING], [STREAMING, causal]], ids=str)
def test_heads_of_two_kernels_come_back_in_order(pattern: list[Mask]) -> None:
    model, x = Projections(), torch.randn(2, 300, 32)
    backend = sc.Backend(per_head(pattern))
    with torch.no_grad():
        wanted = torch.compile(model, backend=sc.Backend(per_head(pattern), inner="eager"))(x)
        assert_equal(torch.compile(model, backend=backend)(x), wanted)
    assert {site.kernel for site in backend.report.sites} <= {"SDPA + FlexAttention", "FlexAttention + SDPA"}


def test_queries_keys_and_values_may_be_one_buffer() -> None:
    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    fused, dense, backend = both(attend)
    x = torch.randn(1, 2, 130, 16)
    assert_equal(fused(x), dense(x))
    assert_fused(backend)


def test_static_cache_decoding_with_padding() -> None:
    """Every step adds to the cache's length in place, so positions must come from the length before the step."""
    model = DECODERS[0].build()
    backend = sc.Backend(causal & (sink(4) | sliding_window(16)))
    fast: Any = torch.compile(model, backend=backend)
    slow: Any = torch.compile(model, backend=sc.Backend(backend.policy, inner="eager"))
    ids, padding = tokens(2, 30), left_padding(2, 30)
    caches = [StaticCache(config=model.config, max_cache_len=40) for _ in range(2)]
    with torch.no_grad():
        for start, stop in ((0, 27), (27, 28), (28, 29), (29, 30)):
            got, wanted = (
                m(ids[:, start:stop], attention_mask=padding[:, :stop], past_key_values=cache).logits
                for m, cache in zip((fast, slow), caches, strict=True)
            )
            rows = padding[:, start:stop].bool()
            assert_equal(got[rows], wanted[rows])
    assert_fused(backend)
    assert backend.report.compiles <= 3


def attend_under(x: Tensor, mask: Tensor) -> Tensor:
    """Attention over ``[batch, length, 32]`` under a mask that is an argument."""
    q = x.unflatten(-1, (4, 8)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q.cos(), q.sin(), attn_mask=mask)


MASKS: dict[str, Callable[[int], Tensor]] = {
    "padding": lambda n: (torch.arange(n) >= torch.tensor([[3], [9]]))[:, None, None, :],
    "any pairs": lambda n: torch.rand(2, 1, n, n, generator=torch.Generator().manual_seed(1)) > 0.5,
    "bias": lambda n: torch.randn(1, 1, n, n, generator=torch.Generator().manual_seed(1)),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_growing_length_reach_the_kernel(kind: str) -> None:
    """The C++ template knows the sizes of q and k only. Sizes of a captured mask fail with ``ks2 was not declared``."""
    fused, _, backend = both(attend_under, dynamic=True)
    with torch.no_grad():
        for length in (130, 200):
            x, mask = torch.randn(2, length, 32), MASKS[kind](length)
            assert_equal(fused(x, mask), attend_under(x, mask))
    assert_fused(backend)
    assert backend.report.compiles == 1


def test_padding_overwritten_before_attention_is_read_before() -> None:
    def attend(x: Tensor, valid: Tensor) -> Tensor:
        mask = valid[:, None, None, :] & torch.ones(130, 130, dtype=torch.bool).tril()
        valid.fill_(True)
        return attend_under(x, mask)

    fused, _, backend = both(attend)
    x, valid = torch.randn(2, 130, 32), torch.arange(130).expand(2, 130) % 7 != 3
    with torch.no_grad():
        assert_equal(fused(x, valid.clone()), attend(x, valid.clone()))
    assert_fused(backend)


def test_policies_do_not_share_what_inductor_caches() -> None:
    """The graphs and shapes are equal. Only numbers in a mask, or the content of a tensor that it reads, differ."""
    x = torch.randn(1, 130, 32)
    halves, thirds = (document(torch.arange(130).div(n, rounding_mode="floor")[None]) for n in (65, 44))
    windows = (causal & sliding_window(n) for n in (3, 50))
    with fresh_cache():
        for policy in (halves, thirds, halves, *windows):
            torch._dynamo.reset()
            fused, _, backend = both(lambda x: attend_under(x, torch.ones(1, 1, 1, 130, dtype=torch.bool)), policy=policy)
            with torch.no_grad():
                assert_equal(fused(x), attend_under(x, policy.dense(130, 130)))
            assert_fused(backend)


def test_learned_sinks_run_the_reference_and_say_why() -> None:
    decoder = next(d for d in DECODERS if d.name == "gpt_oss")
    model = decoder.build()
    backend = sc.Backend()
    with torch.no_grad():
        fast: Any = torch.compile(model, backend=backend)
        got = fast(tokens(), use_cache=False).logits
        assert_equal(got, model(tokens(), use_cache=False).logits)
    assert {site.reason for site in backend.report.sites} == {
        "learned sinks need the log-sum-exp, which FlexAttention does not return on CPU"
    }
