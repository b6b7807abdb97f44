"""A cache serves masks that only just fit it: tensors that end with the text, and policies that narrow the cache's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, document, explicit, padding, page_topk, per_head, sink, sliding_window
from sparse_compile.masks.lengthen import lengthened
from support.models import SMALL
from support.oracles.cache import error, llama, random_tokens, whole
from support.sessions.cache import Session, ones

pytestmark = pytest.mark.usefixtures("fresh")

WINDOW = causal & sliding_window(8)
NARROW = causal & (sink(2) | sliding_window(4))
IDS = torch.tensor([[0] * 9 + [1] * 7 + [2] * 8])
PAIRS = torch.rand(1, 1, 24, 24, generator=torch.Generator().manual_seed(3)) < 0.7


# -- tensors that end with the text -------------------------------------------------------------------------------------------


def with_itself(visible: Tensor) -> Mask:
    return explicit(visible | torch.eye(visible.shape[-1], dtype=torch.bool))


@pytest.mark.parametrize(
    "mask",
    [
        causal & document(IDS),
        causal & document(IDS) & sliding_window(5),
        causal & (padding(IDS != 1) | sliding_window(2)),
        causal & with_itself(PAIRS),
        per_head([causal & document(IDS), causal & (sink(1) | sliding_window(4))]),
    ],
    ids=["document", "ring", "padding", "explicit", "by KV head"],
)
@pytest.mark.parametrize("page_size", [pytest.param(1, marks=pytest.mark.slow), 16])
def test_a_tensor_of_exactly_max_length_positions_is_enough(mask: Mask, page_size: int) -> None:
    ids = random_tokens(24)
    session = Session(mask, max_length=24, page_size=page_size)
    assert error(session.feed(ids, [11, 5, *ones(8)]), whole(ids, mask)) < 1e-5


def test_a_document_of_exactly_max_length_works_beside_page_selection() -> None:
    ids = random_tokens(24)
    policy = sc.Policy(prefill=causal, decode=causal & document(IDS) & page_topk(32, page=16))
    session = Session(policy, max_length=24, page_size=16)
    wanted = whole(ids, sc.Policy(prefill=causal, decode=causal & document(IDS)), decoded=range(12, 24))
    assert error(session.feed(ids, [12, *ones(12)]), wanted) < 1e-5


def test_a_document_shorter_than_max_length_is_refused_with_the_length_that_is_enough() -> None:
    with pytest.raises(
        ValueError, match="document covers 24 positions, but the attention reaches position 24: give at least 25"
    ):
        Session(causal & document(IDS), max_length=25, page_size=16)


@pytest.mark.parametrize("mask", [causal & document(IDS), ~padding(IDS), with_itself(PAIRS), sink(2) | document(IDS)], ids=str)
def test_a_lengthened_mask_shows_the_same_pairs(mask: Mask) -> None:
    longer = lengthened(mask, 40)
    longer.check(1, 1, 40, 40)
    assert torch.equal(longer.dense(40, 40)[..., :24, :24], mask.dense(24, 24))
    assert lengthened(mask, 24) == mask


# -- policies that narrow what the cache was built for ------------------------------------------------------------------------


@pytest.mark.parametrize("narrow", [NARROW, causal & sliding_window(3), per_head([NARROW, WINDOW])], ids=str)
def test_a_policy_that_narrows_the_window_of_a_ring_is_served(narrow: Mask) -> None:
    ids, model = random_tokens(30), sc.compile(llama(), narrow, inner="eager")
    cache = sc.SparseCache(model.config, WINDOW, max_length=40, page_size=1)
    with torch.no_grad():
        got = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split([9, 6, *ones(15)], dim=1)], dim=1)
    assert error(got, whole(ids, WINDOW & narrow)) < 1e-5


def test_a_policy_that_narrows_the_window_of_the_model_is_served() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "initializer_range": 0.2}
    mistral = MistralForCausalLM(MistralConfig(**sizes, sliding_window=8)).eval()
    mistral.load_state_dict(llama().state_dict())
    ids, model = random_tokens(30), sc.compile(mistral, NARROW, inner="eager")
    cache = sc.SparseCache(model.config, max_length=40, page_size=1)
    with torch.no_grad():
        got = torch.cat([model(piece, past_key_values=cache).logits for piece in ids.split([9, 6, *ones(15)], dim=1)], dim=1)
    assert error(got, whole(ids, WINDOW & NARROW)) < 1e-5


def test_a_model_that_shows_more_than_the_cache_keeps_is_refused() -> None:
    model = sc.compile(llama(), NARROW, inner="eager")
    sizes: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "sliding_window": 3}
    narrow = sc.SparseCache(MistralConfig(**sizes), max_length=24, page_size=1)
    with torch.no_grad(), pytest.raises(sc.SparseCacheError, match=r"the last 3 tokens .*, but its mask .* shows more: build"):
        model(random_tokens(9), past_key_values=narrow)
