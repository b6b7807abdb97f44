"""A backend that stands in for torch-tensorrt, with engines that run in torch, and the import of the real one without a GPU."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, make_dataclass
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import create_op_support

from support.installed import pretend

FIELDS = (
    "attn_bias_is_causal min_block_size dryrun pass_through_build_failures torch_executed_ops use_distributed_mode_trace "
    "use_fast_partitioner workspace_size"
)
DRY = {"dryrun": True}  # without it, the backend refuses graphs on CPU


class Engine(nn.Module):
    """A part of a graph that runs in torch, and corrupts inputs that are not contiguous, as torch-tensorrt 2.11 does."""

    def __init__(self, part: GraphModule) -> None:
        super().__init__()
        self.run = part.forward

    def forward(self, *inputs: Any) -> Any:
        return self.run(*(x if _can_be_read(x) else torch.full_like(x, torch.nan) for x in inputs))


def _can_be_read(x: Any) -> bool:
    return not isinstance(x, Tensor) or x.is_contiguous()


@dataclass
class StandIn:
    """A backend that records its options. It leaves the ops whose names contain one of ``in_torch`` to torch."""

    options: dict[str, Any] | None = None
    in_torch: tuple[str, ...] = ("sparse_compile",)
    fails: Exception | None = None

    def __call__(self, gm: GraphModule, inputs: Sequence[Any], *, options: dict[str, Any]) -> Callable[..., Any]:
        from torch._dynamo.backends.common import aot_autograd

        self.options = options
        if self.fails is not None:
            raise self.fails
        compiled: Callable[..., Any] = aot_autograd(fw_compiler=self._divide)(gm, inputs)
        return compiled

    def _divide(self, graph: GraphModule, _: Any) -> Callable[..., Any]:
        known = create_op_support(lambda _, node: self._takes(node))
        parts = CapabilityBasedPartitioner(graph, known, allows_single_node_partition=True)
        divided = parts.fuse_partitions(parts.propose_partitions(), prefix="_run_on_acc_")
        for name, part in list(divided.named_children()):
            assert isinstance(part, GraphModule)
            setattr(divided, name, Engine(part))
        run: Callable[..., Any] = divided.forward
        return run

    def _takes(self, node: Node) -> bool:
        return node.op == "call_function" and not any(name in str(node.target) for name in self.in_torch)


def stand_in(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> StandIn:
    """Install a backend in the place of torch-tensorrt for one test."""
    backend = StandIn(**settings)
    package, dynamo = ModuleType("torch_tensorrt"), ModuleType("torch_tensorrt.dynamo")
    package.__spec__ = ModuleSpec("torch_tensorrt", None)
    dynamo.CompilationSettings = make_dataclass("CompilationSettings", [(name, Any, None) for name in FIELDS.split()])  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_tensorrt", package)
    monkeypatch.setitem(sys.modules, "torch_tensorrt.dynamo", dynamo)
    pretend(monkeypatch, "torch-tensorrt", "2.13.0")
    found = "sparse_compile.passes.tensorrt.inner_backend"
    monkeypatch.setattr(found, lambda name: {"torch_tensorrt": backend}[name])
    return backend


def real(monkeypatch: pytest.MonkeyPatch) -> None:
    """Import the Python part of torch-tensorrt on a machine without a GPU, or skip the test.

    torch-tensorrt-rtx imports without CUDA once its folder ``lib`` and its ``_C`` are removed. Beside it stand the wheels
    tensorrt-rtx-cu13-bindings and tensorrt-rtx-cu13-libs, and the folder ``tensorrt_rtx`` from the source of tensorrt-rtx-cu13,
    without its folder ``plugin``.
    """
    if find_spec("torch_tensorrt") is None:
        pytest.skip("needs torch-tensorrt")
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch._C, "_CudaDeviceProperties", object, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_tensorrt  # noqa: F401
