"""What a SparseCache refuses, with the rule, the value and the remedy; it holds what it held before, and goes on right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import sparse_compile as sc
from cache_oracle import error, llama, random_tokens, visible, whole
from models import SMALL
from sparse_compile.masks import Mask, causal, per_head, sink, sliding_window

STREAMING = causal & (sink(2) | sliding_window(6))
DUO = per_head([causal, STREAMING])
POLICIES: dict[str, sc.Policy | Mask] = {"pages": causal, "rings": STREAMING, "both": sc.Policy(DUO, layers={0: STREAMING})}
HELD, TEXT = 14, random_tokens(22)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def new_cache(policy: sc.Policy | Mask | None = DUO, **options: Any) -> sc.SparseCache:
    return sc.SparseCache(llama().config, policy, **{"max_length": 24, "page_size": 1, **options})


def call(model: Any, cache: sc.SparseCache, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, past_key_values=cache).logits
        return logits


def holding(policy: sc.Policy | Mask = DUO, **options: Any) -> tuple[Any, sc.SparseCache]:
    """A compiled model, and a cache that holds the first tokens of the text."""
    model, cache = sc.compile(llama(), policy, inner="eager"), new_cache(policy, **options)
    call(model, cache, TEXT[:, :HELD])
    return model, cache


def content(cache: Any) -> list[Tensor]:
    buffers = [buffer for layer in cache.layers for buffer in layer.buffers]
    return [tensor.clone() for tensor in [*cache.positions.tensors(), *buffers]]


def assert_untouched(cache: sc.SparseCache, before: list[Tensor]) -> None:
    assert all(torch.equal(now, then) for now, then in zip(content(cache), before, strict=True))


def assert_goes_on(model: Any, cache: sc.SparseCache, policy: sc.Policy | Mask) -> None:
    """The rest of the text has the logits it would have had."""
    assert cache.get_seq_length() == HELD
    got = torch.cat([call(model, cache, TEXT[:, at : at + 1]) for at in range(HELD, 22)], dim=1)
    assert error(got, whole(TEXT, policy)[:, HELD:]) < 1e-5


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
    """The config says that a window is enough, and the model shows more."""
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


# -- what makes no cache ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"max_length": 0}, ValueError, "max_length needs to be at least 1, got 0"),
        ({"max_batch": 0}, ValueError, "max_batch needs to be at least 1, got 0"),
        ({"page_size": -3}, ValueError, "page_size needs to be at least 1, got -3"),
        ({"rollback": -1}, ValueError, "rollback needs to be at least 0, got -1"),
        ({"max_length": 10.0}, TypeError, r"max_length needs an integer, got 10\.0"),
        ({"max_batch": True}, TypeError, "max_batch needs an integer, got True"),
        ({"page_size": "64"}, TypeError, "page_size needs an integer, got '64'"),
        ({"rollback": None}, TypeError, "rollback needs an integer, got None"),
        ({"mode": "loose"}, ValueError, "mode needs to be one of strict, chunk_relaxed, got 'loose'"),
        ({"dtype": torch.int8}, ValueError, r"keeps floating point numbers, got dtype torch\.int8"),
    ],
)
def test_sizes_and_modes_that_make_no_cache_are_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        new_cache(**options)


@pytest.mark.parametrize(
    ("policy", "kind", "message"),
    [
        (sc.Policy(layers={2: STREAMING}), ValueError, r"names layer 2, but the model has 2 layers \(0 to 1\)"),
        (sc.Policy(layers={range(1, 5): STREAMING}), ValueError, "names layer 4, but the model has 2 layers"),
        (sc.Policy(prefill=sc.Policy(layers={7: STREAMING})), ValueError, "names layer 7"),
        (sc.Policy(layers={"model.layers.*": STREAMING}), ValueError, "knows layers by number, and the policy names modules"),
        (sc.Policy(decode=sc.Policy(layers={"a": STREAMING})), ValueError, "write it with layer indices or ranges"),
        (
            per_head([causal, STREAMING, causal]),
            ValueError,
            "per_head of 3 masks, but the model has 4 query heads and 2 KV heads",
        ),
        ("streaming", TypeError, "policy needs a Policy, a mask or None, got 'streaming'"),
    ],
    ids=["layer", "range", "phase", "modules", "modules of a phase", "heads", "text"],
)
def test_a_policy_for_another_model_is_refused(policy: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        new_cache(policy)


def test_a_config_with_layers_that_are_no_attention_is_refused() -> None:
    kinds = ["linear_attention", "full_attention"]
    config = AutoConfig.for_model("qwen3_next", **SMALL, num_key_value_heads=2, layer_types=kinds)
    with pytest.raises(ValueError, match="the model has layers of kind 'linear_attention'"):
        sc.SparseCache(config, max_length=24)


@pytest.mark.parametrize("config", [None, {"num_hidden_layers": 2}, "llama"])
def test_what_is_no_config_is_refused(config: Any) -> None:
    with pytest.raises(
        ValueError, match=r"needs a config with num_hidden_layers and num_attention_heads, got .*: pass model\.config"
    ):
        sc.SparseCache(config, max_length=24)


# -- what is done to it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rings", "both"])
def test_a_crop_to_a_length_or_of_too_many_tokens_is_refused(name: str) -> None:
    model, cache = holding(POLICIES[name])
    before = content(cache)
    with pytest.raises(ValueError, match=r"needs a number of at most 0, got 3: crop\(-n\)"):
        cache.crop(3)
    with pytest.raises(ValueError, match="the cache holds 14 tokens, and 15 cannot be taken back"):
        cache.crop(-15)
    cache.crop(0)
    assert_untouched(cache, before)
    assert_goes_on(model, cache, POLICIES[name])


def test_a_crop_of_an_empty_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="holds 0 tokens, and 1 cannot be taken back"):
        new_cache().crop(-1)


@pytest.mark.parametrize("name", ["rings", "both"])
def test_a_crop_of_what_a_ring_has_overwritten_is_refused(name: str) -> None:
    model, cache = holding(POLICIES[name])
    before = content(cache)
    with pytest.raises(sc.SparseCacheError, match="4 tokens cannot be taken back: a ring of 8 slots has overwritten"):
        cache.crop(-4)
    assert_untouched(cache, before)
    assert_goes_on(model, cache, POLICIES[name])


def test_the_room_that_the_error_of_a_crop_asks_for_is_enough() -> None:
    """Also after an earlier crop has used some of it."""
    model, cache = holding(STREAMING, rollback=8)
    call(model, cache, TEXT[:, HELD:20])
    cache.crop(-6)
    with pytest.raises(sc.SparseCacheError, match=r"5 tokens cannot be taken back") as refused:
        cache.crop(-5)
    asked = int(str(refused.value).split("rollback=")[1].split(" ")[0])
    assert asked > 8, f"the cache has rollback=8, and the error asks for {asked}"


@pytest.mark.parametrize(
    "change",
    [lambda cache: cache.batch_repeat_interleave(3), lambda cache: cache.reorder_cache(torch.zeros(3, dtype=torch.int64))],
)
def test_more_rows_than_max_batch_are_refused_in_a_selection(change: Callable[[sc.SparseCache], None]) -> None:
    model, cache = holding(max_batch=2)
    before = content(cache)
    with pytest.raises(ValueError, match="max_batch=2, got 3 sequences"):
        change(cache)
    assert_untouched(cache, before)
    assert_goes_on(model, cache, DUO)


@pytest.mark.parametrize("rows", [[1], [0, 1], [-1]])
def test_rows_that_the_cache_does_not_hold_are_refused_in_a_selection(rows: list[int]) -> None:
    _, cache = holding(max_batch=2)
    before = content(cache)
    with pytest.raises((ValueError, IndexError)):
        cache.batch_select_indices(torch.tensor(rows))
    assert_untouched(cache, before)


# -- files --------------------------------------------------------------------------------------------------------------------


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def noise(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 8)


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, str(path))


def another_version(path: Path) -> None:
    change_header(path, version="0")


def without_a_tensor(path: Path) -> None:
    rewrite(path, lambda tensors: {name: tensors[name] for name in sorted(tensors)[1:]})


def with_another_shape(path: Path) -> None:
    rewrite(path, lambda tensors: {**tensors, "layer_1_0": tensors["layer_1_0"][..., :8].contiguous()})


def with_another_dtype(path: Path) -> None:
    rewrite(path, lambda tensors: {**tensors, "layer_1_0": tensors["layer_1_0"].half()})


def with_columns_that_are_no_number(path: Path) -> None:
    change_header(path, columns="many")


def with_negative_columns(path: Path) -> None:
    change_header(path, columns="-3")


def without_rows(path: Path) -> None:
    change_header(path, rows=None)


def header_of(path: Path) -> dict[str, str]:
    raw = path.read_bytes()
    header: dict[str, str] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    return header


def change_header(path: Path, **changes: str | None) -> None:
    header = {key: value for key, value in {**header_of(path), **changes}.items() if value is not None}
    save_file(load_file(path), str(path), metadata=header)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    header = header_of(path)
    save_file(change(load_file(path)), str(path), metadata=header)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, "is no file of a SparseCache"),
        (noise, "is no file of a SparseCache"),
        (nothing, "is no file of a SparseCache"),
        (foreign, "is no file of a SparseCache of version 1: it says nothing about itself"),
        (another_version, "is no file of a SparseCache of version 1"),
        (without_a_tensor, "is broken: .* is missing or has another shape"),
        (with_another_shape, "is broken: layer_1_0 is missing or has another shape"),
        (with_another_dtype, "is broken: layer_1_0 is missing or has another"),
        (with_columns_that_are_no_number, "is broken"),
        (with_negative_columns, "is broken"),
        (without_rows, "is broken"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_or_foreign_file_is_refused(damage: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    model, cache = holding()
    path, before = tmp_path / "prompt", content(cache)
    cache.save(path)
    damage(path)
    with pytest.raises(ValueError, match=message):
        cache.load(path)
    assert_untouched(cache, before)
    assert_goes_on(model, cache, DUO)


@pytest.mark.parametrize(
    "other",
    [
        {"policy": STREAMING},
        {"policy": None},
        {"mode": "chunk_relaxed"},
        {"page_size": 5},
        {"rollback": 3},
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_a_file_of_another_cache_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    cache = new_cache()
    cache.save(tmp_path / "prompt")
    with pytest.raises(
        ValueError, match="was saved from a cache of another model, policy, mode, page size or dtype than this one"
    ):
        new_cache(**other).load(tmp_path / "prompt")


@pytest.mark.parametrize("sizes", [{"max_length": 13}, {"max_batch": 1}], ids=str)
def test_a_file_of_more_than_fits_is_refused(sizes: dict[str, Any], tmp_path: Path) -> None:
    model, cache = sc.compile(llama(), DUO, inner="eager"), new_cache(max_batch=2)
    call(model, cache, random_tokens(HELD, batch=2))
    cache.save(tmp_path / "prompt")
    smaller = new_cache(**{"max_batch": 2, **sizes})
    with pytest.raises(ValueError, match="holds 2 sequences of 14 tokens, and the cache takes"):
        smaller.load(tmp_path / "prompt")
    assert smaller.get_seq_length() == 0


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no cache file"):
        new_cache().load(tmp_path / "prompt")
