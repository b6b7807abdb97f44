"""Compile a graph with torch-tensorrt: the settings with which it is right, its engines, and what it leaves to torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from sparse_compile.masks.optional_packages import needed
from sparse_compile.passes.torch_private import dynamo_error, inner_backend, is_higher_order, limit_size, on_module_registration

# Without these settings, torch-tensorrt is silently wrong. Each has what would go wrong.
REQUIRED: dict[str, tuple[bool, str]] = {
    "use_distributed_mode_trace": (
        True,
        "without it, torch-tensorrt loses what a graph writes in place to its inputs, such as the tokens of a cache",
    ),
    "attn_bias_is_causal": (
        False,
        "with it, torch-tensorrt runs every attention under a bias as plain causal attention, without the policy",
    ),
}
DEFAULTS: dict[str, Any] = {
    "pass_through_build_failures": True,  # False hides that an engine could not be built, and runs the graph in torch
    "use_fast_partitioner": False,  # the fast one transposes weights in the first engine, in every run
}
# torch-tensorrt reads these options, but they are no fields of its settings.
READ_ELSEWHERE = frozenset({"custom_engine_cache", "debug", "engine_cache_dir", "engine_cache_size"})
# An engine with this op cannot be built over a StaticCache, whose tokens it writes (torch-tensorrt-rtx 2.11).
IN_TORCH = frozenset({"torch.ops.aten.index_put.default"})
GROWTH = 4  # how far a dynamic size may grow beyond its traced value before another graph is compiled
ENGINE = "_run_on_acc"  # begins the names of the parts that become engines

NO_GRADIENTS = (
    "inner='tensorrt' needs a graph without gradients, and an input or a weight of this one requires them: run the model under "
    "torch.no_grad(), or use inner='inductor'"
)


@dataclass(frozen=True)
class Parts:
    """What became of a graph: the number of its engines, and how often each op runs in torch beside them.

    Without engines, the whole graph runs in torch, and ``in_torch`` is empty.
    """

    engines: int
    in_torch: Mapping[str, int]


def import_tensorrt() -> None:
    """Import torch-tensorrt, which registers its backend. Raises ``ImportError`` with the remedy if it cannot be imported."""
    # Without its libraries, torch-tensorrt raises a bare Exception; without those of CUDA or with another version of torch, it
    # raises OSError, AssertionError or AttributeError.
    with needed("inner='tensorrt'", "torch-tensorrt", failures=(Exception,)):
        import torch_tensorrt  # noqa: F401


def compile_tensorrt(gm: GraphModule, inputs: Sequence[Any], options: Mapping[str, Any]) -> tuple[Callable[..., Any], Parts]:
    """Compile ``gm``, and return the compiled function and what became of its parts.

    Raises ``ImportError`` if torch-tensorrt cannot be imported, ``ValueError`` for options that it does not have or that would
    make it wrong and for tensors that are not on CUDA, and ``RuntimeError`` if an engine cannot be built.
    """
    import_tensorrt()
    settings = settings_for(options)
    if not settings.get("dryrun") and not any(isinstance(x, Tensor) and x.is_cuda for x in inputs):
        raise ValueError("inner='tensorrt' needs a model on CUDA, got a graph without CUDA tensors: use inner='inductor'")
    for size in (size for x in inputs for size in (x.shape if isinstance(x, Tensor) else (x,))):
        # An engine is built for a range of sizes. Without a bound, torch-tensorrt takes 65,536 times the smallest size, for
        # which engines have tensors that are too large.
        limit_size(size, GROWTH)
    with _registered() as parts:
        try:
            compiled = inner_backend("torch_tensorrt")(gm, inputs, options=settings)
        except dynamo_error():
            raise
        except (AssertionError, RuntimeError, TypeError) as failed:
            raise RuntimeError(
                f"inner='tensorrt' needs engines that can be built, got {type(failed).__name__}: {failed}. Leave the op that "
                "fails to torch with inductor={'torch_executed_ops': {...}}, or use inner='inductor'"
            ) from failed
    return compiled, _parts(parts, dry=bool(settings.get("dryrun")))


def settings_for(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings for torch-tensorrt under the options of a user. Raises ``ValueError`` for options that are wrong."""
    known = _known_settings() | READ_ELSEWHERE
    if missing := sorted(REQUIRED.keys() - known):
        raise ValueError(
            f"inner='tensorrt' needs a torch-tensorrt with the setting {missing[0]}, got one without it: install a version "
            "from 2.11 to 2.14"
        )
    for name, value in options.items():
        if name not in known:
            raise ValueError(
                f"inner='tensorrt' needs options of torch-tensorrt in inductor=, got {name!r}: leave it out, or choose from "
                "torch_tensorrt.dynamo.CompilationSettings"
            )
        if name in REQUIRED and value != REQUIRED[name][0]:
            wanted, why = REQUIRED[name]
            raise ValueError(f"inner='tensorrt' needs {name}={wanted}, got {value!r}: leave it out, because {why}")
    in_torch = {*IN_TORCH, *options.get("torch_executed_ops", ())}
    required = {name: value for name, (value, _) in REQUIRED.items()}
    return {**DEFAULTS, **options, **required, "torch_executed_ops": in_torch}


