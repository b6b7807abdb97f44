"""Whole models over a quantized cache: logits, tokens, bytes, and the line in the report."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import sparse_compile as sc
from sparse_compile.cache.kv_format import ByLayer
from sparse_compile.masks import causal, page_topk, per_head, sink, sliding_window
from support.oracles.cache import KV_HEADS, LAYERS, llama, random_tokens
from support.oracles.selection import build
from support.sessions.cache import left_padded, ones

DUO = per_head([causal, causal & (sink(2) | sliding_window(6))])
MODELS = ["llama", "llama mha", "qwen3", "mistral", "gemma3_text"]

pytestmark = pytest.mark.usefixtures("fresh")


def logits_of(model: Any, cache: Any, ids: Tensor, lengths: list[int], padding: Tensor | None = None) -> Tensor:
    """The logits of ``ids``, appended in pieces of these lengths."""
    logits, start = [], 0
    positions = None if padding is None else (padding.cumsum(dim=1) - 1).clamp(min=0)
    for length in lengths:
        piece = slice(start, start + length)
        inputs: dict[str, Any] = {}
        if padding is not None and positions is not None:
            inputs = {"attention_mask": padding[:, : piece.stop].clone(), "position_ids": positions[:, piece].clone()}
        with torch.no_grad():
            logits.append(model(ids[:, piece].clone(), past_key_values=cache, **inputs).logits)
        start += length
    return torch.cat(logits, dim=1)


def distance(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).norm() / wanted.norm())


# -- logits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_near_those_over_a_dynamic_cache(name: str) -> None:
    plain, ids, lengths = build(name), random_tokens(60), [33, *ones(27)]
    model = sc.compile(build(name), inner="eager")
    cache = sc.SparseCache(model.config, max_length=96, page_size=32, kv="int8")
    wanted = logits_of(plain, DynamicCache(config=plain.config), ids, lengths)
    got = logits_of(model, cache, ids, lengths)
    quantized_parts = [layer.quantized != [] for layer in cache.cached_layers]
    assert quantized_parts == {"mistral": [False, False], "gemma3_text": [False, True]}.get(name, [True, True]), (
        "windows are rings"
    )
    assert distance(got, wanted) < 0.02
    assert (distance(got[:, 33:], wanted[:, 33:]) > 1e-4) == any(quantized_parts)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_logits_of_padded_rows_are_near_those_over_a_dynamic_cache(name: str) -> None:
    plain, lengths = build(name), [33, *ones(20), 7]
    ids, padding = left_padded(60, [21, 0])
    model = sc.compile(build(name), inner="eager")
    cache = sc.SparseCache(model.config, max_length=64, max_batch=2, page_size=32, kv="int8")
    wanted = logits_of(plain, DynamicCache(config=plain.config), ids, lengths, padding)
    got = logits_of(model, cache, ids, lengths, padding)
    assert distance(got[padding.bool()], wanted[padding.bool()]) < 0.02


# -- generate -----------------------------------------------------------------------------------------------------------


def by_hand(model: Any, cache: sc.SparseCache, ids: Tensor, steps: int) -> list[int]:
    """Greedy tokens from a loop that calls the model."""
    found, new = [], ids
    for _ in range(steps):
        with torch.no_grad():
            new = model(new.clone(), past_key_values=cache).logits[:, -1:].argmax(dim=2)
        found.append(int(new))
    return found


def greedy(steps: int) -> dict[str, Any]:
    return {"max_new_tokens": steps, "min_new_tokens": steps, "do_sample": False, "eos_token_id": None}


def test_generate_finds_the_tokens_of_greedy_decoding_by_hand() -> None:
    ids, steps = random_tokens(17), 40
    model = sc.compile(llama(), inner="eager")
    caches = [sc.SparseCache(model.config, max_length=64, page_size=32, kv="int8") for _ in range(2)]
    wanted = by_hand(model, caches[0], ids, steps)
    assert model.generate(ids, past_key_values=caches[1], **greedy(steps))[0, 17:].tolist() == wanted
    assert len(set(wanted)) > 5
    assert model.sparse_compile_report.left == []
    assert caches[1].get_seq_length() == 17 + steps - 1


@pytest.mark.slow
def test_inductor_generates_the_tokens_of_eager_graphs() -> None:
    found = []
    for inner in ("eager", "inductor"):
        model = sc.compile(llama(num_hidden_layers=1), inner=inner)
        cache = sc.SparseCache(model.config, max_length=64, page_size=32, kv=[["int8", "int4"]])
        found.append(model.generate(random_tokens(17), past_key_values=cache, **greedy(12)).tolist())
        assert model.sparse_compile_report.compiles == 2
        assert model.sparse_compile_report.left == []
    assert found[0] == found[1]


def test_generate_of_padded_rows_finds_the_tokens_of_each_row_alone() -> None:
    ids, padding = left_padded(20, [7, 0])
    model = sc.compile(llama(), DUO, inner="eager")
    both = sc.SparseCache(model.config, DUO, max_length=64, max_batch=2, page_size=4, kv="int8")
    got = model.generate(ids, attention_mask=padding, past_key_values=both, **greedy(30))
    for row, text in enumerate((ids[:1, 7:], ids[1:])):
        alone = sc.SparseCache(model.config, DUO, max_length=64, max_batch=2, page_size=4, kv="int8")
        wanted = model.generate(text, past_key_values=alone, **greedy(30))
        same = got[row, 20:] == wanted[0, text.shape[1] :]
        assert bool(same[:4].all()), "groups begin at other tokens of a padded row, and later ones may differ"


def test_decode_steps_are_one_graph() -> None:
    model = sc.compile(llama(), DUO, inner="eager")
    cache = sc.SparseCache(model.config, DUO, max_length=96, page_size=8, kv="int8", rollback=3)
    ids = random_tokens(80)
    logits_of(model, cache, ids, [20, *ones(60)])
    cache.crop(-3)
    logits_of(model, cache, ids[:, :9], ones(9))
    assert model.sparse_compile_report.compiles == 2
    assert torch._dynamo.utils.counters["graph_break"] == {}


# -- bytes --------------------------------------------------------------------------------------------------------------

SLOTS, TAIL, DIM = 128, 64, 16  # for max_length=100 and pages of 32
BYTES: list[tuple[ByLayer, int, int]] = [  # kv, bytes of the keys and of the values of a KV head
    ("int8", SLOTS * DIM + 2 * 2 * SLOTS // 32 * DIM, SLOTS * DIM + 2 * 2 * SLOTS),
    ("int4", SLOTS * DIM // 2 + 2 * 2 * SLOTS // 32 * DIM, SLOTS * DIM // 2 + 2 * 2 * SLOTS),
    ("fp8", SLOTS * DIM + 2 * SLOTS, SLOTS * DIM + 2 * SLOTS),
    (sc.KVFormat("int8", "int4", 16, 4), SLOTS * DIM + 4 * SLOTS // 16 * DIM, SLOTS * DIM // 2 + 4 * SLOTS * DIM // 4),
    (sc.KVFormat("int8", None), SLOTS * DIM + 4 * SLOTS // 32 * DIM, SLOTS * DIM * 4),
]


@pytest.mark.parametrize(("kv", "keys", "values"), BYTES, ids=lambda x: str(x) if not isinstance(x, int) else "")
def test_bytes_are_those_of_codes_scales_offsets_tails_and_positions(kv: ByLayer, keys: int, values: int) -> None:
    cache = sc.SparseCache(llama().config, max_length=100, max_batch=3, page_size=32, kv=kv)
    head = 3 * (keys + values + 2 * TAIL * DIM * 4)
    assert [layer.head_nbytes for layer in cache.cached_layers] == [(head,) * KV_HEADS] * LAYERS
    assert [layer.nbytes for layer in cache.cached_layers] == [head * KV_HEADS] * LAYERS
    assert cache.nbytes == LAYERS * KV_HEADS * head + 8 + 8 * 3 + 4 * 3 * SLOTS


def test_bytes_are_those_of_digests_too() -> None:
    """Page summaries are in the cache's dtype, because they describe the unquantized keys."""
    policy = causal & (sink(2) | page_topk(32, page=8))
    plain, less = (sc.SparseCache(llama().config, policy, max_length=1024, page_size=16, kv=kv) for kv in (None, "int8"))
    chosen = [sum(t.nbytes for choice in layer.own for t in choice.used()) for layer in less.cached_layers]
    assert min(chosen) > 1024 // 8 * 2 * DIM * KV_HEADS * 4
    assert chosen == [sum(t.nbytes for choice in layer.own for t in choice.used()) for layer in plain.cached_layers]
    assert [layer.nbytes - sum(layer.head_nbytes) for layer in less.cached_layers] == chosen


