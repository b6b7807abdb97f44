"""A SparseCache holds the keys of a decoder beside an encoder, whose own keys stand in another cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, DynamicCache, EncoderDecoderCache

import sparse_compile as sc
from sparse_compile.masks import causal, sliding_window

pytestmark = pytest.mark.usefixtures("fresh")

SIZES: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4},
    "bart": {
        "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
        "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64,
    },
}  # fmt: skip
TOKENS = torch.randint(3, 60, (1, 8), generator=torch.Generator().manual_seed(0))


def build(kind: str) -> Any:
    torch.manual_seed(0)
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None, "forced_eos_token_id": None}
    factory: Any = AutoModelForSeq2SeqLM
    return factory.from_config(AutoConfig.for_model(kind, vocab_size=64, **tokens, **SIZES[kind])).eval()


@pytest.mark.parametrize("kind", SIZES)
def test_a_cache_of_the_decoder_generates_what_the_caches_of_transformers_do(kind: str) -> None:
    model = build(kind)
    wanted = model.generate(TOKENS, max_new_tokens=6, do_sample=False)
    caches = EncoderDecoderCache(sc.SparseCache(model.config, max_length=32), DynamicCache())
    got = sc.compile(model, inner="eager").generate(TOKENS, past_key_values=caches, max_new_tokens=6, do_sample=False)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("kind", SIZES)
def test_a_bare_cache_is_refused_with_the_pair_that_works(kind: str) -> None:
    model = sc.compile(build(kind), inner="eager")
    cache = sc.SparseCache(model.config, causal & sliding_window(4), max_length=32)
    with pytest.raises(
        ValueError, match=r"has an encoder, .* got a SparseCache alone: pass past_key_values=EncoderDecoderCache\("
    ):
        model.generate(TOKENS, past_key_values=cache, max_new_tokens=3)
    with pytest.raises(ValueError, match="has an encoder"):
        model(input_ids=TOKENS, decoder_input_ids=TOKENS[:, :3], past_key_values=cache)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("kind", SIZES)
def test_a_bare_cache_is_refused_behind_torch_compile(kind: str) -> None:
    model = build(kind)
    cache = sc.SparseCache(model.config, max_length=32)
    model.compile(backend=sc.Backend(inner="eager"))
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"layer 0 of the model updates .* twice, .*: pass EncoderDecoderCache"),
    ):
        model(input_ids=TOKENS, decoder_input_ids=TOKENS[:, :3], past_key_values=cache)