def _known_settings() -> frozenset[str]:
    from torch_tensorrt.dynamo import CompilationSettings

    return frozenset(field.name for field in fields(CompilationSettings))


@contextmanager
def _registered() -> Iterator[list[nn.Module]]:
    """Collect the modules to which torch-tensorrt adds parts of graphs, and prepare the inputs of the engines among them."""
    parents: list[nn.Module] = []

    def note(parent: nn.Module, name: str, part: nn.Module | None) -> None:
        if not name.startswith(ENGINE) or part is None:
            return
        if parent not in parents:
            parents.append(parent)
        if not isinstance(part, GraphModule):
            part.register_forward_pre_hook(prepare_inputs)

    with on_module_registration(note):
        yield parents


def prepare_inputs(engine: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the inputs of an engine with all tensors contiguous and on one device.

    torch-tensorrt 2.11 makes other tensors contiguous itself, and frees these copies before the engine reads them. It allocates
    the outputs next, so an output often takes the memory of such an input. Half-precision outputs are also converted from new
    float32 tensors, which overwrites the input: https://github.com/pytorch/TensorRT/pull/4247. It refuses tensors on CPU, which
    Dynamo makes of Python floats in a graph with dynamic sizes.
    """
    device = next((x.device for x in inputs if isinstance(x, Tensor) and x.is_cuda), None)
    return tuple(x.to(device or x.device).contiguous() if isinstance(x, Tensor) else x for x in inputs)


def _parts(parents: Sequence[nn.Module], *, dry: bool) -> Parts:
    """Count the engines of the last graph that torch-tensorrt divided, and the ops beside them. A dry run builds none."""
    if not parents:
        return Parts(0, {})
    graph, in_torch = parents[-1], Counter[str]()
    engines = [name for name, part in graph.named_children() if _is_engine(name, part, dry=dry)]
    for module in _graphs_in_torch(graph, engines):
        in_torch.update(_op(node) for node in module.graph.nodes if node.op == "call_function" and _computes(node))
    return Parts(len(engines), dict(in_torch.most_common()))


def _is_engine(name: str, part: nn.Module, *, dry: bool) -> bool:
    return name.startswith(ENGINE) and (dry or not isinstance(part, GraphModule))


def _graphs_in_torch(graph: nn.Module, engines: Sequence[str]) -> Iterator[GraphModule]:
    if isinstance(graph, GraphModule):
        yield graph
    for name, part in graph.named_children():
        if name not in engines and isinstance(part, GraphModule):
            yield part


def _computes(node: Node) -> bool:
    """Whether a node computes a tensor, and not a number or a part of a tuple."""
    return not isinstance(node.meta.get("val"), torch.SymInt | int) and getattr(node.target, "__module__", "") != "_operator"


def _op(node: Node) -> str:
    """The name of the op that a node runs; that of the op inside, where torch calls an op that writes in place on copies."""
    target: Any = node.target
    if is_higher_order(target) and "auto_functionalized" in str(target):
        target = node.args[0]
    return str(target)
