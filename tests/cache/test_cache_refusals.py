"""Invalid arguments and operations of a SparseCache raise errors: sizes, rollback, rows and files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

import sparse_compile as sc
from sparse_compile.masks import causal, per_head, sliding_window
from support.models import SMALL
from support.oracles.cache import llama, random_tokens
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


# -- invalid arguments ------------------------------------------------------------------------------------------------------


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
        ({"dtype": torch.int8}, ValueError, r"needs a floating point dtype, got torch\.int8"),
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
        (
            sc.Policy(layers={"model.layers.*": STREAMING}),
            ValueError,
            "identifies layers by number, but the policy names modules",
        ),
        (sc.Policy(decode=sc.Policy(layers={"a": STREAMING})), ValueError, "use layer indices or ranges"),
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


# -- operations ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rings", "both"])
def test_a_crop_to_a_length_or_of_too_many_tokens_is_refused(name: str) -> None:
    model, cache = holding(POLICIES[name])
    before = content(cache)
    with pytest.raises(ValueError, match=r"needs a number of at most 0, got 3: call crop\(-n\)"):
        cache.crop(3)
    with pytest.raises(ValueError, match="the cache holds 14 tokens, so 15 cannot be removed"):
        cache.crop(-15)
    cache.crop(0)
    assert_untouched(cache, before)
    assert_goes_on(model, cache, POLICIES[name])


def test_a_crop_of_an_empty_cache_is_refused() -> None:
    with pytest.raises(ValueError, match="holds 0 tokens, so 1 cannot be removed"):
        new_cache().crop(-1)


@pytest.mark.parametrize("name", ["rings", "both"])
def test_a_crop_of_what_a_ring_has_overwritten_is_refused(name: str) -> None:
    model, cache = holding(POLICIES[name])
    before = content(cache)
    with pytest.raises(sc.SparseCacheError, match="4 tokens cannot be removed: a ring of 8 slots has overwritten"):
        cache.crop(-4)
    assert_untouched(cache, before)
    assert_goes_on(model, cache, POLICIES[name])


def test_the_room_that_the_error_of_a_crop_asks_for_is_enough() -> None:
    """The suggested ``rollback`` also covers the slots that an earlier crop has used."""
    model, cache = holding(STREAMING, rollback=8)
    call(model, cache, TEXT[:, HELD:20])
    cache.crop(-6)
    with pytest.raises(sc.SparseCacheError, match=r"5 tokens cannot be removed") as refused:
        cache.crop(-5)
    asked = int(str(refused.value).split("rollback=")[1].split(" ")[0])
    assert asked > 8, f"the cache has rollback=8, and the error asks for {asked}"


def test_a_crop_of_more_than_rings_hold_names_a_rollback_that_is_enough() -> None:
    short = causal & sliding_window(2)
    _, cache = holding(short)
    with pytest.raises(sc.SparseCacheError, match=r"5 tokens cannot be removed from rings of 2 slots: .* rollback=5 or more"):
        cache.crop(-5)
    _, roomy = holding(short, rollback=5)
    roomy.crop(-5)
    assert roomy.get_seq_length() == HELD - 5


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
        (cut_short, "is not a SparseCache file"),
        (noise, "is not a SparseCache file"),
        (nothing, "is not a SparseCache file"),
        (foreign, "is not a SparseCache file of version 2: its header is empty"),
        (another_version, "is not a SparseCache file of version 2"),
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
        {"dtype": torch.bfloat16},
    ],
    ids=str,
)
def test_a_file_of_another_cache_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    cache = new_cache()
    cache.save(tmp_path / "prompt")
    with pytest.raises(
        ValueError,
        match="a cache of another model, policy, mode, page size, rollback, dtype or kv format than this one: load it into",
    ):
        new_cache(**other).load(tmp_path / "prompt")


@pytest.mark.parametrize("sizes", [{"max_length": 13}, {"max_batch": 1}], ids=str)
def test_a_file_of_more_than_fits_is_refused(sizes: dict[str, Any], tmp_path: Path) -> None:
    model, cache = sc.compile(llama(), DUO, inner="eager"), new_cache(max_batch=2)
    call(model, cache, random_tokens(HELD, batch=2))
    cache.save(tmp_path / "prompt")
    smaller = new_cache(**{"max_batch": 2, **sizes})
    with pytest.raises(ValueError, match="holds 2 sequences of 14 tokens, but the cache has room for"):
        smaller.load(tmp_path / "prompt")
    assert smaller.get_seq_length() == 0


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no cache file"):
        new_cache().load(tmp_path / "prompt")
