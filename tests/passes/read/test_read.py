"""Every form of scaled_dot_product_attention is read correctly, with every way of repeating keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_compile as sc
from sparse_compile.masks import causal, sink, sliding_window
from support.comparison import assert_left, assert_read, compare, qkv
from support.spelling import Attention, N, additive, sdpa

# -- scaled_dot_product_attention -----------------------------------------------------------------------------------------


FORMS: dict[str, tuple[Attention, str]] = {
    "positional": (lambda q, k, v: sdpa(q, k, v, None, 0.0, False), "full"),
    "keyword": (lambda q, k, v: sdpa(query=q, key=k, value=v, attn_mask=None, dropout_p=0.0, is_causal=False), "full"),
    "causal": (lambda q, k, v: sdpa(q, k, v, is_causal=True), "causal"),
    "causal, positional": (lambda q, k, v: sdpa(q, k, v, None, 0.0, True), "causal"),
    "scale": (lambda q, k, v: sdpa(q, k, v, scale=0.3), "full"),
    "integer scale": (lambda q, k, v: sdpa(q, k, v, scale=1), "full"),
    "aten": (lambda q, k, v: torch.ops.aten.scaled_dot_product_attention(q, k, v, None, 0.0, True), "causal"),
    "aten.default": (lambda q, k, v: torch.ops.aten.scaled_dot_product_attention.default(q, k, v), "full"),
    "narrow values": (lambda q, k, v: sdpa(q, k, v[..., :5]), "full"),
}


@pytest.mark.parametrize("form", FORMS)
def test_sdpa_is_read_in_every_argument_form(form: str) -> None:
    attention, mask = FORMS[form]
    assert_read(compare(attention, *qkv()), mask)


@pytest.mark.parametrize("shape", [(N, N), (2, N, N), (1, 1, N, N), (2, 1, N, N), (1, 4, N, N), (2, 4, N, N)], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_from_outside_is_used_as_it_is(shape: tuple[int, ...], kind: str) -> None:
    visible = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.4
    visible[..., 0] = True
    if len(shape) == 3:  # [heads, Q, KV], with as many heads as batches here
        q, k, v = qkv(heads=2)
    else:
        q, k, v = qkv()
    mask = visible if kind == "bool" else additive(visible) + 0.1
    result = compare(lambda q, k, v, m: sdpa(q, k, v, attn_mask=m), q, k, v, mask)
    assert_read(result, "explicit" if kind == "bool" else "full, bias")


def test_causal_counts_from_the_first_key_when_queries_are_fewer() -> None:
    """``is_causal`` of torch aligns to the upper left corner, unlike causal attention over a cache."""
    result = compare(lambda q, k, v: sdpa(q, k, v, is_causal=True), *qkv(4, 9))
    assert_read(result, "causal")
    assert result.report.sites[0].density == pytest.approx((1 + 2 + 3 + 4) / 36)


def test_grouped_queries_need_no_repetition() -> None:
    result = compare(lambda q, k, v: sdpa(q, k, v, is_causal=True, enable_gqa=True), *qkv(kv_heads=2))
    assert_read(result, "causal")
    assert (result.report.sites[0].heads, result.report.sites[0].kv_heads) == (4, 2)


def test_one_key_head_serves_all_queries() -> None:
    assert_read(compare(sdpa, *qkv(kv_heads=1)), "full")


def test_zero_dropout_is_read_and_more_is_left() -> None:
    assert_read(compare(lambda q, k, v: sdpa(q, k, v, dropout_p=0.0), *qkv()), "full")
    result = compare(lambda q, k, v: sdpa(q, k, v, dropout_p=0.1), *qkv())
    assert result.reasons == ["dropout_p=0.1: FlexAttention has no dropout"]


class Scaled(nn.Module):
    """Attention whose scale is an attribute, as in most models of transformers."""

    scaling = 0.3

    def forward(self, x: Tensor) -> Any:
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        return sdpa(q, q, q, is_causal=True, scale=self.scaling)


def test_a_scale_that_dynamic_made_a_symbol_is_read() -> None:
    model, backend = Scaled(), sc.Backend(inner="eager")
    torch._dynamo.reset()
    fast = torch.compile(model, backend=backend, dynamic=True)
    for scaling, length in [(0.3, 12), (0.3, 9), (0.6, 12), (0.3, 7)]:
        model.scaling = scaling
        x = torch.randn(2, length, 32)
        torch.testing.assert_close(fast(x), model(x))
    assert [site.model_mask for site in backend.report.sites] == ["causal"] * 2
    assert backend.report.compiles == 2  # one graph for each scale, and both serve every length


def test_a_scale_that_follows_from_the_length_is_passed_on() -> None:
    def attention(x: Tensor) -> Tensor:
        q = x.unflatten(-1, (4, 8)).transpose(1, 2)
        return sdpa(q, q, q, is_causal=True, scale=x.shape[1] ** 0.5 / 8)

    backend = sc.Backend(inner="eager")
    torch._dynamo.reset()
    fast = torch.compile(attention, backend=backend, dynamic=True)
    for length in (12, 30, 7):
        x = torch.randn(2, length, 32)
        torch.testing.assert_close(fast(x), attention(x))
    assert {site.action for site in backend.report.sites} == {"exact"}


def test_numbers_of_heads_and_channels_get_a_guard() -> None:
    """With ``dynamic=True``, every axis of an input is a symbol. A graph for 8 channels must not run with 16."""
    backend = sc.Backend(inner="eager")
    torch._dynamo.reset()
    fast = torch.compile(lambda q, k, v: sdpa(q, k, v, is_causal=True), backend=backend, dynamic=True)
    for heads, kv_heads, dim in ((4, 4, 8), (4, 4, 16), (6, 6, 8)):
        q, k, v = qkv(heads=heads, kv_heads=kv_heads, dim=dim)
        torch.testing.assert_close(fast(q, k, v), sdpa(q, k, v, is_causal=True))
    assert {site.action for site in backend.report.sites} == {"exact"}


def test_a_batch_of_keys_that_broadcasts_is_left() -> None:
    q, k, v = qkv()
    assert_left(compare(sdpa, q, k[:1], v[:1]), "query, key and value need one batch size, not 2, 1 and 1")


def test_half_precision_is_read() -> None:
    q, k, v = (x.bfloat16() for x in qkv())
    result = compare(lambda q, k, v: sdpa(q, k, v, is_causal=True), q, k, v, output=lambda out: out.float())
    assert result.masks == ["causal"]
    assert result.got.dtype == result.wanted.dtype
    assert result.error < 2**-7


def test_autocast_is_honoured() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = sdpa(q, k, v, is_causal=True)
            return out

    result = compare(attention, *qkv())
    assert result.masks == ["causal"]
    assert result.got.dtype == result.wanted.dtype == torch.bfloat16
    assert result.error < 2**-7


# -- repeated keys and values ---------------------------------------------------------------------------------------------


def expand_reshape(x: Tensor) -> Tensor:
    b, h, n, d = x.shape
    return x[:, :, None, :, :].expand(b, h, 2, n, d).reshape(b, h * 2, n, d)


def unsqueeze_expand_reshape(x: Tensor) -> Tensor:
    return x.unsqueeze(2).expand(-1, -1, 2, -1, -1).reshape(x.shape[0], -1, x.shape[2], x.shape[3])


def unsqueeze_expand_flatten(x: Tensor) -> Tensor:
    return x.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2)


def unsqueeze_expand_contiguous_view(x: Tensor) -> Tensor:
    return x.unsqueeze(2).expand(-1, -1, 2, -1, -1).contiguous().view(x.shape[0], 4, x.shape[2], x.shape[3])


def repeat_interleave(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=1)


def repeat_interleave_from_behind(x: Tensor) -> Tensor:
    return torch.repeat_interleave(x, 2, -3).contiguous()


REPEATS = [
    expand_reshape,
    unsqueeze_expand_reshape,
    unsqueeze_expand_flatten,
    repeat_interleave,
    repeat_interleave_from_behind,
]


@pytest.mark.parametrize("repeat", REPEATS, ids=lambda f: f.__name__)
def test_repeated_heads_are_peeled(repeat: Callable[[Tensor], Tensor]) -> None:
    result = compare(lambda q, k, v: sdpa(q, repeat(k), repeat(v), is_causal=True), *qkv(kv_heads=2))
    assert_read(result, "causal")
    assert result.report.sites[0].kv_heads == 2


OTHER_REPEATS: dict[str, Callable[[Tensor], Tensor]] = {
    "tiling": lambda x: x.repeat(1, 2, 1, 1),
    "tiling by expand": lambda x: x.unsqueeze(1).expand(-1, 2, -1, -1, -1).reshape(x.shape[0], 4, x.shape[2], x.shape[3]),
    "along the keys": lambda x: x.repeat_interleave(2, dim=2)[:, :1].expand(-1, 4, -1, -1),
}


@pytest.mark.parametrize("name", OTHER_REPEATS)
def test_heads_in_another_order_are_not_peeled(name: str) -> None:
    repeat = OTHER_REPEATS[name]
    result = compare(lambda q, k, v: sdpa(q, repeat(k), repeat(v)), *qkv(kv_heads=2))
    assert_read(result, "full")
    assert result.report.sites[0].kv_heads == 4


def test_keys_and_values_repeated_differently_are_not_peeled() -> None:
    q, k, v = qkv(kv_heads=2)
    result = compare(lambda q, k, v: sdpa(q, expand_reshape(k), v), q, k, expand_reshape(v))
    assert_read(result, "full")
    assert result.report.sites[0].kv_heads == 4


def test_a_cache_written_after_the_repetition_is_not_peeled() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, new: Tensor) -> Tensor:
        keys, values = repeat_interleave(k), repeat_interleave(v)
        k[:, :, 3:5] = new
        v.index_copy_(2, torch.tensor([7]), new[:, :, :1])
        return sdpa(q, keys, values) + sdpa(q, repeat_interleave(k), repeat_interleave(v))

    result = compare(attention, *qkv(kv_heads=2), torch.randn(2, 2, 2, 8))
    assert_read(result, "full", calls=2)
    assert [site.kv_heads for site in result.report.sites] == [4, 2]


# -- policies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeat", REPEATS, ids=lambda f: f.__name__)
def test_a_policy_acts_the_same_on_every_spelling(repeat: Callable[[Tensor], Tensor]) -> None:
    policy = causal & (sink(1) | sliding_window(3))
    q, k, v = qkv(kv_heads=2)
    wanted = sdpa(q, repeat(k), repeat(v), attn_mask=policy.dense(N, N))
    for attention in (
        lambda q, k, v: sdpa(q, repeat(k), repeat(v)),
        lambda q, k, v: (q @ repeat(k).transpose(2, 3) / math.sqrt(8)).softmax(-1) @ repeat(v),
    ):
        result = compare(attention, q, k, v, policy=policy)
        assert [site.action for site in result.report.sites] == ["sparse"]
        assert (result.got - wanted).abs().max() < 1e-5
