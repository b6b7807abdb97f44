"""Attention in the bodies of higher-order ops: gradient checkpointing, regions that are compiled once, and branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, explicit, full, page_topk, per_head, sink, sliding_window
from support.comparison import relative_error

N, LAYERS = 20, 3
STREAMING = causal & (sink(2) | sliding_window(5))
WINDOW = causal & sliding_window(3)
PER_HEAD = per_head([causal, STREAMING, WINDOW, causal])
TENSOR = causal & explicit(torch.rand(1, 1, N, N, generator=torch.Generator().manual_seed(1)) > 0.3)
KINDS = ("reentrant", "non-reentrant", "region", "cond", "checkpoint in a region", "cond in a region")

pytestmark = pytest.mark.usefixtures("fresh")


class Layer(nn.Module):
    """Grouped-query attention with a residual, under the model's mask and a dense policy, or without a policy."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(32, 64)
        self.bias = nn.Parameter(torch.randn(4, N, N)) if bias else None
        self.policy: Mask = full

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([32, 16, 16], dim=-1)
        q, k, v = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in (q, k, v))
        if self.policy is not full:
            mask = mask & self.policy.dense(x.shape[1], x.shape[1], heads=4)
        seen: Any = mask if self.bias is None else torch.where(mask, self.bias, -torch.inf)
        return x + F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.attend(x, mask)


class Region(Layer):
    """The same layer, which torch compiles once for all equal layers."""

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.attend(x, mask)


class CheckpointedRegion(Layer):
    """A region with a checkpoint inside."""

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return checkpoint(self.attend, x, mask, use_reentrant=False)


def branches(run: Any, x: Tensor, mask: Tensor) -> Any:
    """A layer on ``x``, or on ``-x`` if the first value of ``x`` is not positive."""
    return torch.cond(x[0, 0, 0] > 0, lambda x, m: run(x, m), lambda x, m: run(-x, m), (x, mask))


class BranchingRegion(Layer):
    """A region with branches inside."""

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor, mask: Tensor) -> Any:
        return branches(self.attend, x, mask)


RUN: dict[str, Callable[[Layer, Tensor, Tensor], Any]] = {
    "plain": lambda layer, x, mask: layer.attend(x, mask),
    "plain branches": lambda layer, x, mask: layer.attend(x if x[0, 0, 0] > 0 else -x, mask),
    "reentrant": lambda layer, x, mask: checkpoint(layer, x, mask, use_reentrant=True),
    "non-reentrant": lambda layer, x, mask: checkpoint(layer, x, mask, use_reentrant=False),
    "region": lambda layer, x, mask: layer(x, mask),
    "checkpoint in a region": lambda layer, x, mask: layer(x, mask),
    "cond": branches,
    "cond in a region": lambda layer, x, mask: layer(x, mask),
}
LAYER = {"region": Region, "checkpoint in a region": CheckpointedRegion, "cond in a region": BranchingRegion}