def test_long_caches_are_as_small_as_their_bits() -> None:
    config = llama(head_dim=128, hidden_size=512).config
    dense, int8, int4 = (
        sc.SparseCache(config, max_length=16384, dtype=torch.bfloat16, kv=kv).nbytes for kv in (None, "int8", "int4")
    )
    assert dense / int8 > 1.8
    assert dense / int4 > 3


def test_heads_of_other_formats_have_their_own_bytes() -> None:
    cache = sc.SparseCache(llama().config, DUO, max_length=1024, page_size=16, kv=[["int4", "int8"], "int8"])
    (four, ring), (eight, _) = (layer.head_nbytes for layer in cache.cached_layers)
    assert ring == 16 * DIM * 2 * 4
    assert ring < four < eight < 1024 * DIM * 2 * 4


def test_nothing_is_allocated_later() -> None:
    model = sc.compile(llama(), inner="eager")
    cache = sc.SparseCache(model.config, max_length=96, page_size=8, kv="int4", rollback=9)
    before, places = cache.nbytes, [tensor.data_ptr() for layer in cache.cached_layers for tensor in layer.tensors()]
    logits_of(model, cache, random_tokens(60), [20, *ones(40)])
    cache.crop(-30)
    cache.reset()
    assert cache.nbytes == before
    assert [tensor.data_ptr() for layer in cache.cached_layers for tensor in layer.tensors()] == places


