"""Errors of a SparseCache state the rule, the value and the remedy. They leave the cache unchanged and usable."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import sparse_compile as sc
from sparse_compile.masks import causal, sliding_window
from support.models import SMALL
from support.oracles.cache import llama, random_tokens, visible
from support.sessions.held import (
    DUO,
    HELD,
    POLICIES,
    STREAMING,
    TEXT,
    assert_goes_on,
    assert_untouched,
    call,
    content,
    holding,
    new_cache,
)

pytestmark = pytest.mark.usefixtures("fresh")


# -- in use ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rings", "both"])
def test_tokens_past_max_length_are_refused_before_anything_is_written(name: str) -> None:
    model, cache = holding(POLICIES[name])
    before = content(cache)
    with pytest.raises(sc.SparseCacheError, match="room for max_length=24 tokens, holds 14, and was given 11 more"):
        call(model, cache, random_tokens(11))
    assert_untouched(cache, before)
    assert_goes_on(model, cache, POLICIES[name])


def test_a_decode_step_past_max_length_is_refused_before_anything_is_written() -> None:
    model, cache = holding(max_length=16)
    for at in (14, 15):
        call(model, cache, TEXT[:, at : at + 1])
    before = content(cache)
    with pytest.raises(
        sc.SparseCacheError, match=r"max_length=16 tokens, holds 16, and was given 1 more: .* larger max_length"
    ):
        call(model, cache, TEXT[:, 16:17])
    assert_untouched(cache, before)
    assert cache.get_seq_length() == 16


def test_a_first_prompt_past_max_length_is_refused() -> None:
    model, cache = sc.compile(llama(), DUO, inner="eager"), new_cache()
    with pytest.raises(sc.SparseCacheError, match="max_length=24 tokens, holds 0, and was given 25"):
        call(model, cache, random_tokens(25))
    call(model, cache, TEXT[:, :HELD])
    assert_goes_on(model, cache, DUO)


def test_more_rows_than_max_batch_are_refused() -> None:
    model, cache = sc.compile(llama(), DUO, inner="eager"), new_cache(max_batch=2)
    before = content(cache)
    with pytest.raises(ValueError, match="max_batch=2, got 3 sequences: build it with a larger max_batch"):
        call(model, cache, random_tokens(8, batch=3))
    assert_untouched(cache, before)
    call(model, cache, TEXT[:, :HELD])
    assert_goes_on(model, cache, DUO)


def test_an_error_names_a_number_where_the_batch_is_a_symbol() -> None:
    model, cache = sc.compile(llama(), DUO, inner="eager", dynamic=True), new_cache(max_batch=2)
    with pytest.raises(ValueError, match="max_batch=2, got 3 sequences: build it with a larger max_batch"):
        call(model, cache, random_tokens(8, batch=3))


def test_a_model_serves_a_cache_that_fits_after_one_of_another_dtype_was_refused() -> None:
    model, cache = sc.compile(llama(), DUO, inner="eager"), new_cache()
    with pytest.raises(ValueError, match="dtype"):
        call(model, new_cache(dtype=torch.bfloat16), TEXT)
    call(model, cache, TEXT[:, :HELD])
    assert_goes_on(model, cache, DUO)


def test_another_number_of_rows_without_a_reset_is_refused() -> None:
    model, cache = holding(max_batch=3)
    before = content(cache)
    with pytest.raises(sc.SparseCacheError, match="holds 1 sequences and was given 2: reset it, or use batch_select_indices"):
        call(model, cache, random_tokens(1, batch=2))
    assert_untouched(cache, before)
    assert_goes_on(model, cache, DUO)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 4}, r"built for 2 KV heads of 16 .*, got 4 of 16 .*: build it from the config of this model"),
        ({"head_dim": 32}, r"built for 2 KV heads of 16 \(values 16\), got 2 of 32 \(32\)"),
    ],
    ids=["heads", "head_dim"],
)
def test_another_models_sizes_are_refused(changes: dict[str, Any], message: str) -> None:
    other, cache = sc.compile(llama(**changes), inner="eager"), new_cache()
    with pytest.raises(Exception, match=message):
        call(other, cache, TEXT)
    assert cache.get_seq_length() == 0


def test_a_model_with_more_layers_is_refused_before_anything_is_written() -> None:
    cache = new_cache()
    before = content(cache)
    with pytest.raises((sc.SparseCacheError, ValueError), match="layer"):
        call(sc.compile(llama(num_hidden_layers=3), inner="eager"), cache, TEXT[:, :4])
    assert_untouched(cache, before)


def test_a_model_with_fewer_layers_is_refused_in_its_second_step() -> None:
    model, cache = sc.compile(llama(num_hidden_layers=1), inner="eager"), new_cache()
    call(model, cache, TEXT[:, :4])
    with pytest.raises(sc.SparseCacheError, match="the last pass never reached layer 1"):
        call(model, cache, TEXT[:, 4:5])


def test_another_dtype_is_refused() -> None:
    model, cache = sc.compile(llama(), DUO, inner="eager"), new_cache(dtype=torch.bfloat16)
    with pytest.raises(Exception, match=r"built with dtype=torch.bfloat16, got keys of torch.float32: build it with"):
        call(model, cache, TEXT)
    assert cache.get_seq_length() == 0


def test_another_device_is_refused() -> None:
    cache = new_cache(device="meta")
    with pytest.raises(ValueError, match="built with device=meta, got keys on cpu: build it on that device"):
        cache.update(torch.zeros(1, 2, 3, 16), torch.zeros(1, 2, 3, 16), 0)


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_use_without_the_backend_is_refused(backend: str | None, attention: str) -> None:
    cache, model = new_cache(), llama(attention)
    before = content(cache)
    run = model if backend is None else torch.compile(model, backend=backend)
    with pytest.raises(sc.SparseCacheError, match=r"without the sparse_compile backend: compile it with .*Nothing was written"):
        call(run, cache, TEXT[:, :HELD])
    assert_untouched(cache, before)
    fast = sc.compile(llama(), DUO, inner="eager")
    call(fast, cache, TEXT[:, :HELD])
    assert_goes_on(fast, cache, DUO)


def test_generate_without_the_backend_is_refused() -> None:
    with pytest.raises(sc.SparseCacheError, match="without the sparse_compile backend"):
        llama().generate(TEXT, past_key_values=new_cache(), max_new_tokens=4)


def test_attention_that_the_passes_cannot_read_is_refused() -> None:
    model = sc.compile(llama("cache_oracle"), DUO, inner="eager")
    visible[:] = [torch.ones(1, 4, 22, 24, dtype=torch.bool)] * 2
    cache = new_cache()
    before = content(cache)
    with pytest.raises(Exception, match="SparseCache"):
        call(model, cache, TEXT)
    assert_untouched(cache, before)


# -- a cache that keeps too little ------------------------------------------------------------------------------------------


def test_a_policy_of_the_cache_applies_although_the_model_was_compiled_without() -> None:
    model, cache = sc.compile(llama(), inner="eager"), new_cache(STREAMING)
    call(model, cache, TEXT[:, :HELD])
    assert_goes_on(model, cache, STREAMING)


def test_a_policy_of_the_model_applies_although_the_cache_keeps_everything() -> None:
    model, cache = sc.compile(llama(), STREAMING, inner="eager"), new_cache(None)
    call(model, cache, TEXT[:, :HELD])
    assert_goes_on(model, cache, STREAMING)


def test_two_policies_both_apply() -> None:
    model, cache = sc.compile(llama(), causal & sliding_window(9), inner="eager"), new_cache(STREAMING)
    call(model, cache, TEXT[:, :HELD])
    assert_goes_on(model, cache, STREAMING & sliding_window(9))


def test_a_window_that_only_the_config_knows_of_is_refused() -> None:
    """By the config a window is enough, but the masks of the model show more."""
    config = AutoConfig.for_model("mistral", **SMALL, num_key_value_heads=2, sliding_window=8)
    cache = sc.SparseCache(config, max_length=24, page_size=1)
    model = sc.compile(llama(), inner="eager")
    with pytest.raises(
        Exception, match="layer 0 of the cache keeps the first 0 and the last 8 tokens for query head 0, but its mask"
    ):
        call(model, cache, TEXT)
    assert cache.get_seq_length() == 0


def test_a_wider_window_of_the_model_is_refused() -> None:
    narrow, wide = (AutoConfig.for_model("mistral", **SMALL, num_key_value_heads=2, sliding_window=size) for size in (8, 12))
    factory: Any = AutoModelForCausalLM
    model = sc.compile(factory.from_config(wide, attn_implementation="sdpa").eval(), inner="eager")
    with pytest.raises(
        Exception, match=r"keeps the first 0 and the last 8 tokens .* shows more: build the SparseCache from the config"
    ):
        call(model, sc.SparseCache(narrow, max_length=24, page_size=1), TEXT)
