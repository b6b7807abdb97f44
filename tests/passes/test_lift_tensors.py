"""Masks and biases that read tensors are lifted: padding, documents, prefixes, slopes, tables."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.models.llama import LlamaConfig

from sparse_compile.masks import causal, sink, sliding_window
from support.comparison import assert_read, compare, qkv, words
from support.masks.builders import Build, Case, N, attend, from_tril, hidden, i_and_j, valid

PADDINGS: dict[str, Case] = {
    "bool keys": Case(lambda m: m.bool()[:, None, None, :], "padding"),
    "compared": Case(lambda m: (m != 0)[:, None, None, :].expand(2, 1, N, N), "padding"),
    "is zero": Case(lambda m: ~(m == 0)[:, None, None, :], "padding"),
    "masked_fill": Case(lambda m: torch.zeros(2, 1, 1, N).masked_fill(m[:, None, None, :] == 0, -1e9), "padding"),
    "causal": Case(lambda m: m.bool()[:, None, None, :] & from_tril(), "causal & padding"),
    "gathered": Case(lambda m: m.bool()[torch.arange(2)[:, None, None, None], torch.arange(N)[None, None, None, :]], "padding"),
}


@pytest.mark.parametrize("name", PADDINGS)
def test_padding_on_keys_is_lifted(name: str) -> None:
    case = PADDINGS[name]
    q, k, v = qkv(N)
    result = compare(attend(case.build), q, k, v, valid(), output=lambda out: out[:, :, 3:])  # row 0 sees nothing before 3
    assert_read(result, case.mask)


def test_padding_multiplied_by_a_large_number_is_a_bias() -> None:
    """``(1 - mask) * min`` hides keys only if the mask holds ones and zeros, which is not known while compiling."""

    def extended(mask: Tensor) -> Tensor:
        return (1.0 - mask[:, None, None, :].to(torch.float32)) * torch.finfo(torch.float32).min

    assert_read(compare(attend(extended), *qkv(N), valid()), "full, bias")
    assert_read(compare(attend(lambda m: hidden(from_tril()) + extended(m)), *qkv(N), valid()[1:]), "causal, bias")


def test_documents_are_lifted() -> None:
    ids = torch.tensor([[0] * 5 + [1] * 7, [0] * 2 + [1] * 3 + [2] * 7])

    def build(ids: Tensor) -> Tensor:
        same = ids[:, :, None] == ids[:, None, :]
        return (same & from_tril())[:, None]

    assert_read(compare(attend(build), *qkv(N), ids), "causal & document")


def test_prefix_lengths_are_lifted() -> None:
    """PrefixLM, and padded keys with valid lengths."""
    lengths = torch.tensor([3, 7])
    build: Build = lambda n: (torch.arange(N)[None, :] < n[:, None])[:, None, None, :]  # noqa: E731  # reads as the table above
    assert_read(compare(attend(build), *qkv(N), lengths), "prefix")
    assert_read(compare(attend(lambda n: build(n) | from_tril()), *qkv(N), lengths), "prefix | causal")


def test_a_random_table_is_used_as_it_is() -> None:
    table = torch.rand(N, N, generator=torch.Generator().manual_seed(3)) > 0.5
    table[:, 0] = True

    def build(table: Tensor, order: Tensor) -> Tensor:
        return table[order[:, None], order[None, :]] & from_tril()

    order = torch.randperm(N, generator=torch.Generator().manual_seed(4))
    q, k, v = qkv(N)
    result = compare(attend(build), q, k, v, table, order, output=lambda out: out[:, :, order == 0])
    assert result.reasons == []
    assert result.masks in (["causal & explicit"], ["explicit"])
    assert result.error < 1e-5


# -- transformers ---------------------------------------------------------------------------------------------------------


CONFIG: Any = LlamaConfig(hidden_size=32, num_attention_heads=4)
CONFIG._attn_implementation = "sdpa"


def hf_mask(attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """The mask of a transformers decoder for a prompt."""
    embeddings = torch.zeros(2, N, 32)
    if position_ids is None:
        position_ids = torch.arange(N).unsqueeze(0)
    mask = create_causal_mask(
        config=CONFIG,
        inputs_embeds=embeddings,
        attention_mask=attention_mask,
        past_key_values=None,
        position_ids=position_ids,
    )
    return cast(Tensor, mask)


def test_packed_sequences_vanish_over_default_positions() -> None:
    """``find_packed_sequence_indices`` does this whenever a graph is traced."""

    def build() -> Tensor:
        positions = torch.arange(N).unsqueeze(0)
        steps = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1)
        documents = (steps != 1).cumsum(-1)
        return from_tril() & (documents[:, None, :, None] == documents[:, None, None, :])

    assert_read(compare(attend(build), *qkv(N)), "causal")
    result = compare(attend(lambda: hf_mask(None, None)), *qkv(N))  # in eager mode, transformers makes no mask at all
    assert result.masks == ["causal"]
    assert (result.got - F.scaled_dot_product_attention(*qkv(N), is_causal=True)).abs().max() < 1e-5


PACKED = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6], [5, 6, 7, 0, 1, 2, 2, 3, 4, 5, 9, 10]])


def test_packed_sequences_are_causal_documents() -> None:
    """Newer versions of transformers compare position ids for causality as well, and here these are a tensor."""
    result = compare(attend(lambda p: hf_mask(None, p)), *qkv(N), PACKED)
    assert result.error == 0
    assert_read(result, "causal & document")


def packed(first: bool, window: int, step: int = 1) -> Build:
    """A window over positions, within the texts that begin where positions do not grow by ``step``."""

    def build(positions: Tensor) -> Tensor:
        before = positions[:, :1] - 1 if first else None
        change = torch.diff(positions, prepend=before, dim=-1)
        texts = (change != step).cumsum(-1)
        if not first:
            texts = F.pad(texts, (0, 1))
        query, key = positions[:, None, :, None], positions[:, None, None, :]
        same = texts[:, None, :, None] == texts[:, None, None, :]
        return (key <= query) & (key > query - window) & same

    return build


def test_windows_of_packed_sequences_count_places() -> None:
    assert_read(compare(attend(packed(True, 3)), *qkv(N), PACKED), "causal & sliding_window(3) & document")


@pytest.mark.parametrize("build", [packed(False, 3), packed(True, 3, step=2)], ids=["texts end early", "other steps"])
def test_texts_that_begin_elsewhere_keep_their_positions(build: Build) -> None:
    result = compare(attend(build), *qkv(N), PACKED)
    assert result.error == 0 and "explicit" in result.masks[0]


def test_the_padding_of_transformers_is_lifted() -> None:
    left = torch.ones(2, N, dtype=torch.int64)
    left[0, :3] = 0
    result = compare(attend(lambda m: hf_mask(m, None)), *qkv(N), left, output=lambda out: out[:, :, 3:])
    assert_read(result, "causal & padding")


def test_the_padding_of_encoders_is_lifted() -> None:
    def build(mask: Tensor) -> Tensor:
        return cast(Tensor, create_bidirectional_mask(CONFIG, torch.zeros(2, N, 32), mask))

    assert_read(compare(attend(build), *qkv(N), valid()), "padding")


# -- biases ---------------------------------------------------------------------------------------------------------------


def alibi(slopes: Tensor) -> Tensor:
    i, j = i_and_j()
    return slopes.view(-1, 1, 1) * (j - i) + hidden(j <= i)


def alibi_of_keys(slopes: Tensor) -> Tensor:
    """MPT and BLOOM add a bias that depends on the key only, because a constant for each query does not change the softmax."""
    return slopes.view(1, -1, 1, 1) * torch.arange(1 - N, 1).view(1, 1, 1, N) + hidden(from_tril())


@pytest.mark.parametrize("build", [alibi, alibi_of_keys])
def test_a_slope_per_head_is_a_bias_beside_the_lifted_mask(build: Build) -> None:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    assert_read(compare(attend(build), *qkv(N), slopes), "causal, bias")


def test_relative_positions_are_a_bias() -> None:
    """T5 reads a learned table by bucket, and permutes the heads to the front."""

    def build(table: Tensor) -> Tensor:
        i, j = i_and_j()
        bucket = (j - i).clamp(-4, 4) + 4
        return F.embedding(bucket, table).permute(2, 0, 1).unsqueeze(0) + hidden(j <= i)[None, None]

    assert_read(compare(attend(build), *qkv(N), torch.randn(9, 4)), "causal, bias")


def test_a_bias_and_a_policy_act_together() -> None:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    policy = causal & (sink(1) | sliding_window(3))
    q, k, v = qkv(N)
    mask = alibi(slopes).masked_fill(~policy.dense(N, N), -torch.inf)
    result = compare(attend(alibi), q, k, v, slopes, policy=policy)
    assert (result.got - F.scaled_dot_product_attention(q, k, v, attn_mask=mask)).abs().max() < 1e-5


def test_names_of_tensors_are_in_the_report() -> None:
    """``padding(name)`` shows the name of the tensor of the graph that is read."""
    result = compare(attend(lambda valid: valid.bool()[:, None, None, :]), *qkv(N), valid())
    assert words(result.report.sites[0].model_mask) == "padding" != result.report.sites[0].model_mask
