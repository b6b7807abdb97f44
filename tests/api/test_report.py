"""The report: every attention call of every graph, as a table, as JSON, and as values."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_compile as sc
from sparse_compile.masks import causal, per_head, sink, sliding_window
from support.models import DECODERS, Decoder, tokens

STREAMING = causal & (sink(2) | sliding_window(6))

pytestmark = pytest.mark.usefixtures("fresh")


def run(backend: sc.Backend, decoder: Decoder = DECODERS[0], length: int = 24) -> None:
    model: Any = torch.compile(decoder.build(), backend=backend)
    with torch.no_grad():
        model(tokens(length=length), use_cache=False)


def test_the_table_is_short_and_says_what_happened() -> None:
    backend = sc.Backend(STREAMING, inner="eager")
    run(backend)
    assert str(backend.report).splitlines() == [
        "sparse_compile: 2 of 2 attention calls rewritten; 1 graph compiled",
        "  graph  module                        calls  phase    q x kv   model mask  policy"
        "                                  density  kernel",
        "  1      model.layers.[0-1].self_attn  2      prefill  24 x 24  causal      causal & (sink(2) | sliding_window(6))"
        "  28.5 %   dense reference",
        "  graph 1, 2 calls: inner='eager' has no FlexAttention kernels",
    ]


def test_density_is_that_of_the_mask() -> None:
    policy = per_head([causal, STREAMING])
    backend = sc.Backend(policy, inner="eager")
    run(backend)
    assert [site.density for site in backend.report.sites] == [policy.density(24, 24, heads=4)] * 2


def test_decode_density_counts_from_where_the_query_stands() -> None:
    backend = sc.Backend(STREAMING, inner="eager")
    model: Any = torch.compile(DECODERS[0].build(), backend=backend)
    with torch.no_grad():
        cache = model(tokens()).past_key_values
        model(tokens(length=1), past_key_values=cache)
    assert backend.report.sites[-1].density == 8 / 25


def test_layers_of_one_kind_share_a_line_and_others_do_not() -> None:
    gemma = next(d for d in DECODERS if d.name == "gemma3_text")
    backend = sc.Backend(inner="eager")
    run(backend, gemma)
    assert [site.model_mask for site in backend.report.sites] == ["causal & sliding_window(8)", "causal"]
    lines = str(backend.report).splitlines()
    assert sum("model.layers.0.self_attn" in line for line in lines) == 1
    assert sum("model.layers.1.self_attn" in line for line in lines) == 1


def test_json_holds_every_row() -> None:
    backend = sc.Backend(STREAMING, inner="eager")
    run(backend)
    content = json.loads(backend.report.to_json())
    assert content["compiles"] == 1
    assert content["recompiles"] == 0
    assert len(content["sites"]) == 2
    row = content["sites"][1]
    assert (row["module"], row["layer"], row["phase"]) == ("model.layers.1.self_attn", 1, "prefill")
    assert (row["q_len"], row["kv_len"], row["heads"], row["kv_heads"]) == ("24", "24", 4, 2)
    assert row["density"] == STREAMING.density(24, 24)
    assert (row["model_mask"], row["policy_mask"], row["action"]) == ("causal", str(STREAMING), "sparse")


def test_compiles_and_recompiles_are_counted() -> None:
    backend = sc.Backend(inner="eager")
    model: Any = torch.compile(DECODERS[0].build(), backend=backend)
    with torch.no_grad():
        for length in (24, 30, 36):
            model(tokens(length=length), use_cache=False)
    assert (backend.report.compiles, backend.report.recompiles) == (2, 1)
    assert backend.report.sites[-1].q_len != "36", "the second graph is dynamic, and its length a symbol"


def test_graphs_are_counted_by_what_they_are_for() -> None:
    """A decode step compiles the code of the prefill again, and a report must not read as if that were a fault."""
    backend = sc.Backend(inner="eager")
    model: Any = torch.compile(DECODERS[0].build(), backend=backend)
    with torch.no_grad():
        cache = model(tokens(), use_cache=True).past_key_values
        model(tokens(length=1), past_key_values=cache)
    assert str(backend.report).splitlines()[0].endswith("; 2 graphs compiled: 1 prefill, 1 decode")
    assert (backend.report.compiles, backend.report.recompiles) == (2, 1)


class TwoCalls(nn.Module):
    """One call that is rewritten, and one that cannot be rewritten."""

    def forward(self, x: Tensor) -> Tensor:
        plain = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        return F.scaled_dot_product_attention(plain, x, x, dropout_p=0.5)


def test_a_call_that_is_left_is_in_the_report_with_its_reason() -> None:
    backend = sc.Backend(inner="eager")
    torch.compile(TwoCalls(), backend=backend)(torch.randn(1, 2, 8, 4))
    assert [site.action for site in backend.report.sites] == ["exact", "left"]
    left = backend.report.sites[1]
    assert left.reason == "dropout_p=0.5: FlexAttention has no dropout"
    assert left.density is None
    assert "left as it is" in str(backend.report)
    assert left.reason in str(backend.report)


class Broken(nn.Module):
    """Three attention calls in two graphs."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        torch._dynamo.graph_break()
        x = F.scaled_dot_product_attention(x, x, x)
        return F.scaled_dot_product_attention(x, x, x[..., :2], dropout_p=0.5)


