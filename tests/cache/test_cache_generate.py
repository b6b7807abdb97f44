"""``generate()`` with a SparseCache: same tokens as a DynamicCache, fewer bytes, no compilation after the first steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import sparse_compile as sc
from sparse_compile.masks import causal, per_head, sink, sliding_window
from support.models import DECODERS, SMALL, Decoder
from support.oracles.cache import HEAD_DIM, KV_HEADS, LAYERS, llama, random_tokens

STEPS = 256
STREAMING = causal & (sink(2) | sliding_window(6))
DUO = per_head([causal, STREAMING])
SIZES = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2}
LAYER_TYPES = ["sliding_attention", "full_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen3": {**SIZES, "head_dim": 16},
    "mistral": {**SIZES, "sliding_window": 8},
    "gemma3_text": {**SIZES, "head_dim": 16, "sliding_window": 8, "layer_types": LAYER_TYPES},
}

pytestmark = pytest.mark.usefixtures("fresh")


def build(name: str) -> Any:
    torch.manual_seed(0)
    factory: Any = AutoModelForCausalLM
    return factory.from_config(AutoConfig.for_model(name, **MODELS[name]), attn_implementation="sdpa").eval()


def compiled(name: str, **options: Any) -> tuple[Any, sc.SparseCache]:
    model = sc.compile(build(name), inner="eager")
    return model, sc.SparseCache(model.config, **{"max_length": 512, "page_size": 4, **options})


def exactly(steps: int, **options: Any) -> dict[str, Any]:
    """Arguments that make ``generate`` produce exactly ``steps`` tokens."""
    return {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, **options}


def padded(length: int) -> dict[str, Tensor]:
    ids, mask = random_tokens(length, batch=2), torch.ones(2, length, dtype=torch.int64)
    ids[0, :5], mask[0, :5] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def tokens_of(model: Any, cache: Any, inputs: dict[str, Tensor], **options: Any) -> list[list[int]]:
    torch.manual_seed(3)
    result: list[list[int]] = model.generate(**inputs, past_key_values=cache, **options).tolist()
    return result


# -- the tokens of a DynamicCache -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_without_a_policy_are_those_of_a_dynamic_cache(name: str) -> None:
    model, cache = compiled(name)
    plain, inputs = build(name), {"input_ids": random_tokens(17)}
    wanted = tokens_of(plain, DynamicCache(config=plain.config), inputs, **exactly(STEPS))
    assert tokens_of(model, cache, inputs, **exactly(STEPS)) == wanted
    assert cache.get_seq_length() == 17 + STEPS - 1


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_of_padded_rows_are_those_of_a_dynamic_cache(name: str) -> None:
    model, cache = compiled(name, max_batch=2)
    plain = build(name)
    wanted = tokens_of(plain, DynamicCache(config=plain.config), padded(17), **exactly(STEPS))
    assert tokens_of(model, cache, padded(17), **exactly(STEPS)) == wanted


@pytest.mark.parametrize("decoder", [d for d in DECODERS if d.name not in (*MODELS, "mpt", "falcon alibi")], ids=str)
def test_other_architectures_generate_as_with_a_dynamic_cache(decoder: Decoder) -> None:
    """This covers eager attention, soft caps and learned sinks. MPT and Falcon ALiBi cannot be traced over a static length."""
    wanted = decoder.build().generate(**padded(20), **exactly(6), output_logits=True, return_dict_in_generate=True)
    model = sc.compile(decoder.build(), inner="eager")
    cache = sc.SparseCache(model.config, max_length=64, page_size=4, max_batch=2, dtype=torch.float32)
    got = model.generate(**padded(20), **exactly(6), past_key_values=cache, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(got.sequences, wanted.sequences)
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(got.logits, wanted.logits, strict=True))


def test_a_causal_policy_is_no_policy() -> None:
    inputs = {"input_ids": random_tokens(17)}
    plain = build("llama")
    model = sc.compile(build("llama"), causal, inner="eager")
    cache = sc.SparseCache(model.config, causal, max_length=128)
    wanted = tokens_of(plain, DynamicCache(config=plain.config), inputs, **exactly(64))
    assert tokens_of(model, cache, inputs, **exactly(64)) == wanted


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_samples_of_one_seed_are_those_of_a_dynamic_cache(name: str) -> None:
    model, cache = compiled(name, max_batch=2)
    plain = build(name)
    sampling = exactly(40, do_sample=True, temperature=1.5, top_p=0.9)
    wanted = tokens_of(plain, DynamicCache(config=plain.config), padded(17), **sampling)
    assert tokens_of(model, cache, padded(17), **sampling) == wanted
    assert wanted != tokens_of(plain, DynamicCache(config=plain.config), padded(17), **exactly(40))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_beam_search_finds_what_it_finds_with_a_dynamic_cache(name: str) -> None:
    model, cache = compiled(name, max_batch=6)
    plain, search = build(name), exactly(20, num_beams=3)
    wanted = tokens_of(plain, DynamicCache(config=plain.config), padded(17), **search)
    assert tokens_of(model, cache, padded(17), **search) == wanted
    assert wanted != tokens_of(plain, DynamicCache(config=plain.config), padded(17), **exactly(20))


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_a_prompt_prefilled_in_chunks_gives_the_same_tokens(name: str, chunk: int) -> None:
    model, cache = compiled(name)
    plain, inputs = build(name), {"input_ids": random_tokens(17)}
    wanted = tokens_of(plain, DynamicCache(config=plain.config), inputs, **exactly(20))
    assert tokens_of(model, cache, inputs, **exactly(20, prefill_chunk_size=chunk)) == wanted


def test_padded_prompts_prefilled_in_chunks_give_the_same_tokens() -> None:
    model, cache = compiled("mistral", max_batch=2)
    plain = build("mistral")
    wanted = tokens_of(plain, DynamicCache(config=plain.config), padded(17), **exactly(20))
    assert tokens_of(model, cache, padded(17), **exactly(20, prefill_chunk_size=5)) == wanted


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_conversation_goes_on_with_the_cache_of_its_first_turn(name: str) -> None:
    model, cache = compiled(name)
    plain = build(name)
    dynamic, inputs, later = DynamicCache(config=plain.config), {"input_ids": random_tokens(17)}, random_tokens(9, seed=4)
    for _ in range(3):
        wanted = tokens_of(plain, dynamic, inputs, **exactly(11))
        assert tokens_of(model, cache, inputs, **exactly(11)) == wanted
        inputs = {"input_ids": torch.cat([torch.tensor(wanted), later], dim=1)}


def test_a_cache_serves_one_prompt_after_another_with_a_reset_between() -> None:
    model, cache = compiled("llama")
    plain = build("llama")
    for seed in range(3):
        inputs = {"input_ids": random_tokens(9 + 4 * seed, seed=seed)}
        wanted = tokens_of(plain, DynamicCache(config=plain.config), inputs, **exactly(10))
        assert tokens_of(model, cache, inputs, **exactly(10)) == wanted
        cache.reset()


def layers_of(cache: Any) -> list[Any]:
    return list(cache.layers)


def places(cache: sc.SparseCache) -> list[int]:
    return [tensor.data_ptr() for layer in layers_of(cache) for tensor in layer.buffers]


# -- bytes ----------------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_slots_of_each_head_and_of_the_positions() -> None:
    length, batch, number, ring = 4096, 3, 4, 64
    cache = sc.SparseCache(llama().config, DUO, max_length=length, max_batch=batch, dtype=torch.float32)
    keys_and_values = LAYERS * batch * (length + ring) * HEAD_DIM * 2 * number
    columns, texts, page_texts, ring_positions = 8, 8 * batch, 4 * batch * length, 2 * 8 * batch * ring
    assert cache.nbytes == keys_and_values + columns + texts + page_texts + ring_positions
    assert cache.dense_nbytes == LAYERS * batch * length * KV_HEADS * HEAD_DIM * 2 * number
    assert [layer.nbytes for layer in layers_of(cache)] == [keys_and_values // LAYERS] * LAYERS
    one = batch * HEAD_DIM * 2 * number
    assert [layer.head_nbytes for layer in layers_of(cache)] == [(length * one, ring * one)] * LAYERS


def test_rings_alone_do_not_grow_with_the_length() -> None:
    config = llama().config
    sizes = [sc.SparseCache(config, STREAMING, max_length=length).nbytes for length in (1000, 1_000_000)]
    assert sizes[0] == sizes[1] == LAYERS * 64 * KV_HEADS * HEAD_DIM * 2 * 4 + 8 + 8 + 2 * 8 * 64


def test_half_the_heads_in_rings_are_almost_half_the_bytes() -> None:
    cache = sc.SparseCache(llama().config, DUO, max_length=100_000, dtype=torch.float32)
    assert 1.85 < cache.dense_nbytes / cache.nbytes <= 2
    assert cache.dense_nbytes / sum(layer.nbytes for layer in layers_of(cache)) > 1.99


def test_half_precision_is_half_the_bytes() -> None:
    config = llama().config
    full, half = (sc.SparseCache(config, DUO, max_length=1024, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert full.dense_nbytes == 2 * half.dense_nbytes
    assert layers_of(full)[0].nbytes == 2 * layers_of(half)[0].nbytes


def test_the_windows_of_the_model_itself_make_rings() -> None:
    local, wide = layers_of(sc.SparseCache(build("gemma3_text").config, max_length=1024, page_size=4))
    assert wide.nbytes == 1024 * KV_HEADS * HEAD_DIM * 2 * 4
    assert local.nbytes == 8 * KV_HEADS * HEAD_DIM * 2 * 4


def test_rings_are_as_long_as_whole_pages_with_room_for_a_rollback() -> None:
    config = llama().config
    for page_size, rollback, slots in ((1, 0, 8), (1, 5, 13), (3, 0, 9), (8, 0, 8), (8, 1, 16)):
        cache = sc.SparseCache(config, STREAMING, max_length=1024, page_size=page_size, rollback=rollback)
        assert layers_of(cache)[0].nbytes == slots * KV_HEADS * HEAD_DIM * 2 * 4


def test_nothing_is_allocated_later() -> None:
    model, cache = compiled("mistral")
    before, there = cache.nbytes, places(cache)
    tokens_of(model, cache, {"input_ids": random_tokens(17)}, **exactly(30))
    cache.crop(0)
    cache.reset()
    assert cache.nbytes == before
    assert places(cache) == there


# -- graphs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [causal, STREAMING, DUO], ids=["dense", "streaming", "by KV head"])
@pytest.mark.parametrize("batch", [1, 2])
def test_one_graph_serves_every_decode_step(policy: Any, batch: int) -> None:
    model = sc.compile(llama(), policy, inner="eager")
    cache = sc.SparseCache(model.config, policy, max_length=200, max_batch=2, page_size=1)
    ids = random_tokens(160, batch)
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        assert model.sparse_compile_report.compiles == 1
        for at in range(30, 160):
            model(ids[:, at : at + 1].clone(), past_key_values=cache)
    assert model.sparse_compile_report.compiles == 2
    assert [site.phase for site in model.sparse_compile_report.sites] == ["prefill", "prefill", "decode", "decode"]


def test_a_decode_step_after_a_reset_or_a_rollback_needs_no_new_graph() -> None:
    model = sc.compile(llama(), DUO, inner="eager")
    cache = sc.SparseCache(model.config, DUO, max_length=200, page_size=1, rollback=4)
    ids = random_tokens(30)
    with torch.no_grad():
        for change in ("crop", "reset", "nothing"):
            model(ids, past_key_values=cache)
            for at in range(20):
                model(ids[:, at : at + 1].clone(), past_key_values=cache)
            if change == "crop":
                cache.crop(-4)
            elif change == "reset":
                cache.reset()
    assert model.sparse_compile_report.compiles == 2


@pytest.mark.parametrize("batch", [1, 2])
def test_generate_compiles_a_prefill_and_a_decode_step(batch: int) -> None:
    model, cache = compiled("llama", max_batch=2)
    tokens_of(model, cache, {"input_ids": random_tokens(17, batch)}, **exactly(40))
    assert model.sparse_compile_report.compiles == 2


def test_generate_with_padding_compiles_a_prefill_and_a_decode_step() -> None:
    model, cache = compiled("llama", max_batch=2)
    tokens_of(model, cache, padded(17), **exactly(40))
    assert model.sparse_compile_report.compiles == 2


def test_a_second_cache_of_the_same_sizes_needs_no_new_graph() -> None:
    model = sc.compile(llama(), DUO, inner="eager")
    ids = random_tokens(30)
    with torch.no_grad():
        for _ in range(3):
            cache = sc.SparseCache(model.config, DUO, max_length=64, page_size=1)
            model(ids, past_key_values=cache)
            model(ids[:, :1].clone(), past_key_values=cache)
    assert model.sparse_compile_report.compiles == 2
