"""A model whose layers are compiled once gives what the whole graph gives, for many models, policies and caches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, page_topk, per_head, sink, sliding_window
from support.models import DECODERS, Decoder, left_padding, tokens
from support.pieces import Recorder, recorded

LAYERS = 4
STREAMING = causal & (sink(2) | sliding_window(6))
DUO = per_head([causal, STREAMING])
TOPK = causal & page_topk(16, page=4)

pytestmark = pytest.mark.usefixtures("fresh")


def deep(decoder: Decoder) -> Decoder:
    """The decoder with ``LAYERS`` layers; every second one of a mixed model is not sliding."""
    sizes: dict[str, Any] = {name: LAYERS for name in ("num_hidden_layers", "n_layer", "n_layers") if name in decoder.config}
    if "layer_types" in decoder.config:
        sizes["layer_types"] = ["sliding_attention", "full_attention"] * 2
    return replace(decoder, config=decoder.config | sizes)


LLAMA = deep(DECODERS[0])


def prompt(decoder: Decoder, *lengths: int, cut: bool) -> tuple[list[Tensor], Recorder, sc.Report]:
    """The logits of prompts of these lengths without a cache."""
    torch._dynamo.reset()
    with recorded(cut=cut) as recorder, torch.no_grad():
        model = sc.compile(decoder.build(), kernel="reference")
        padded = [(tokens(length=length), left_padding(length=length)) for length in lengths]
        logits = [model(ids, attention_mask=mask, use_cache=False).logits for ids, mask in padded]
    return logits, recorder, model.sparse_compile_report


def session(policy: sc.Policy | Mask | None, *, cut: bool, **options: Any) -> tuple[list[Tensor], Recorder, sc.Report]:
    """The logits of a padded prompt and of three decode steps over a ``SparseCache``, and its content at the end."""
    torch._dynamo.reset()
    ids, mask = tokens(length=20), left_padding(length=20)
    with recorded(cut=cut) as recorder, torch.no_grad():
        model = sc.compile(LLAMA.build(), policy, kernel="reference")
        cache = sc.SparseCache(model.config, policy, max_length=64, max_batch=2, page_size=4, **options)
        logits = [
            model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache).logits
            for start, stop in ((0, 17), (17, 18), (18, 19), (19, 20))
        ]
    held = [tensor for layer in cache.cached_layers for tensor in layer.tensors()]
    return logits + held, recorder, model.sparse_compile_report


def assert_equal(got: list[Tensor], wanted: list[Tensor]) -> None:
    for x, y in zip(got, wanted, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("decoder", DECODERS, ids=str)
def test_a_layer_of_every_kind_is_compiled_once(decoder: Decoder) -> None:
    kinds = 2 if decoder.name == "gpt_oss" else 1  # its dense masks are computed in each layer
    (got,), recorder, _ = prompt(deep(decoder), 24, cut=True)
    (wanted,), _, _ = prompt(deep(decoder), 24, cut=False)
    assert not recorder.whole and torch.equal(got, wanted)
    assert recorder.calls == kinds
    assert len(recorder.compiled) == kinds + 2  # the embedding and the head


def test_later_lengths_run_the_same_pieces() -> None:
    got, recorder, _ = prompt(LLAMA, 24, 31, 40, cut=True)
    wanted, whole, _ = prompt(LLAMA, 24, 31, 40, cut=False)
    assert_equal(got, wanted)
    assert len(recorder.compiled) == 3 * len(whole.compiled) == 6  # lengths of any size are the second graph


MIXED = sc.Policy(causal, layers={1: STREAMING, 3: STREAMING})
POLICIES: dict[str, tuple[sc.Policy | Mask | None, int]] = {
    "none": (None, 1),
    "streaming": (STREAMING, 1),
    "by head": (DUO, 1),
    "by layer": (MIXED, 2),
    "pages": (TOPK, 1),
}


@pytest.mark.parametrize(("policy", "kinds"), POLICIES.values(), ids=POLICIES)
def test_a_cache_holds_the_same_after_pieces(policy: sc.Policy | Mask | None, kinds: int) -> None:
    got, recorder, report = session(policy, cut=True)
    wanted, _, whole_report = session(policy, cut=False)
    assert not recorder.whole
    assert_equal(got, wanted)
    assert len(recorder.compiled) == report.compiles * (kinds + 2)
    assert [str(site) for site in report.sites] == [str(site) for site in whole_report.sites]
    assert [site.layer for site in report.sites] == [*range(LAYERS)] * report.compiles


def test_a_quantized_cache_runs_in_pieces() -> None:
    got, recorder, report = session(DUO, cut=True, kv="int8")
    wanted, _, _ = session(DUO, cut=False, kv="int8")
    assert not recorder.whole and len(recorder.compiled) == 3 * report.compiles
    assert_equal(got, wanted)


def test_a_static_cache_that_counts_in_every_layer_keeps_its_order() -> None:
    def steps(*, cut: bool) -> list[Tensor]:
        torch._dynamo.reset()
        with recorded(cut=cut) as recorder, torch.no_grad():
            model = sc.compile(LLAMA.build(), kernel="reference")
            cache = StaticCache(config=model.config, max_cache_len=32)
            ids = tokens(length=20)
            logits = [model(ids[:, a:b], past_key_values=cache).logits for a, b in ((0, 17), (17, 18), (18, 19), (19, 20))]
        assert not (cut and recorder.whole)
        return logits

    assert_equal(steps(cut=True), steps(cut=False))


def test_inductor_compiles_the_pieces() -> None:
    torch._dynamo.reset()
    ids, mask = tokens(), left_padding()
    model = LLAMA.build()
    with torch.no_grad():
        wanted = model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        got = sc.compile(model)(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    assert torch.allclose(got, wanted, atol=1e-5)
    assert model.sparse_compile_report.notes == []  # every piece is in Inductor's cache