def test_every_call_of_every_graph_is_a_row() -> None:
    """The expected numbers come from a backend that only counts calls."""
    seen: list[int] = []

    def count(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(sum("scaled_dot_product" in str(node.target) for node in gm.graph.nodes))
        return gm.forward

    model, x = Broken(), torch.randn(1, 2, 8, 4)
    torch.compile(model, backend=count)(x)
    torch._dynamo.reset()
    backend = sc.Backend(inner="eager")
    torch.compile(model, backend=backend)(x)
    rows = [sum(site.graph == graph for site in backend.report.sites) for graph in (1, 2)]
    assert rows == seen == [1, 2]
    assert (backend.report.compiles, backend.report.recompiles) == (2, 0)
    assert "2 graphs compiled: 1 prefill, 1 other" in str(backend.report)


def test_a_graph_without_attention_is_counted_as_such() -> None:
    backend = sc.Backend(inner="eager")
    torch.compile(lambda x: x + 1, backend=backend)(torch.randn(1, 2, 8, 4))
    torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True), backend=backend)(torch.randn(1, 2, 8, 4))
    assert "2 graphs compiled: 1 prefill, 1 without attention" in str(backend.report)


def test_a_graph_that_is_traced_again_for_the_same_code_is_counted_once() -> None:
    """Dynamo discards a first trace to make a float a constant, and the report drops the rows of that trace."""

    def attend(x: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, scale=scale)

    backend = sc.Backend(inner="eager")
    fast = torch.compile(attend, backend=backend)
    x = torch.randn(1, 2, 8, 4)
    for scale in (0.3, 0.4):
        torch.testing.assert_close(fast(x, scale), attend(x, scale))
    assert len(backend.report.sites) == backend.report.compiles == 2


def test_what_is_compiled_outside_any_module_is_at_the_top() -> None:
    backend = sc.Backend(inner="eager")
    torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x), backend=backend)(torch.randn(1, 2, 8, 4))
    (site,) = backend.report.sites
    assert (site.module, site.layer, site.phase, site.model_mask) == ("", None, "other", "full")
    assert "(top)" in str(backend.report)


@pytest.mark.parametrize("holder", ["method", "argument", "closure"])
def test_a_module_path_begins_at_the_model_whatever_holds_it(holder: str) -> None:
    model, backend = DECODERS[0].build(), sc.Backend(inner="eager")

    def by_argument(anything: Any, ids: Tensor) -> Tensor:
        logits: Tensor = anything(ids, use_cache=False).logits
        return logits

    with torch.no_grad():
        if holder == "method":
            compiled: Any = torch.compile(model, backend=backend)
            compiled(tokens(), use_cache=False)
        elif holder == "argument":
            torch.compile(by_argument, backend=backend)(model, tokens())
        else:
            torch.compile(lambda ids: by_argument(model, ids), backend=backend)(tokens())
    assert [site.module for site in backend.report.sites] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert [site.layer for site in backend.report.sites] == [0, 1]


def test_many_layers_share_a_line_by_their_ranges() -> None:
    """Layers 0, 1 and 3 have one mask, and layer 2 has another."""
    decoder = Decoder("llama", {**DECODERS[0].config, "num_hidden_layers": 4})
    backend = sc.Backend(sc.Policy(causal & sliding_window(5), layers={2: STREAMING}), inner="eager")
    run(backend, decoder)
    lines = str(backend.report).splitlines()[2:4]
    assert [line.split()[1:3] for line in lines] == [["model.layers.[0-1,3].self_attn", "3"], ["model.layers.2.self_attn", "1"]]


def test_layers_whose_heads_have_the_same_masks_in_another_order_share_a_line() -> None:
    """Policies of retrieval heads have another list of masks in every layer, and reports of them had a line for each."""
    decoder = Decoder("llama", {**DECODERS[0].config, "num_hidden_layers": 4})
    layers: Any = {0: per_head([causal, STREAMING]), 1: per_head([STREAMING, causal]), 2: per_head([STREAMING] * 2)}
    backend = sc.Backend(sc.Policy(per_head([causal, causal, causal, STREAMING]), layers=layers), inner="eager")
    run(backend, decoder)
    rows = str(backend.report).splitlines()[2:5]
    for row, path, told in zip(
        rows,
        ("[0-1]", "2", "3"),
        (
            f"1 of 2 KV heads causal; 1 of 2 {STREAMING}  ",
            f"2 of 2 KV heads {STREAMING}  ",
            f"3 of 4 query heads causal; 1 of 4 {STREAMING}  ",
        ),
        strict=True,
    ):
        assert f"model.layers.{path}.self_attn " in row and told in row
    assert [row["policy_mask"] for row in json.loads(backend.report.to_json())["sites"]][:2] == list(map(str, layers.values()))[
        :2
    ]


def test_an_empty_report_says_so() -> None:
    assert str(sc.Report()) == "sparse_compile: 0 of 0 attention calls rewritten; 0 graphs compiled"


def test_a_graph_that_cannot_be_cached_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter(range(10))
    monkeypatch.setattr("sparse_compile.passes.inner_compiler.cache_bypasses", lambda: next(counts))
    monkeypatch.setattr("sparse_compile.passes.inner_compiler._compile", lambda gm, *_: gm.forward)
    backend = sc.Backend(causal)
    run(backend)
    assert "a graph could not be cached by Inductor: a second process compiles it again" in str(backend.report)