def test_the_report_says_how_many_bytes_a_token_takes() -> None:
    model = sc.compile(llama(), inner="eager")
    cache = sc.SparseCache(model.config, max_length=4096, max_batch=2, kv="int4")
    logits_of(model, cache, random_tokens(8), [7, 1])
    held = sum(layer.nbytes for layer in cache.cached_layers)
    report = str(model.sparse_compile_report)
    line = re.search(r"SparseCache: .*; ([\d,]+) bytes for each of ([\d,]+) tokens, ([\d.]+) of dense", report)
    assert line is not None, report
    each, tokens, smaller = (float(number.replace(",", "")) for number in line.groups())
    assert tokens == 2 * 4096
    assert each == round(held / (2 * 4096))
    assert smaller == round(held / cache.dense_nbytes, 2)
    assert model.sparse_compile_report.sites[0].kv_tokens == 2 * 4096


def test_a_cache_says_in_which_formats_its_heads_are_kept() -> None:
    cache = sc.SparseCache(llama().config, DUO, max_length=128, page_size=32, kv=[sc.KVFormat("int8", None), "fp8"])
    assert [str(layer) for layer in cache.cached_layers] == [
        "SparseCacheLayer(1 heads x 128 slots in int8, full, 1 heads x 32 slots (sink 2, recent 6))",
        "SparseCacheLayer(1 heads x 128 slots in fp8, fp8, 1 heads x 32 slots (sink 2, recent 6))",
    ]
