"""Cut a graph at its layers into pieces, which run one after the other and pass tensors and sizes to each other."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import free_symbols, free_unbacked_symbols

from sparse_compile.passes.ir.fx_nodes import expr_of, op_name, value_of
from sparse_compile.passes.pieces.equality import piece_key
from sparse_compile.passes.pieces.node_values import Values, memory_written, node_values, tensors_in
from sparse_compile.passes.pieces.stages import FRONT, Stages, move_shared_to_front, stages_of, take_apart
from sparse_compile.passes.torch_private import is_higher_order, is_wrapper, storage_id

# Methods that change shape, strides or memory of a tensor in place. They would change the kind of an input of later pieces.
RESHAPING = frozenset("set_ resize_ resize_as_ as_strided_ t_ transpose_ squeeze_ unsqueeze_ swapaxes_ swapdims_".split())
FEWEST_SAVED = 2  # compilations that cutting must save: each piece costs some host time in every run


@dataclass(frozen=True)
class Piece:
    """A run of nodes as a graph of its own.

    ``reads`` are the nodes of the whole graph that are its inputs, and ``values`` their fake values. ``writes`` are the nodes
    that it computes for later pieces and for the output. Pieces with equal ``key`` compute the same.
    """

    gm: GraphModule
    reads: tuple[Node, ...]
    writes: tuple[Node, ...]
    values: tuple[Any, ...]
    key: Hashable


class Whole(Exception):  # no error: the graph is compiled as a whole
    """Why a graph is not cut."""


def cut(gm: GraphModule, modules: Iterable[str]) -> list[Piece]:
    """Cut ``gm`` at its layers, which hold the attention calls of ``modules``. This changes only the order of nodes in ``gm``.

    Raises ``Whole`` if the graph cannot be cut, or if that would save nothing.
    """
    stages = stages_of(gm.graph, modules)
    if max(stages.values(), default=FRONT) < FEWEST_SAVED + 2:
        raise Whole("it has too few layers")
    _check_nodes(gm, stages)
    values = node_values(gm)
    move_shared_to_front(gm.graph, stages, values)
    take_apart(gm.graph, stages, values)
    gm.recompile()  # if it stays whole after all, it runs in the new order
    pieces = [_piece(gm, nodes, stages, values) for nodes in _runs(gm.graph, stages)]
    if len(pieces) - len({piece.key for piece in pieces}) < FEWEST_SAVED:
        raise Whole("too few of its layers are equal")
    return pieces


def _runs(graph: Graph, stages: Stages) -> list[list[Node]]:
    runs: dict[int, list[Node]] = {}
    for node in graph.nodes:
        if node in stages:
            runs.setdefault(stages[node], []).append(node)
    return [runs[stage] for stage in sorted(runs)]


def _check_nodes(gm: GraphModule, stages: Stages) -> None:
    """Raise ``Whole`` for nodes that need the rest of the graph."""
    for node in gm.graph.nodes:
        if node.op == "get_attr" and not isinstance(attribute(gm, node), Tensor):
            raise Whole(f"{node} is no tensor")
        if node.op == "call_module" and not _is_ours(gm.get_submodule(str(node.target))):
            raise Whole(f"{node} is a module that the passes did not write")
        if is_higher_order(node.target):
            raise Whole(f"{node} is a higher-order op")
        if op_name(node) == "item":  # Dynamo passes Python floats like this, and traces again once AOTAutograd asks for one
            raise Whole(f"{node} is a number that depends on data")
        if node.op == "call_method" and node.target in RESHAPING:
            raise Whole(f"{node} changes the shape of a tensor in place")
        if stages.get(node, FRONT) != FRONT and op_name(node).startswith(("_set_", "_enter_", "_exit_")):
            raise Whole(f"{node} changes the mode in which a layer runs")
        if any(is_wrapper(x) or free_unbacked_symbols(x) for x in tensors_in(value_of(node))):
            raise Whole(f"{node} is a tensor that consists of others, or has a size that depends on data")


def _is_ours(module: nn.Module) -> bool:
    ours = type(module).__module__.startswith("sparse_compile.")
    return ours and next(module.parameters(), None) is None and next(module.buffers(), None) is None


def attribute(gm: GraphModule, node: Node) -> Any:
    """The attribute that a ``get_attr`` node reads."""
    value: Any = gm
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


def _piece(gm: GraphModule, nodes: Sequence[Node], stages: Stages, values: Values) -> Piece:
    """The piece that consists of ``nodes``, which is a stage."""
    inside = set(nodes)
    read = dict.fromkeys(each for node in nodes for each in node.all_input_nodes if each not in inside)
    reads = [node for node in read if not _is_constant(values[node])]
    reads += [node for node in _symbols(gm.graph, values, (*nodes, *reads)) if node not in read]
    writes = [node for node in nodes if any(user not in inside for user in node.users)]
    writes = [node for node in writes if not _is_constant(values[node])]
    _check_values(nodes, reads, writes, values)

    graph, modules = Graph(), dict[str, nn.Module]()
    copies: dict[Node, Any] = {node: values[node] for node in read if _is_constant(values[node])}
    for number, node in enumerate(reads):
        copies[node] = graph.placeholder(f"input_{number}")
        copies[node].meta = {"example_value": values[node]}
    for node in nodes:
        copy = graph.node_copy(node, copies.__getitem__)
        copy.name, copy.meta = f"step_{len(copies)}", _kept_meta(node) | {"example_value": values[node]}
        if node.op == "call_module":
            copy.target = f"module_{len(modules)}"
            modules[copy.target] = gm.get_submodule(str(node.target))
        copies[node] = copy
    graph.output(tuple(copies[node] for node in writes))
    piece = GraphModule(modules, graph, "Piece")
    inputs = tuple(values[node] for node in reads)
    return Piece(piece, tuple(reads), tuple(writes), inputs, piece_key(piece, inputs))


def _kept_meta(node: Node) -> dict[str, Any]:
    return {name: node.meta[name] for name in ("stack_trace", "custom") if name in node.meta}


def _is_constant(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _symbols(graph: Graph, values: Values, nodes: Iterable[Node]) -> Iterator[Node]:
    """The inputs of the graph that are the sizes in the values of ``nodes``."""
    needed = set().union(*(free_symbols(x) for node in nodes for x in _sized(values[node])))
    for node in graph.nodes:
        if node.op == "placeholder" and isinstance(values[node], torch.SymInt) and expr_of(values[node]) in needed:
            yield node


def _sized(value: Any) -> list[Any]:
    return [value] if isinstance(value, torch.SymInt) else list(tensors_in(value))


def _check_values(nodes: Iterable[Node], reads: Iterable[Node], writes: Iterable[Node], values: Values) -> None:
    """Raise ``Whole`` if a value cannot pass between pieces, or if a piece writes memory of two of its inputs."""
    for node in (*reads, *writes):
        if not isinstance(values[node], Tensor | torch.SymInt):
            raise Whole(f"{node} is a {type(values[node]).__name__}, which cannot pass from one piece to another")
    written = set().union(*(memory_written(node, values) for node in nodes))
    read = [storage_id(values[node]) for node in reads if isinstance(values[node], Tensor)]
    if any(read.count(storage) > 1 for storage in written):
        raise Whole("a layer writes memory that several of its inputs share")
