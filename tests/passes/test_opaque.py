"""Attention as one op that compiles itself, under compilers that do not support FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import create_op_support
from torch.nn import functional as F

import sparse_compile as sc
from sparse_compile.masks import alibi, causal, sink, sliding_window
from sparse_compile.passes.ops.block_tables import BLOCK, BlockTables, Cut, block_tables_op
from sparse_compile.passes.ops.flex_attention import Spec
from sparse_compile.passes.ops.opaque_attention import attention_op, module_of
from sparse_compile.passes.storage.graph_text import to_text
from support.attention import Attention

STREAMING = causal & (sink(4) | sliding_window(20))

pytestmark = pytest.mark.usefixtures("fresh")


def test_a_spec_survives_its_text() -> None:
    spec = Spec(STREAMING, 1, 0.5, alibi([0.5, 0.25]), (128, 128), (("BACKEND", "TRITON"),), 2, (3, 0))
    assert module_of(to_text(spec)).spec == spec


def test_it_runs_under_aot_eager_for_one_length_and_another() -> None:
    model = Attention()
    backend = sc.Backend(STREAMING, inner="aot_eager")
    fast: Any = torch.compile(model, backend=backend)
    slow: Any = torch.compile(model, backend=sc.Backend(STREAMING, inner="eager"))
    with torch.no_grad():
        for length in (150, 260):
            x = torch.randn(2, length, 32)
            torch.testing.assert_close(fast(x), slow(x), atol=1e-5, rtol=1e-4)
    assert {site.kernel for site in backend.report.sites} == {"FlexAttention"}


def other_rows(x: Tensor) -> Tensor:
    """The same values as every second row of a larger tensor."""
    return torch.stack([x, x], dim=3)[:, :, :, 0]


def operands_of(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """The operands of the op for the last queries of a text under ``STREAMING``."""
    q_len, kv_len = q.shape[2], k.shape[2]
    first, columns = kv_len - q_len, -(-kv_len // BLOCK)
    cut = Cut(1, q_len, kv_len, first, 0, BLOCK, BLOCK, columns, True)
    prepared = block_tables_op(BlockTables(STREAMING, cut, None, [], q.device))
    spec = Spec(STREAMING, 1, q.shape[3] ** -0.5, None, (BLOCK, BLOCK), starts=(first, 0))
    return q, k, v, prepared, [], [], to_text(spec)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "tokens before heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "other rows": other_rows,
    "offset": lambda x: torch.cat([x, x], dim=-1)[..., x.shape[-1] :],
}


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [*((torch.float32, layout) for layout in LAYOUTS), (torch.float16, "tokens before heads"), (torch.bfloat16, "contiguous")],
    ids=str,
)
def test_its_result_is_what_its_fake_form_declares(dtype: torch.dtype, layout: str) -> None:
    """Other compilers lay out their own tensors by the fake form, and read wrong numbers if dtype or strides differ."""
    x = torch.randn(1, 2, 150, 16).to(dtype)
    q, k, v = (LAYOUTS[layout](x * factor) for factor in (1, 2, 3))
    operands = operands_of(q, k, v)
    torch.library.opcheck(attention_op, operands, test_utils=["test_schema", "test_faketensor"])
    got = attention_op(*operands)
    assert got.is_contiguous() and got.dtype == dtype
    visible = STREAMING.dense(150, 150)
    wanted = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), visible).transpose(1, 2)
    torch.testing.assert_close(got.float(), wanted, atol=2e-2, rtol=2e-2)


def test_a_single_query_has_the_strides_of_the_fake_form() -> None:
    """An axis with one element has any stride in a contiguous tensor, and the fake form declares one."""
    q, k = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 150, 16)
    operands = operands_of(q, k, k)
    torch.library.opcheck(attention_op, operands, test_utils=["test_faketensor"])
    assert attention_op(*operands).stride() == torch.empty(1, 1, 2, 16).stride()


def test_with_gradients_it_is_the_dense_reference() -> None:
    model, x = Attention(), torch.randn(1, 40, 32)
    backend = sc.Backend(STREAMING, inner="aot_eager")
    torch.compile(model, backend=backend)(x).sum().backward()
    (site,) = backend.report.sites
    assert site.kernel == "dense reference"
    assert "gradients" in site.reason


def test_a_partitioning_compiler_takes_all_but_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch-tensorrt turns supported nodes into engines like this, and leaves the op that it does not know to PyTorch."""
    engines: list[GraphModule] = []
    left: list[str] = []

    def engine(gm: GraphModule, inputs: Any) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd

        def take(graph: GraphModule, _: Any) -> Callable[..., Any]:
            known = create_op_support(lambda _, node: node.op == "call_function" and "sparse_compile" not in str(node.target))
            parted = CapabilityBasedPartitioner(graph, known, allows_single_node_partition=True).partition_and_fuse()
            engines.extend(m for m in parted.children() if isinstance(m, GraphModule))
            left.extend(str(n.target) for n in parted.graph.nodes if n.op == "call_function")
            return parted.forward

        compiled: Callable[..., Any] = aot_autograd(fw_compiler=take)(gm, inputs)
        return compiled

    monkeypatch.setattr("sparse_compile.passes.inner_compiler._compile", lambda gm, inputs, *_: engine(gm, inputs))
    model, x = Attention(), torch.randn(2, 150, 32)
    with torch.no_grad():
        got = torch.compile(model, backend=sc.Backend(STREAMING, inner="aot_eager"))(x)
        wanted = torch.compile(model, backend=sc.Backend(STREAMING, inner="eager"))(x)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    ours = [name for name in left if "sparse_compile" in name]
    assert "sparse_compile.attention.default" in ours
    assert engines
