"""Assign the nodes of a graph to stages: what comes before the layers, each layer, and what follows the last one.

A stage is a run of consecutive nodes, so running the stages one after the other keeps the order of all reads and writes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from sparse_compile.passes.ir.fx_nodes import is_in_place, module_path, op_name
from sparse_compile.passes.pieces.node_values import Values, memory_read, memory_written, tensors_in

Stages = dict[Node, int]
FRONT = 0
RANDOM = ("rand", "dropout", "bernoulli", "multinomial", "normal", "uniform", "exponential", "poisson")
# Functions of these modules only compute their result, unless their name says that they work in place.
PURE_MODULES = ("torch", "_operator", "math", "builtins")


def stages_of(graph: Graph, modules: Iterable[str]) -> Stages:
    """Return the stage of every computing node. ``modules`` are the paths of the modules that call attention.

    The layers are the modules that their paths name up to the first number, such as ``model.layers.0``, and those beside them.
    A layer begins at its first node. Nodes that belong to no layer stay with the layer before them.
    """
    containers = {container for path in modules if (container := _layer_of(path)[0])}
    nodes = [node for node in graph.nodes if node.op.startswith("call_")]
    stages: Stages = {}
    begun: list[tuple[str, str]] = []
    for node in nodes:
        layer = _layer_of(module_path(node))
        if layer[0] in containers and layer not in begun:
            begun.append(layer)
        stages[node] = len(begun)
    behind = takewhile(lambda node: not begun or _layer_of(module_path(node)) != begun[-1], reversed(nodes))
    return stages | dict.fromkeys(behind, len(begun) + 1)


def _layer_of(path: str) -> tuple[str, str]:
    """The module that holds the layers of a path, and the number of the layer; empty texts if the path names no layer."""
    before = list(takewhile(lambda part: not part.isdigit(), parts := path.split(".")))
    return (".".join(before), parts[len(before)]) if len(before) < len(parts) else ("", "")


def move_shared_to_front(graph: Graph, stages: Stages, values: Values) -> int:
    """Move what a layer computes for other stages to the front stage; returns how many nodes moved.

    The first layer that needs them computes positions and block tables for all layers, and would otherwise differ from the
    layers that only use them. A node moves if it needs nothing that belongs to one layer: no input of its own, no result of
    such an input, and no memory that a layer writes before it.
    """
    behind = max(stages.values(), default=FRONT)
    movable: set[Node] = set()
    written: set[int] = set()
    own = _own_inputs(graph, stages, values, behind)
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            if node not in own:
                movable.add(node)
        elif stages.get(node) == FRONT:
            movable.add(node)
        elif node in stages:
            pure = _is_pure(node) and not memory_read(node, values) & written
            if pure and all(each in movable for each in node.all_input_nodes):
                movable.add(node)
            written |= memory_written(node, values)
    moved: set[Node] = set()
    for node in reversed(graph.nodes):
        others = any(user in moved or stages.get(user, behind) != stages.get(node) for user in node.users)
        if node in movable and stages.get(node, FRONT) != FRONT and others:
            moved.add(node)
    first = next((node for node in graph.nodes if stages.get(node, FRONT) != FRONT and node not in moved), None)
    for node in [node for node in graph.nodes if node in moved]:
        assert first is not None
        first.prepend(node)
        stages[node] = FRONT
    return len(moved)


def _own_inputs(graph: Graph, stages: Stages, values: Values, behind: int) -> set[Node]:
    """The inputs that belong to one layer: no other stage uses them, and another layer has an input of the same kind.

    A mask that only the first layer reads, to compute positions for all layers, belongs to none.
    """
    kinds: dict[Any, dict[Node, int]] = {}
    for node in graph.find_nodes(op="placeholder"):
        users, value = {stages.get(user, behind) for user in node.users}, values[node]
        if len(users) == 1 and not users & {FRONT, behind} and isinstance(value, Tensor):
            kind = (tuple(map(str, value.shape)), tuple(map(str, value.stride())), value.dtype)
            kinds.setdefault(kind, {})[node] = users.pop()
    return {node for alike in kinds.values() if len(set(alike.values())) > 1 for node in alike}


def _is_pure(node: Node) -> bool:
    """Whether a node only computes its result, from its arguments alone."""
    if node.op == "call_module":
        return True  # one of ours
    name = op_name(node)
    if is_in_place(node) or name.startswith("_set_") or any(random in name for random in RANDOM):
        return False
    return node.op == "call_method" or (getattr(node.target, "__module__", "") or "").split(".")[0] in PURE_MODULES


def take_apart(graph: Graph, stages: Stages, values: Values) -> None:
    """Let every stage read the single tensors of a tuple that another stage made, because only tensors pass between stages."""
    for node in [node for node in stages if isinstance(values[node], tuple | list)]:
        value = values[node]
        readers = [user for user in node.users if stages.get(user) != stages[node]]
        if not readers or len(list(tensors_in(value))) != len(value):
            continue
        with graph.inserting_after(node):
            # The last one is inserted first, so that they stand in order.
            parts = [graph.call_function(operator.getitem, (node, n)) for n in reversed(range(len(value)))][::-1]
        for part, tensor in zip(parts, value, strict=True):
            stages[part], values[part], part.meta["example_value"] = stages[node], tensor, tensor
        for user in readers:
            if user.target is operator.getitem and isinstance(user.args[1], int):
                user.replace_all_uses_with(parts[user.args[1]])
                graph.erase_node(user)
                del stages[user], values[user]
            else:
                _replace(user, node, type(value)(parts))
        for part in parts:
            if not part.users:
                graph.erase_node(part)
                del stages[part], values[part]


def _replace(user: Node, old: Node, new: Sequence[Node]) -> None:
    """Let ``user`` read the list or tuple ``new`` in the place of ``old``."""

    def replaced(node: Node) -> Any:
        return new if node is old else node

    args: Any = map_arg(user.args, replaced)
    kwargs: Any = map_arg(user.kwargs, replaced)
    user.args, user.kwargs = args, kwargs
