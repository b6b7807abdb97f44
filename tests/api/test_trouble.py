"""What happens to a policy where attention is left as it is: a warning, or an error with ``strict=True``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops import while_loop
from torch.fx import Graph, GraphModule
from torch.nn import functional as F
from torch.nn.functional import scaled_dot_product_attention as sdpa

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, sliding_window
from sparse_compile.passes.ir.rewrite import Rewrite
from sparse_compile.passes.read.open_regions import open_regions
from sparse_compile.passes.read.read_attention import read_attention
from support.comparison import qkv, relative_error

pytestmark = pytest.mark.usefixtures("fresh")
WINDOW = causal & sliding_window(3)


def loop(q: Tensor, k: Tensor, v: Tensor) -> Any:
    """Attention three times, in the body of a loop."""
    return while_loop(lambda n, q: n < 3, lambda n, q: (n + 1, sdpa(q, k, v)), (torch.zeros((), dtype=torch.int64), q))[1]


def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v, dropout_p=1e-9)


LEFT: dict[str, tuple[Callable[..., Any], str]] = {
    "loop": (loop, "it is inside while_loop: the passes do not rewrite the bodies of such ops"),
    "dropout": (dropped, "dropout_p=1e-09: FlexAttention has no dropout"),
}


@pytest.mark.parametrize("form", LEFT)
def test_a_policy_that_is_dropped_warns(form: str) -> None:
    attention, reason = LEFT[form]
    backend = sc.Backend(WINDOW, inner="eager")
    with pytest.warns(
        sc.SparseCompileWarning, match=f"1 attention calls stay as they are and run without the policy: {reason}"
    ):
        got = torch.compile(attention, backend=backend)(*qkv())
    assert relative_error(got, attention(*qkv())) < 1e-5
    assert [site.reason for site in backend.report.left] == [reason]


@pytest.mark.parametrize("form", LEFT)
def test_a_policy_that_is_dropped_is_an_error_if_strict(form: str) -> None:
    attention, reason = LEFT[form]
    with pytest.raises(Exception, match=f"strict=True, but 1 attention calls stay as they are: .*{reason}"):
        torch.compile(attention, backend=sc.Backend(WINDOW, inner="eager", strict=True))(*qkv())


@pytest.mark.parametrize("policy", [None, sc.Policy(None, layers={3: WINDOW})], ids=["none", "of another layer"])
@pytest.mark.parametrize("form", LEFT)
def test_without_a_policy_for_the_call_there_is_no_warning(form: str, policy: Any) -> None:
    attention, reason = LEFT[form]
    backend = sc.Backend(policy, inner="eager")
    with torch.no_grad():
        torch.compile(attention, backend=backend)(*qkv())
    assert [site.reason for site in backend.report.left] == [reason]


@torch.compiler.nested_compile_region
def region(layer: nn.Module, x: Tensor) -> Any:
    """A region that gets its layer as an argument, so that Dynamo names the modules of its first call only."""
    return layer(x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.policy = nn.Linear(32, 96), causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        mask = self.policy.dense(x.shape[1], x.shape[1])
        return x + sdpa(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class Model(nn.Module):
    def __init__(self, run: Any, policies: tuple[Mask, ...] = (causal,) * 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.run = nn.ModuleList(Layer() for _ in policies), run
        for layer, policy in zip(self.layers, policies, strict=True):
            layer.policy = policy  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = F.layer_norm(self.run(layer, x), (32,))
        return x


def test_a_region_over_many_layers_gets_one_policy_for_all() -> None:
    x, oracle = torch.randn(2, 12, 32), Model(lambda layer, x: layer(x), (WINDOW,) * 4)
    backend = sc.Backend(WINDOW, inner="aot_eager", strict=True)
    with torch.no_grad():
        assert relative_error(torch.compile(Model(region), backend=backend)(x), oracle(x)) < 1e-5
    assert len(backend.report.rewritten) == 4


def test_a_region_over_many_layers_does_not_get_the_policy_of_another_layer() -> None:
    """Dynamo does not say which layer a later call of the region runs, so a policy by layer cannot be right: it warns."""
    x, backend = torch.randn(2, 12, 32), sc.Backend(sc.Policy(None, layers={1: WINDOW, 2: WINDOW}), inner="aot_eager")
    with torch.no_grad(), pytest.warns(sc.SparseCompileWarning, match="Dynamo recorded no module for some attention calls"):
        torch.compile(Model(region), backend=backend)(x)
    assert all(site.layer in (1, 2) for site in backend.report.sites if site.policy_mask)


def test_a_body_that_writes_a_sparse_cache_stays_as_it_is() -> None:
    """Dynamo writes such a cache outside of bodies today, so this graph is written by hand."""

    def cache_update(k: Tensor) -> Tensor:
        return k

    def invoke_subgraph(body: Any, name: str, q: Tensor, k: Tensor) -> Any:
        return body(q, k)

    body, outer = Graph(), Graph()
    q, k = (body.placeholder(name) for name in "qk")
    for node in (q, k):
        node.meta["example_value"] = torch.zeros(1, 2, 3, 4)
    keys = body.call_function(cache_update, (k,))
    keys.meta["example_value"] = torch.zeros(1, 2, 3, 4)
    body.output((body.call_function(sdpa, (q, keys, keys)),))
    operands = [outer.placeholder(name) for name in "qk"]
    op = outer.call_function(invoke_subgraph, (outer.get_attr("body"), "body", *operands))
    outer.output(op)
    rewrite = Rewrite(GraphModule({"body": GraphModule({}, body)}, outer), lambda call, by_path: None)
    assert open_regions(rewrite) == 0
    read_attention(rewrite)
    (call,) = rewrite.left
    assert call.reason.startswith("it is inside invoke_subgraph: a SparseCache that is written there cannot be read")
