"""A policy that reaches no attention call, or misses attention modules, does not go unnoticed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

import sparse_compile as sc
from sparse_compile.attention_modules import attention_modules
from sparse_compile.masks import causal, sink, sliding_window
from support.models import DECODERS, tokens

STREAMING = causal & (sink(1) | sliding_window(3))
NOTHING = "the policy reaches no attention call"

pytestmark = pytest.mark.usefixtures("fresh")


class TinyAttention(nn.Module):
    """Attention that runs one of several ways."""

    def __init__(self, way: str = "sdpa") -> None:
        super().__init__()
        self.way, self.qkv = way, nn.Linear(32, 96)

    def forward(self, x: Tensor) -> Any:
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return WAYS[self.way](q, k, v)


WAYS: dict[str, Any] = {
    "sdpa": F.scaled_dot_product_attention,
    "disabled": torch.compiler.disable(F.scaled_dot_product_attention),
    "flex": flex_attention,
    "weights returned": lambda q, k, v: ((w := (q @ k.mT).softmax(-1)) @ v) + w.sum(),
    "none": lambda q, k, v: q + k + v,
}


LEFT = "1 attention calls stay as they are and run without the policy"


@pytest.mark.parametrize(
    ("way", "why"), [("disabled", f"{NOTHING}: .*hold none"), ("none", f"{NOTHING}: .*hold none"), ("weights returned", LEFT)]
)
def test_compile_warns_of_a_policy_that_reaches_nothing(way: str, why: str) -> None:
    model = sc.compile(TinyAttention(way).eval(), STREAMING, inner="eager")
    with pytest.warns(sc.SparseCompileWarning, match=why):
        model(torch.randn(2, 12, 32))
    assert len(model.sparse_compile_report.notes) == 1  # one warning for one fault
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(2, 12, 32))  # once is enough


def test_strict_makes_it_an_error() -> None:
    model = sc.compile(TinyAttention("disabled").eval(), STREAMING, inner="eager", strict=True)
    with pytest.raises(sc.SparseCompileError, match=NOTHING):
        model(torch.randn(2, 12, 32))


def test_a_backend_warns_when_a_graph_runs_again() -> None:
    model = torch.compile(TinyAttention("disabled").eval(), backend=sc.Backend(STREAMING, inner="eager"))
    model(torch.randn(2, 12, 32))
    with pytest.warns(sc.SparseCompileWarning, match=NOTHING):
        model(torch.randn(2, 12, 32))


@pytest.mark.parametrize(("way", "policy"), [("disabled", None), ("sdpa", STREAMING)])
def test_no_warning_without_a_policy_or_where_it_acts(way: str, policy: Any) -> None:
    model = sc.compile(TinyAttention(way).eval(), policy, inner="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for length in (12, 12, 9):
            model(torch.randn(2, length, 32))


def test_modules_without_a_row_are_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read, self.unread = TinyAttention(), TinyAttention("none")

        def forward(self, x: Tensor) -> Any:
            return self.read(x) + self.unread(x)

    fast = sc.compile(Model().eval(), STREAMING, inner="eager")
    with pytest.warns(sc.SparseCompileWarning, match="1 attention modules have no row in the report.*: unread"):
        fast(torch.randn(2, 12, 32))


def test_layers_that_share_a_graph_behind_a_break_are_not_missing() -> None:
    """Dynamo then records no path, and compiles the code of both layers once."""

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([TinyAttention(), TinyAttention()])

        def forward(self, x: Tensor) -> Any:
            for layer in self.layers:
                torch._dynamo.graph_break()
                x = x + layer(x).transpose(1, 2).flatten(2)
            return x

    fast = sc.compile(Layers().eval(), STREAMING, inner="eager")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", sc.SparseCompileWarning)
        fast(torch.randn(2, 12, 32))
    assert {site.action for site in fast.sparse_compile_report.sites} == {"sparse"}


def test_attention_modules_are_the_innermost_of_their_name() -> None:
    model = next(d for d in DECODERS if d.name == "llama").build()
    assert attention_modules(model) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert attention_modules(nn.TransformerEncoderLayer(8, 2)) == ["self_attn"]
    assert attention_modules(nn.Linear(2, 2)) == []


def test_a_model_with_all_rows_does_not_warn() -> None:
    model = next(d for d in DECODERS if d.name == "llama").build()
    sc.compile(model, STREAMING, inner="eager")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", sc.SparseCompileWarning)
        model(tokens())


class Inner(nn.Module):
    """Two attention layers, as a model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TinyAttention("sdpa") for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x).transpose(1, 2).flatten(2)
        return x


class WithGetattr(nn.Module):
    """A wrapper that hands everything on to the model inside, as those of PEFT and diffusers do."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Inner()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base, name)

    def forward(self, x: Tensor) -> Any:
        return self.base(x)


def test_paths_behind_a_wrapper_are_those_of_named_modules() -> None:
    model = sc.compile(WithGetattr().eval(), sc.Policy(None, layers={"base.layers.1": STREAMING}), inner="eager")
    model(torch.randn(2, 12, 32))
    sites = {site.module: site.action for site in model.sparse_compile_report.sites}
    assert sites == {"base.layers.0": "exact", "base.layers.1": "sparse"}
    assert set(sites) <= {path for path, _ in model.named_modules()}


def test_a_pattern_that_matches_nothing_warns() -> None:
    policy = sc.Policy(None, layers={"base.layers.*": STREAMING}, decode=sc.Policy(None, layers={"base.layer.*": STREAMING}))
    model = sc.compile(WithGetattr().eval(), policy, inner="eager")
    with pytest.warns(sc.SparseCompileWarning, match=r"names 'base.layer.\*', which matches no module .* 'base.layers.0'"):
        model(torch.randn(2, 12, 32))
    with pytest.raises(sc.SparseCompileError, match="matches no module"):
        sc.compile(WithGetattr().eval(), policy, inner="eager", strict=True)(torch.randn(2, 12, 32))
