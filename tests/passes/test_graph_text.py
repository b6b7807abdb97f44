"""Values that ride in graphs come back from their text, and ops take their operands as one structure."""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph

from sparse_compile.masks import (
    Captured,
    alibi,
    bias,
    causal,
    clamped,
    document,
    page_topk,
    scaled,
    sink_logits,
    sliding_window,
    softcap,
)
from sparse_compile.passes.ops.attention_stats import Look, Watch
from sparse_compile.passes.ops.flex_attention import Spec
from sparse_compile.passes.ops.structured import StructuredOp
from sparse_compile.passes.storage.codec import Format, QuantizedTensor
from sparse_compile.passes.storage.graph_text import from_text, to_text
from sparse_compile.passes.storage.layer_plan import LayerPlan, PageSelection, PageStorage, RingStorage
from support.masks.random_masks import masks

T = TypeVar("T")
PLAN = LayerPlan(
    layer=1,
    last=True,
    columns=128,
    rings=((4, 64),),
    storages=(
        PageStorage((0, 2), 128, PageSelection(page_topk(64), 16, 0, (0, 1), 4), (Format("int8", 32, 1), Format()), 32),
        RingStorage((1,), 64, 4, 60),
    ),
    model=causal,
    prefill=None,
    decode=causal & sliding_window(60) & document(torch.tensor([[0, 0, 1]])),
)
VALUES = [
    None,
    (1, (2.5, "three"), True, None),
    0.1 + 0.2,
    Format("int4", 32, 1),
    causal & sliding_window(3),
    softcap(30.0) >> alibi([0.5, 0.25]) >> sink_logits(torch.tensor([0.1, 0.7])),
    bias(Captured.symbol("b"), Captured.symbol("q_start"), 0),
    scaled(Captured.symbol("f"), Captured.symbol("q_start"), 0) >> clamped(-torch.inf, 5.0),
    Spec(causal, 4, 0.125, softcap(2.0), (128, 64), (("BACKEND", "TRITON"), ("SPLIT_KV", 4)), 4, (3, 0)),
    Watch(Look(period=7), causal, None, 0.5),
    PLAN,
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_comes_back_from_its_text(value: Any) -> None:
    assert from_text(to_text(value)) == value
    assert to_text(from_text(to_text(value))) == to_text(value)


@given(masks)
def test_every_mask_comes_back_from_its_text(mask: Any) -> None:
    assert from_text(to_text(mask)) == mask


@given(st.floats(allow_nan=False))
def test_numbers_lose_no_digit(number: float) -> None:
    assert from_text(to_text(number)) == number


@pytest.mark.parametrize("value", [object(), [1], {"a": 1}, torch.zeros(2)], ids=["object", "list", "dict", "tensor"])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="graph"):
        to_text(value)


class Inner(NamedTuple, Generic[T]):
    tensor: T
    number: int
    other: T | None


class Outer(NamedTuple, Generic[T]):
    """What the ops below take."""

    x: T
    inner: Inner[T] | None
    pair: QuantizedTensor[T]
    format: Format
    scale: float
    many: list[T]


def _add(operands: Outer[Tensor]) -> Tensor:
    total = operands.x * operands.scale + operands.pair.data
    for tensor in operands.many:
        total = total + tensor
    return total if operands.inner is None else total + operands.inner.tensor * operands.inner.number


def _fill(operands: Outer[Tensor]) -> None:
    operands.pair.data.fill_(7)


ADD = StructuredOp("test_structured_add", Outer, _add, fake=lambda operands: torch.empty_like(operands.x))
FILL = StructuredOp("test_structured_fill", Outer, _fill, fake=lambda operands: None, mutates=("pair",))


def operands(*, absent: bool) -> Outer[Tensor]:
    inner = None if absent else Inner(torch.full((2,), 10.0), 3, None)
    return Outer(torch.ones(2), inner, QuantizedTensor(torch.full((2,), 5.0)), Format("int8", 8, 1), 2.0, [torch.ones(2)] * 2)


@pytest.mark.parametrize("absent", [True, False])
def test_an_op_gets_the_structure_that_it_was_given(absent: bool) -> None:
    given_operands = operands(absent=absent)
    assert ADD.build(ADD.arguments(given_operands)) == given_operands
    assert ADD(given_operands).tolist() == ([9.0, 9.0] if absent else [39.0, 39.0])


def test_a_node_holds_the_structure_too() -> None:
    graph = Graph()
    x, y, z = (graph.placeholder(name) for name in "xyz")
    structure: Any = Outer(x, Inner(y, 3, None), QuantizedTensor(z), Format(), 1.0, [x, y])
    node = graph.call_function(ADD.target, ADD.arguments(structure))
    assert ADD.build(node.args) == structure


def test_the_schema_says_what_is_written() -> None:
    schema = str(FILL.target._schema)  # type: ignore[attr-defined]
    assert "Tensor(a4!) pair_data, Tensor(a5!)? pair_scale" in schema
    assert "Tensor x, Tensor? inner_tensor, SymInt inner_number, Tensor? inner_other" in schema
    operand = operands(absent=True)
    FILL(operand)
    assert operand.pair.data.tolist() == [7.0, 7.0]


def test_an_op_compiles() -> None:
    def run(x: Tensor) -> Tensor:
        flat = ADD.arguments(operands(absent=False)._replace(x=x))
        result: Tensor = ADD.target(*flat)
        return result

    gm = torch.fx.symbolic_trace(run)
    assert torch.compile(gm, backend="aot_eager")(torch.ones(2)).tolist() == [39.0, 39.0]
