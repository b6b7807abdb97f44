"""Models with weights quantized by torchao keep their logits under the backend, and all attention calls are rewritten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    quantize_,
)
from transformers import DynamicCache

import sparse_compile as sc
from sparse_compile.masks import causal, sink, sliding_window
from support.oracles.cache import LAYERS, error, llama, random_tokens
from support.sessions.cache import ones

INT4 = torch.int4  # type: ignore[attr-defined]  # missing from torch's stubs
# set_inductor_config=True would change Inductor for the whole process. Int4WeightOnlyConfig does not support CPU.
CONFIGS = {
    "int8": Int8WeightOnlyConfig(set_inductor_config=False),
    "int4": IntxWeightOnlyConfig(weight_dtype=INT4, granularity=PerGroup(32)),
    "fp8": Float8WeightOnlyConfig(set_inductor_config=False),
    "int8 activations": Int8DynamicActivationInt8WeightConfig(set_inductor_config=False),
}
IDS, LENGTHS = random_tokens(60), [33, *ones(27)]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()
    counters.clear()


def small(name: str) -> Any:
    """A tiny Llama with quantized weights."""
    model = llama()
    quantize_(model, CONFIGS[name])
    return model


def logits_of(model: Any, cache: Any, lengths: Sequence[int] = LENGTHS) -> Tensor:
    with torch.no_grad():
        pieces = IDS[:, : sum(lengths)].split(list(lengths), dim=1)
        return torch.cat([model(piece.clone(), past_key_values=cache).logits for piece in pieces], dim=1)


def whole(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(IDS, use_cache=False).logits
        return logits


def assert_all_rewritten(model: Any, graphs: int) -> None:
    report = model.sparse_compile_report
    assert report.left == [], str(report)
    assert (len(report.rewritten), report.compiles) == (LAYERS * graphs, graphs)
    assert counters["graph_break"] == {}


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_are_in_fewer_bits(name: str) -> None:
    """Otherwise the other tests would show nothing."""
    assert 1e-3 < error(whole(small(name)), whole(llama())) < 1


@pytest.mark.parametrize("name", CONFIGS)
def test_a_forward_pass_is_exact(name: str) -> None:
    model = sc.compile(small(name), inner="eager")
    assert error(whole(model), whole(small(name))) < 1e-5
    assert_all_rewritten(model, 1)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_a_policy_hides_what_it_hides_of_other_weights(name: str) -> None:
    policy = causal & (sink(2) | sliding_window(6))
    model, plain = sc.compile(small(name), policy, inner="eager"), small(name)
    got = whole(model)
    assert error(got[:, :6], whole(plain)[:, :6]) < 1e-5
    assert error(got, whole(plain)) > 1e-2
    assert {site.action for site in model.sparse_compile_report.sites} == {"sparse"}
    assert_all_rewritten(model, 1)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_a_cache_of_plain_numbers_is_exact(name: str) -> None:
    model, plain = sc.compile(small(name), inner="eager"), small(name)
    cache = sc.SparseCache(model.config, max_length=64, page_size=32)
    assert error(logits_of(model, cache), logits_of(plain, DynamicCache(config=plain.config))) < 1e-5
    assert_all_rewritten(model, 2)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_a_cache_in_int8_is_near_a_dynamic_one(name: str) -> None:
    model, plain = sc.compile(small(name), inner="eager"), small(name)
    cache = sc.SparseCache(model.config, max_length=64, page_size=32, kv="int8")
    got, wanted = logits_of(model, cache), logits_of(plain, DynamicCache(config=plain.config))
    assert 1e-4 < float((got - wanted).norm() / wanted.norm()) < 0.02
    assert error(got[:, :33], wanted[:, :33]) < 1e-5, "a prompt sees itself as it is"
    assert_all_rewritten(model, 2)


def test_generate_over_a_cache_in_int8_finds_the_tokens_of_steps_by_hand() -> None:
    model = sc.compile(small("int8"), inner="eager")
    caches = [sc.SparseCache(model.config, max_length=64, page_size=32, kv="int8") for _ in range(2)]
    stop = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "eos_token_id": None}
    tokens = model.generate(IDS[:, :20], past_key_values=caches[0], **stop)
    with torch.no_grad():
        pieces = tokens[:, :-1].split([20, *ones(19)], dim=1)
        logits = [model(piece.clone(), past_key_values=caches[1]).logits[:, -1] for piece in pieces]
    assert tokens[0, 20:].tolist() == [int(last.argmax()) for last in logits]
    assert model.sparse_compile_report.left == []


@pytest.mark.slow
def test_inductor_is_near_a_dynamic_cache_too() -> None:
    model, plain = sc.compile(small("int8")), small("int8")
    cache = sc.SparseCache(model.config, max_length=64, page_size=32, kv="int8")
    steps = ones(40)  # all steps share one graph
    got, wanted = logits_of(model, cache, steps), logits_of(plain, DynamicCache(config=plain.config), steps)
    assert float((got - wanted).norm() / wanted.norm()) < 0.02
    assert_all_rewritten(model, 1)
