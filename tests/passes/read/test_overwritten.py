"""Tensors that are overwritten between a mask and its attention: reads from before the write stay before it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from support.comparison import assert_read, compare, qkv
from support.masks.builders import N, attend, from_tril, hidden, valid


def length_advanced(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """Compute the mask, advance the length, then attend, as with a static cache. Two calls share the mask, as two layers do."""
    mask = torch.arange(N)[None] <= (torch.arange(3) + length)[:, None]
    length.add_(3)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out + F.scaled_dot_product_attention(q.flip(1), k, v, attn_mask=mask)


def length_advanced_between(q: Tensor, k: Tensor, v: Tensor, length: Tensor) -> Tensor:
    """Each layer computes its mask from a length that the previous layer has advanced."""
    keys = torch.arange(N)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=keys[None] <= (torch.arange(3) + length)[:, None])
    length.add_(3)
    return out + F.scaled_dot_product_attention(q, k, v, attn_mask=keys[None] <= (torch.arange(3) + length)[:, None])


@pytest.mark.parametrize("attention", [length_advanced, length_advanced_between])
def test_a_length_advanced_before_attention_moves_no_mask(attention: Callable[..., Tensor]) -> None:
    result = compare(attention, *qkv(3, N), torch.tensor(4))
    assert result.error < 1e-5
    assert len(result.report.sites) == 2


def test_a_length_advanced_before_attention_is_still_lifted() -> None:
    assert_read(compare(length_advanced, *qkv(3, N), torch.tensor(4)), "causal", calls=2)


CHANGED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # return the mask, and then overwrite a tensor that it was computed from
    "padding filled": lambda m, p: first(p[:, None, None, :] & from_tril(), p.fill_(True)),
    "padding assigned": lambda m, p: first(p[:, None, None, :] & from_tril(), p.index_fill_(1, torch.tensor([0, 1]), False)),
    "mask filled before": lambda m, p: first(m, m.fill_(True)),
    "mask filled after": lambda m, p: first(m & (torch.arange(N) > 3), m.fill_(True)),
    "bias zeroed": lambda m, p: first(m.float() + hidden(from_tril()), m.zero_()),
    "bias scaled": lambda m, p: first(m.float().mul_(3) + hidden(from_tril()), m),
}


def first(mask: Tensor, _: Tensor) -> Tensor:
    return mask


@pytest.mark.parametrize("name", CHANGED)
def test_a_tensor_written_between_mask_and_attention_is_read_before(name: str) -> None:
    mask = torch.rand(N, N, generator=torch.Generator().manual_seed(5)) > 0.5
    mask[:, 4] = mask[:, 0] = True
    result = compare(attend(CHANGED[name]), *qkv(N), mask, valid().bool(), output=lambda out: out[:, :, 3:])
    assert result.error < 1e-5
    assert result.reasons == []


def test_a_float_bias_written_after_the_sum_is_read_before() -> None:
    def build(bias: Tensor) -> Tensor:
        total = bias + hidden(from_tril())
        bias.zero_()
        return total

    assert_read(compare(attend(build), *qkv(N), torch.randn(1, 4, N, N)), "causal, bias")


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_one_mask_written_between_two_calls_is_read_twice(dtype: torch.dtype) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        mask[:, 6:] = 1
        return out + F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    result = compare(attention, *qkv(N), from_tril().to(dtype))
    assert result.reasons == []
    assert result.error < 1e-5


def test_masks_of_one_tensor_before_and_after_it_is_written_differ() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        early = keep[:, None, None, :] & (torch.arange(N) < 9)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :].expand(2, 1, N, N))
        keep.logical_not_()
        out = out + F.scaled_dot_product_attention(q, k, v, attn_mask=early)
        return out + F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :].expand(2, 1, N, N))

    result = compare(attention, *qkv(N), valid().bool())
    assert len(result.report.sites) == 3
    assert result.error < 1e-5
