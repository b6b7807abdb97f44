"""Pieces are equal only if one compiled function can run both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, symbolic_trace

from sparse_compile.masks import causal, padding, sliding_window
from sparse_compile.masks.captured import Captured
from sparse_compile.passes.ops.reference_attention import DenseMask
from sparse_compile.passes.pieces.equality import piece_key

X, Y = torch.zeros(4, 6), torch.ones(4, 6)


def key(function: Callable[..., Any], *inputs: Any) -> Any:
    return piece_key(symbolic_trace(function), inputs)


def of_module(module: nn.Module) -> Any:
    graph = Graph()
    graph.output((graph.call_module("module_0", (graph.placeholder("x"),)),))
    return piece_key(GraphModule({"module_0": module}, graph), (X,))


def scaled(x: Tensor) -> Tensor:
    return torch.mul(x, 0.0)


def test_the_same_computation_of_other_tensors_is_equal() -> None:
    assert key(scaled, X) == key(lambda y: torch.mul(y, 0.0), Y)


OTHER: dict[str, Callable[..., Any]] = {
    "another op": lambda x: torch.add(x, 0.0),
    "another constant": lambda x: torch.mul(x, 1.0),
    "the other zero": lambda x: torch.mul(x, -0.0),
    "an integer": lambda x: torch.mul(x, 0),
    "a boolean": lambda x: torch.mul(x, False),
    "a method": lambda x: x.mul(0.0),
    "a keyword": lambda x: torch.mul(x, other=0.0),
    "one more output": lambda x: (torch.mul(x, 0.0), x),
    "one more op": lambda x: torch.mul(x, 0.0).neg(),
}


@pytest.mark.parametrize("other", OTHER.values(), ids=OTHER)
def test_another_computation_differs(other: Callable[..., Any]) -> None:
    assert key(other, X) != key(scaled, X)


INPUTS: dict[str, Tensor] = {
    "another shape": torch.zeros(4, 7),
    "other strides": torch.zeros(6, 4).t(),
    "an offset": torch.zeros(30)[6:].view(4, 6),
    "another dtype": torch.zeros(4, 6, dtype=torch.float64),
    "another device": torch.zeros(4, 6, device="meta"),
    "a gradient": torch.zeros(4, 6, requires_grad=True),
    "a parameter": nn.Parameter(torch.zeros(4, 6), requires_grad=False),
}


@pytest.mark.parametrize("other", INPUTS.values(), ids=INPUTS)
def test_another_kind_of_input_differs(other: Tensor) -> None:
    assert key(scaled, other) != key(scaled, X)


def test_inputs_that_share_memory_differ_from_those_that_do_not() -> None:
    def two(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    assert key(two, X, Y) == key(two, Y, X) != key(two, X, X.view(4, 6))


def test_an_op_is_equal_to_itself_only() -> None:
    def called(function: Callable[..., Any]) -> Any:
        graph = Graph()
        graph.output((graph.call_function(function, (graph.placeholder("x"),)),))
        return piece_key(GraphModule({}, graph), (X,))

    def double(x: Tensor) -> Tensor:
        return x + x

    def twice(x: Tensor) -> Tensor:
        return x + x

    assert called(double) == called(double) != called(twice)


MODULES: Sequence[nn.Module] = (
    DenseMask(causal, 1),
    DenseMask(causal, 2),
    DenseMask(causal & sliding_window(4), 1),
    DenseMask(causal & sliding_window(5), 1),
    DenseMask(causal & padding(Captured.symbol("a")), 1),
)


def test_modules_with_other_contents_differ() -> None:
    assert len({of_module(module) for module in MODULES}) == len(MODULES)


def test_the_names_of_tensors_do_not_matter_but_their_places_do() -> None:
    def named(*names: str) -> Any:
        return of_module(DenseMask(padding(Captured.symbol(names[0])) | ~padding(Captured.symbol(names[1])) & causal, 1))

    assert named("a", "b") == named("c", "d")
    assert named("a", "a") != named("a", "b")