class Decoder(nn.Module):
    """Layers under one causal mask with padding, which is computed outside of them."""

    def __init__(self, kind: str, **layer: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.layers = nn.ModuleList(LAYER.get(kind, Layer)(**layer) for _ in range(LAYERS))
        with torch.no_grad():
            for weight in self.parameters():
                weight.mul_(3)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        length = x.shape[1]
        at = torch.arange(length)
        mask = (at[:, None] >= at)[None, None] & valid[:, None, None, :]
        for layer in self.layers:
            x = RUN[self.kind](layer, x, mask)  # type: ignore[arg-type]
        return x


def inputs(length: int = N) -> tuple[Tensor, Tensor]:
    """Hidden states that need a gradient, and which positions are text: the first row has three tokens of padding."""
    x = torch.randn(2, length, 32, generator=torch.Generator().manual_seed(3))
    valid = torch.ones(2, length, dtype=torch.bool)
    valid[0, -3:] = False
    return x.requires_grad_(), valid


def results(model: nn.Module, run: Any, x: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of all weights."""
    model.zero_grad()
    x.grad = None
    out = run(x, valid)
    out.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"out": out.detach(), "x": x.grad.clone(), **found}


def oracle(kind: str, policies: dict[int, Mask], x: Tensor, valid: Tensor, **layer: Any) -> dict[str, Tensor]:
    """The un-compiled model without higher-order ops, with the policy of each layer as one more dense mask."""
    model = Decoder("plain branches" if "cond" in kind else "plain", **layer)
    for number, policy in policies.items():
        model.layers[number].policy = policy  # type: ignore[assignment]
    return results(model.to(x.dtype), model, x, valid)


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    assert {name: error for name in wanted if (error := relative_error(got[name], wanted[name])) > 1e-5} == {}


def everywhere(mask: Mask) -> dict[int, Mask]:
    return dict.fromkeys(range(LAYERS), mask)


def calls_of(kind: str) -> int:
    return LAYERS * (2 if "cond" in kind else 1)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("policy", [None, STREAMING, PER_HEAD, TENSOR], ids=["exact", "sparse", "per head", "tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_results_and_gradients_are_those_of_dense_attention(kind: str, policy: Mask | None, inner: str) -> None:
    model, backend = Decoder(kind), sc.Backend(policy, inner=inner, strict=True)
    got = results(model, torch.compile(model, backend=backend), *inputs())
    assert_same(got, oracle(kind, everywhere(full if policy is None else policy), *inputs()))
    assert len(backend.report.rewritten) == calls_of(kind)
    assert {site.layer for site in backend.report.sites} == set(range(LAYERS))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_inductor_trains_under_a_policy(kind: str) -> None:
    model, backend = Decoder(kind), sc.Backend(STREAMING, strict=True)
    got = results(model, torch.compile(model, backend=backend), *inputs())
    assert_same(got, oracle(kind, everywhere(STREAMING), *inputs()))


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", KINDS)
def test_generated_kernels_run_in_bodies(kind: str, inner: str) -> None:
    """Without gradients, FlexAttention runs in the bodies. Its tables are operands of the ops."""
    model, backend = Decoder(kind), sc.Backend(TENSOR, inner=inner, strict=True)
    with torch.no_grad():
        got = torch.compile(model, backend=backend)(*inputs())
    assert relative_error(got, oracle(kind, everywhere(TENSOR), *inputs())["out"]) < 1e-5
    assert {site.kernel for site in backend.report.sites} == {"FlexAttention"}


@pytest.mark.parametrize("kind", ["region", "cond", "reentrant"])
def test_a_prefill_selects_pages_in_a_body(kind: str) -> None:
    """The oracle is the compiled model without bodies, because only the passes select keys for blocks of queries."""
    outputs = []
    for form in (kind, "plain"):
        torch._dynamo.reset()
        backend, (x, valid) = sc.Backend(causal & page_topk(128, page=64), inner="aot_eager"), inputs(384)
        with torch.no_grad():
            outputs.append(torch.compile(Decoder(form), backend=backend)(x.abs(), valid))
        assert backend.report.left == []
    assert relative_error(*outputs) < 1e-5


@pytest.mark.parametrize("kind", ["region", "cond", "reentrant"])
def test_a_trained_bias_in_a_body_gets_its_gradient(kind: str) -> None:
    """In float64, because torch differentiates branches by other formulas, whose rounding differs by 2e-5 in float32."""
    model, backend = Decoder(kind, bias=True).double(), sc.Backend(STREAMING, inner="aot_eager", strict=True)
    x, valid = inputs()
    x = x.detach().double().requires_grad_()
    got = results(model, torch.compile(model, backend=backend), x, valid)
    assert "layers.2.bias" in got
    assert_same(got, oracle(kind, everywhere(STREAMING), x, valid, bias=True))


@pytest.mark.slow
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", KINDS)
def test_bodies_follow_dynamic_lengths(kind: str, inner: str) -> None:
    model, backend = Decoder(kind), sc.Backend(STREAMING, inner=inner, strict=True)
    run = torch.compile(model, backend=backend, dynamic=True)
    for length in (N, 33):
        with torch.no_grad():
            got = run(*inputs(length))
        assert relative_error(got, oracle(kind, everywhere(STREAMING), *inputs(length))["out"]) < 1e-5
    assert backend.report.compiles == 1


# -- policies by layer ------------------------------------------------------------------------------------------------------

BY_LAYER = {0: STREAMING, 1: WINDOW, 2: STREAMING}


@pytest.mark.parametrize("named", ["number", "path"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_by_layer_reaches_its_layer(kind: str, named: str) -> None:
    layers: Any = {number if named == "number" else f"layers.{number}": mask for number, mask in BY_LAYER.items()}
    model, backend = Decoder(kind), sc.Backend(sc.Policy(None, layers=layers), inner="aot_eager", strict=True)
    got = results(model, torch.compile(model, backend=backend), *inputs())
    assert_same(got, oracle(kind, BY_LAYER, *inputs()))
    assert {(site.module, site.policy_mask) for site in backend.report.sites} == {
        (f"layers.{number}", str(mask)) for number, mask in BY_LAYER.items()
    }


class Graphs:
    """A backend that keeps the graphs that the passes wrote."""

    def __init__(self, policy: Any) -> None:
        self.backend, self.kept, self.traced = sc.Backend(policy, inner="aot_eager"), [], 0  # type: ignore[var-annotated]

    def __call__(self, gm: Any, examples: Any) -> Any:
        self.kept.append(gm)
        self.traced += len(set(self.bodies))
        return self.backend(gm, examples)

    @property
    def bodies(self) -> list[tuple[str, str]]:
        """The body and the name of every call of a region."""
        nodes = [node for gm in self.kept for node in gm.graph.nodes if "invoke_subgraph" in str(node.target)]
        return [(str(node.args[0].target), str(node.args[1])) for node in nodes]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["region", "checkpoint in a region", "cond in a region"])
def test_equal_layers_share_a_body_and_different_layers_do_not(kind: str) -> None:
    shares = []
    for policy in (None, STREAMING, sc.Policy(STREAMING, layers={2: WINDOW})):
        torch._dynamo.reset()
        graphs = Graphs(policy)
        with torch.no_grad():
            torch.compile(Decoder(kind), backend=graphs)(*inputs())
        shares.append([len(set(part)) - graphs.traced for part in zip(*graphs.bodies, strict=True)])
    assert shares == [[0, 0], [0, 0], [1, 1]]  # more bodies, and names of bodies, than Dynamo traced
