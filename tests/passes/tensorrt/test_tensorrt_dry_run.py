"""What torch-tensorrt makes of rewritten graphs, up to the point where it would build engines. Needs its Python part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers import StaticCache

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, sink, sliding_window
from sparse_compile.passes import tensorrt
from support.models import tokens
from support.oracles.cache import error, llama
from support.tensorrt import DRY, real

STREAMING = causal & (sink(4) | sliding_window(8))
LENGTH, STEPS = 24, 3

# torch-tensorrt imports with warnings of its own.
pytestmark = [pytest.mark.usefixtures("fresh", "torch_tensorrt"), pytest.mark.filterwarnings("ignore")]
each_policy = pytest.mark.parametrize("policy", [None, STREAMING], ids=["exact", "sparse"])


@pytest.fixture
def torch_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    real(monkeypatch)


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that torch-tensorrt divided, each with its engines as modules."""
    graphs: list[Any] = []
    count = tensorrt._parts

    def note(parents: list[nn.Module], **options: Any) -> tensorrt.Parts:
        graphs.extend(parents[-1:])
        return count(parents, **options)

    monkeypatch.setattr(tensorrt, "_parts", note)
    return graphs


def logits(inner: str, policy: Mask | None, cache: str, *, dynamic: bool | None = None) -> tuple[list[Tensor], sc.Report]:
    """The logits of a prompt and of some steps, or of two prompts without a cache."""
    torch._dynamo.reset()
    model, ids = llama().requires_grad_(False), tokens(batch=1, length=LENGTH)
    backend = sc.Backend(policy, inner=inner, inductor=DRY if inner == "tensorrt" else None)
    run: Any = torch.compile(model, backend=backend, dynamic=dynamic)
    with torch.no_grad():
        if cache == "no cache":
            texts = [ids, ids[:, : LENGTH - 5]]
            return [run(text, use_cache=False).logits for text in texts], backend.report
        past = StaticCache(model.config, 64) if cache == "static" else sc.SparseCache(model.config, policy, max_length=64)
        texts = [ids, *(ids[:, step : step + 1] for step in range(STEPS))]
        return [run(text, past_key_values=past).logits for text in texts], backend.report


@each_policy
@pytest.mark.parametrize("dynamic", [None, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("cache", ["no cache", "static", "sparse"])
def test_it_is_right_with_every_cache_and_length(cache: str, dynamic: bool | None, policy: Mask | None) -> None:
    got, report = logits("tensorrt", policy, cache, dynamic=dynamic)
    wanted, _ = logits("eager", policy, cache)
    assert [error(mine, theirs) < 1e-5 for mine, theirs in zip(got, wanted, strict=True)] == [True] * len(wanted)
    assert len(report.engines) == report.compiles
    assert all(row.count >= 3 for row in report.engines)


def test_attention_and_what_writes_a_cache_stay_in_torch() -> None:
    _, report = logits("tensorrt", STREAMING, "static")
    ops = dict(report.engines[0].in_torch)
    assert ops["sparse_compile.attention.default"] == 2
    assert ops["aten.index_put.default"] == 4


@each_policy
def test_engines_read_contiguous_tensors_and_return_no_weights(divided: list[Any], policy: Mask | None) -> None:
    logits("tensorrt", policy, "no cache")
    graph = divided[0]
    calls = [node for node in graph.graph.nodes if node.op == "call_module"]
    assert len(calls) == 3
    for call in calls:
        engine = graph.get_submodule(call.target)
        assert isinstance(engine, GraphModule)
        (returned,) = engine.graph.find_nodes(op="output")
        assert all(LENGTH in node.meta["val"].shape for node in returned.all_input_nodes), "tokens, and no weights"
        if policy is not None:
            read = [node.meta["val"] for node in call.all_input_nodes]
            assert all(value.is_contiguous() for value in read if isinstance(value, Tensor))


def test_an_attention_under_a_bias_keeps_its_bias() -> None:
    """``attn_bias_is_causal=True`` would make it causal."""
    policy = causal & sliding_window(3)
    q = torch.randn(1, 2, 16, 16)

    def attend(q: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    with torch.no_grad():
        fast = sc.Backend(policy, inner="tensorrt", kernel="reference", inductor=DRY)
        got, wanted = (torch.compile(attend, backend=b)(q) for b in (fast, sc.Backend(policy, inner="eager")))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", ["max_autotune", "enable_precisions"])
def test_unknown_options_are_those_that_it_does_not_have(name: str) -> None:
    with pytest.raises(ValueError, match=rf"inner='tensorrt' needs options of torch-tensorrt in inductor=, got '{name}'"):
        tensorrt.settings_for({name: True})
    assert tensorrt.settings_for({"min_block_size": 1, "optimization_level": 5})["optimization_level"] == 5
