"""Graphs that cannot be cut, or that gain nothing from it, are compiled as a whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import sparse_compile as sc
from sparse_compile.passes.inner_compiler import needs_whole, records_cuda_graphs
from support.models import DECODERS, Decoder, tokens
from support.pieces import recorded

pytestmark = pytest.mark.usefixtures("fresh")


def deep(layers: int) -> Decoder:
    return replace(DECODERS[0], config=DECODERS[0].config | {"num_hidden_layers": layers})


def reasons(model: Any, *, grad: bool = False) -> list[str]:
    with recorded() as recorder, torch.set_grad_enabled(grad):
        compiled = sc.compile(model, kernel="reference")
        compiled(tokens(), use_cache=False)
    assert len(recorder.compiled) == 1 or not recorder.whole
    return recorder.whole


def test_two_layers_stay_whole() -> None:
    assert reasons(deep(2).build()) == ["it has too few layers"]


def test_a_graph_with_gradients_stays_whole() -> None:
    assert reasons(deep(4).build(), grad=True) == ["it has gradients"]


def test_layers_of_different_sizes_stay_whole() -> None:
    model = deep(4).build()
    for number, layer in enumerate(model.model.layers):
        size = 32 + 8 * number
        layer.mlp.gate_proj, layer.mlp.up_proj = torch.nn.Linear(64, size), torch.nn.Linear(64, size)
        layer.mlp.down_proj = torch.nn.Linear(size, 64)
    assert reasons(model.requires_grad_(False)) == ["too few of its layers are equal"]


def test_an_op_that_calls_functions_keeps_a_graph_whole() -> None:
    model = deep(4).build()
    inner = model.model.norm.forward

    def norm(x: torch.Tensor) -> Any:
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (inner(x),))

    model.model.norm.forward = norm
    (reason,) = reasons(model)
    assert reason.endswith(("is a higher-order op", "is no tensor"))


def test_freezing_needs_the_whole_graph() -> None:
    assert needs_whole(None, {"freezing": True}) == "freezing needs the parameters of the model"
    assert needs_whole("default", None) == needs_whole("reduce-overhead", None) == ""


def test_cuda_graphs_are_recorded_on_devices_other_than_the_cpu() -> None:
    cpu, other = [torch.zeros(1)], [torch.zeros(1, device="meta")]
    assert records_cuda_graphs(other, "reduce-overhead", None)
    assert records_cuda_graphs(other, None, {"triton.cudagraphs": True})
    assert not records_cuda_graphs(other, "reduce-overhead", {"triton.cudagraphs": False})
    assert not records_cuda_graphs(other, "default", None) and not records_cuda_graphs(cpu, "reduce-overhead", None)
