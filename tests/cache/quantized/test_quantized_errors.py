"""Errors of formats state the rule, the value and the remedy. Numbers that are not finite stay in their head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

import sparse_compile as sc
from sparse_compile.cache.kv_format import ByLayer
from sparse_compile.passes.lower.paged import unreadable_format
from sparse_compile.passes.storage.codec import Format
from support.installed import pretend
from support.models import GPT2
from support.oracles.cache import error, llama
from support.sessions.cache import ones
from support.sessions.quantized import Session, Text, assert_codes_of_whole_text, bits, random_text

MIXED: ByLayer = [["int8", "int4"], ["fp8", "int8"]]


ODD = AutoConfig.for_model("gpt2", **{**GPT2, "n_embd": 60})  # 4 heads of 15 channels


def new_cache(kv: Any, config: Any = None, **options: Any) -> sc.SparseCache:
    return sc.SparseCache(config or llama().config, **{"max_length": 64, "kv": kv, **options})


# -- formats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sc.KVFormat("int9"), r"^key needs to be one of int8, int4, fp8 or None, got 'int9'$"),
        (lambda: sc.KVFormat("int8", "e5m2"), r"^value needs to be one of int8, int4, fp8 or None, got 'e5m2'$"),
        (lambda: sc.KVFormat(""), r"^key needs to be one of .*, got ''$"),
        (lambda: sc.KVFormat(8), r"^key needs to be one of .*, got 8$"),  # type: ignore[arg-type]
        (lambda: sc.KVFormat(key_group=0), r"^key_group needs to be a positive integer, got 0$"),
        (lambda: sc.KVFormat(value_group=-2), r"^value_group needs to be a positive integer, got -2$"),
        (lambda: sc.KVFormat(key_group=2.0), r"^key_group needs to be a positive integer, got 2.0$"),  # type: ignore[arg-type]
        (lambda: sc.KVFormat(value_group=True), r"^value_group needs to be a positive integer, got True$"),
        (lambda: new_cache("int3"), r"^key needs to be one of int8, int4, fp8 or None, got 'int3'$"),
        (lambda: new_cache(["int8", "INT4"]), r"^key needs to be one of int8, int4, fp8 or None, got 'INT4'$"),
    ],
)
def test_other_names_and_sizes_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("kv", "options", "message"),
    [
        ("int4", {"config": ODD}, r"int4 packs two channels into a byte and needs an even head_dim, got 15: use int8 or fp8"),
        (sc.KVFormat(None, "int4"), {"config": ODD}, r"needs an even head_dim, got 15: use int8 or fp8"),
        (sc.KVFormat(key_group=48), {}, r"key_group needs to divide page_size=64, got 48: pass KVFormat a key_group"),
        (sc.KVFormat(key_group=128), {}, r"key_group needs to divide page_size=64, got 128"),
        ("int8", {"page_size": 48}, r"key_group needs to divide page_size=48, got 32"),
        (sc.KVFormat(value_group=5), {}, r"value_group needs to divide the head_dim of values, 16, got 5: pass KVFormat"),
        (sc.KVFormat(value_group=32), {}, r"value_group needs to divide the head_dim of values, 16, got 32"),
    ],
)
def test_formats_that_do_not_fit_a_model_are_refused(kv: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_cache(kv, **options)


def test_groups_of_what_has_none_do_not_matter() -> None:
    assert new_cache(sc.KVFormat("fp8", None, key_group=48, value_group=5)).nbytes > 0
    assert new_cache("int8", ODD).nbytes > 0


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        (["int8"], r"kv has formats for 1 layers, but the model has 2: pass one for each, or one for all"),
        (["int8", None, "int4"], r"kv has formats for 3 layers, but the model has 2"),
        ([], r"kv has formats for 0 layers, but the model has 2"),
        ([["int8"], "int8"], r"kv has formats for 1 KV heads, but the model has 2: pass one for each, or one for all"),
        (["int8", ["int8"] * 4], r"kv has formats for 4 KV heads, but the model has 2"),
    ],
)
def test_sequences_of_another_length_are_refused(kv: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        new_cache(kv)


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        (8, r"kv needs a KVFormat, its name, None, or a sequence of those, got 8"),
        ({"int8"}, r"kv needs a KVFormat, its name, None, or a sequence of those, got \{'int8'\}"),
        (True, r"kv needs a KVFormat, its name, None, or a sequence of those, got True"),
        (torch.int8, r"kv needs a KVFormat, its name, None, or a sequence of those, got torch.int8"),
        ([8, "int8"], r"kv needs a KVFormat, its name, None, or a sequence of those, got 8"),
        ([["int8", 8], "int8"], r"kv needs a KVFormat, its name, or None for a KV head, got 8"),
        ([["int8", ["int8"]], "int8"], r"kv needs a KVFormat, its name, or None for a KV head, got \['int8'\]"),
    ],
)
def test_other_types_are_refused(kv: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        new_cache(kv)


@pytest.mark.parametrize("kv", ["int8", ["int4", None], [["fp8", None], None], sc.KVFormat(None, "int8")], ids=str)
def test_formats_without_torchao_are_refused(kv: ByLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "torchao", None)
    with pytest.raises(ImportError, match=r"kv='(int8|int4|fp8)' needs torchao 0.13 or newer, found none: pip install"):
        new_cache(kv)


@pytest.mark.parametrize("kv", [None, [None, None], sc.KVFormat(None, None)], ids=str)
def test_a_cache_of_plain_numbers_needs_no_torchao(kv: ByLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "torchao", None)
    assert all(layer.quantized == [] for layer in new_cache(kv).cached_layers)


def test_fp8_is_refused_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match=r"fp8 needs a GPU of compute capability 8.9, but cuda:0 has 8.0: use int8"):
        new_cache(sc.KVFormat(None, "fp8"), device="cuda:0")


# -- NaN and infinity ---------------------------------------------------------------------------------------------------


def spoiled(text: Text, which: str, value: float, *, layer: int, head: int, token: int) -> Text:
    """The text with one NaN or infinity."""
    text = Text(*(x.clone() for x in text))
    {"keys": text.k, "values": text.v}[which][layer, 0, head, token, 3] = value
    return text


@pytest.mark.parametrize(("which", "value"), [("keys", torch.nan), ("keys", torch.inf), ("values", -torch.inf)])
def test_numbers_that_are_none_are_refused_if_asked_for(which: str, value: float) -> None:
    """The cache counts none of the tokens as written, and later logits are right."""
    text, session = random_text(60), Session(MIXED, debug=True)
    session.feed(text.at(0, 40), [30, *ones(10)])
    bad = spoiled(text, which, value, layer=1, head=0, token=43)
    message = "new keys or values are infinite or not a number, and the cache was built with debug=True"
    with pytest.raises(ValueError, match=message):
        session.feed(bad.at(40, 50))
    session.feed(bad.at(40, 43), ones(3))
    with pytest.raises(ValueError, match=message):
        session.feed(bad.at(43, 44))
    assert session.cache.get_seq_length() == 43
    session.feed(text.at(43), [*ones(7), 10])
    assert_codes_of_whole_text(session, text)


def test_numbers_that_are_none_are_no_error_in_heads_that_keep_plain_numbers() -> None:
    text, session = random_text(40), Session([["int8", None], "int8"], debug=True)
    session.feed(spoiled(text, "keys", torch.nan, layer=0, head=1, token=7))
    assert session.cache.get_seq_length() == 40


@pytest.mark.parametrize(("which", "value"), [("keys", torch.nan), ("keys", torch.inf), ("values", -torch.inf)])
def test_numbers_that_are_none_stay_in_their_head(which: str, value: float) -> None:
    text, lengths = random_text(60, batch=2), [20, *ones(30), 10]
    session = Session("int8", max_batch=2)
    wanted, quantized = session.feed(text, lengths), bits(session.cache)
    session.reset()
    got = session.feed(spoiled(text, which, value, layer=0, head=1, token=15), lengths)
    others = torch.ones(2, 2, 4, dtype=torch.bool)
    others[0, 0, 2:] = False  # layer, row, query heads of the KV head
    assert torch.isfinite(wanted).all() and not torch.equal(got[0, 0, 2:], wanted[0, 0, 2:])
    assert torch.equal(got[others], wanted[others])
    for then, now in zip(quantized, bits(session.cache), strict=True):
        assert torch.equal(then[:, 0], now[:, 0]) and torch.equal(then[1], now[1])


@pytest.mark.parametrize("which", ["keys", "values"])
def test_groups_of_numbers_stay_right_in_the_head_of_one_that_is_none(which: str) -> None:
    text, session = random_text(90), Session("int8")
    session.feed(spoiled(text, which, torch.nan, layer=0, head=1, token=15))
    session.held = text
    read = session.decoded(0)[0 if which == "keys" else 1][:, 1]
    wanted: Tensor = (text.k if which == "keys" else text.v)[0][:, 1]
    right = torch.ones(90, 16, dtype=torch.bool)
    if which == "keys":
        right[:32, 3] = False  # one channel of 32 tokens shares the group
    else:
        right[15] = False  # the channels of one token share the group
    assert error(read[:, right], wanted[:, right]) < 0.01


@pytest.mark.parametrize(
    ("forms", "dim", "reason"),
    [
        ((Format("int8", 32, 1), Format("int4", 1, 32)), 128, ""),
        ((Format("int8", 4, 1), Format()), 128, "a power of two of at least 8 (or 1), not head_dim 128 and groups of 4"),
        ((Format("int4", 32, 1), Format()), 70, "only if 4 divides the head_dim"),
        ((Format(), Format("int8", 1, 2)), 128, "a head has at most 32 groups of channels, not 64"),
    ],
)
def test_codes_that_the_kernel_does_not_read_are_decoded(forms: tuple[Format, Format], dim: int, reason: str) -> None:
    said = unreadable_format(forms, (dim, dim))
    assert reason in said
    assert bool(reason) == bool(said)
