"""Write the bodies of higher-order ops out in the graph, so that the passes see through their operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from sparse_compile.passes.ir.fx_nodes import expr_of, op_name, value_of
from sparse_compile.passes.ir.region import BODY, HIGHER_ORDER_OPS, begin_region, end_region
from sparse_compile.passes.ir.rewrite import Rewrite
from sparse_compile.passes.read.read_attention import has_attention

Stack = dict[str, tuple[str, Any]]
FirstCall = tuple[Stack, tuple[Any, ...]]  # of a body: the modules that its op is in, and its operands


def open_regions(rewrite: Rewrite) -> int:
    """Open every region that has attention and can be opened; returns how many. ``close_regions`` closes them again."""
    gm, opened = rewrite.gm, 0
    first_calls: dict[GraphModule, FirstCall] = {}
    queue = list(gm.graph.nodes)
    while queue:
        node = queue.pop(0)
        bodies = bodies_of(gm, node)
        if not any(map(has_attention, bodies)):
            continue
        if reason := why_not_open(gm, node):
            rewrite.closed[node] = reason
            continue
        for body in bodies:
            first_calls.setdefault(body, (_stack_of(node), HIGHER_ORDER_OPS[op_name(node)].operands_of(node)))
        queue = _open(gm, node, bodies, first_calls) + queue
        opened += 1
    return opened


def bodies_of(gm: GraphModule, node: Node) -> list[GraphModule]:
    """The bodies that a node of ``gm`` runs."""
    found = [getattr(gm, str(n.target), None) for n in node.all_input_nodes if n.op == "get_attr"]
    return [body for body in found if isinstance(body, GraphModule)]


def why_not_open(gm: GraphModule, node: Node) -> str:
    """Why the bodies of a node cannot be written out in the graph; empty if they can."""
    op, bodies = HIGHER_ORDER_OPS.get(op_name(node)), bodies_of(gm, node)
    if op is None or len(bodies) != len(op.bodies) or any(isinstance(x, Node) for x in node.kwargs.values()):
        return "the passes do not rewrite the bodies of such ops"
    if any(op_name(inner) == "cache_update" for body in bodies for inner in _all_nodes(body)):
        return "a SparseCache that is written there cannot be read by the passes: call the layer outside of it"
    for body in bodies:
        inputs = [inner for inner in body.graph.nodes if inner.op == "placeholder"]
        operands = op.operands_of(node)
        if len(inputs) != len(operands) or not all(map(_fits, inputs, operands)):
            return "the shapes of its operands are not those that its body was traced for"
    return ""


def _all_nodes(body: GraphModule) -> list[Node]:
    """The nodes of a body and of all bodies inside it."""
    nodes = list(body.graph.nodes)
    return nodes + [inner for node in nodes for deeper in bodies_of(body, node) for inner in _all_nodes(deeper)]


def _fits(inner: Node, operand: Any) -> bool:
    """Whether an operand has the size that the body was traced for. Calls that share a body may differ in their symbols."""
    traced, given = value_of(inner), value_of(operand)
    if isinstance(traced, Tensor):
        same = isinstance(given, Tensor) and traced.dim() == given.dim()
        return same and all(expr_of(a) == expr_of(b) for a, b in zip(traced.shape, given.shape, strict=True))
    if isinstance(traced, int | torch.SymInt):
        return isinstance(given, int | torch.SymInt) and expr_of(traced) == expr_of(given)
    return True


def _open(gm: GraphModule, node: Node, bodies: list[GraphModule], first_calls: dict[GraphModule, FirstCall]) -> list[Node]:
    """Write the bodies of ``node`` out before it; returns the new nodes."""
    op = HIGHER_ORDER_OPS[op_name(node)]
    operands, old = op.operands_of(node), [node.args[at] for at in op.bodies]
    ends: list[Node] = []
    nodes: list[Node] = []
    for body in bodies:
        relabel = _relabel(*first_calls[body], _stack_of(node), operands)
        end, inner = _write_out(gm, node, body, operands, relabel)
        ends.append(end)
        nodes += inner
    op.give(node, ends, [])
    for holder in old:
        assert isinstance(holder, Node)
        if not holder.users:
            gm.graph.erase_node(holder)
        if not any(n.op == "get_attr" and n.target == holder.target for n in gm.graph.nodes):
            gm.delete_submodule(str(holder.target))
    return nodes


def _write_out(
    gm: GraphModule, node: Node, body: GraphModule, operands: tuple[Any, ...], relabel: Callable[[Stack], Stack]
) -> tuple[Node, list[Node]]:
    """Write one body out before ``node``; returns the marker of its end and the nodes between the markers."""
    stands_for: dict[Node, Any] = dict(zip((n for n in body.graph.nodes if n.op == "placeholder"), operands, strict=True))
    nodes: list[Node] = []
    with gm.graph.inserting_before(node):
        begin = gm.graph.call_function(begin_region)
        begin.meta[BODY] = body
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                outputs = map_arg(inner.args[0], lambda n: stands_for[n])
                break
            new = gm.graph.node_copy(inner, lambda n: stands_for[n])
            if inner.op == "get_attr":
                new.target = _moved(body, gm, str(inner.target))
            new.meta["nn_module_stack"] = relabel(inner.meta.get("nn_module_stack") or {})
            stands_for[inner] = new
            nodes.append(new)
        return gm.graph.call_function(end_region, (begin, outputs)), nodes


def _moved(source: GraphModule, target: GraphModule, name: str) -> str:
    """Give ``target`` the attribute ``name`` of ``source``, under a name that is free; returns that name."""
    value, free, count = getattr(source, name), name, 0
    while hasattr(target, free) and getattr(target, free) is not value:
        count += 1
        free = f"{name}_{count}"
    setattr(target, free, value)
    return free


def _stack_of(node: Node) -> Stack:
    return node.meta.get("nn_module_stack") or {}


def _relabel(first: Stack, first_operands: tuple[Any, ...], here: Stack, operands: tuple[Any, ...]) -> Callable[[Stack], Stack]:
    """Return how the modules of a body's nodes are called in this call of it.

    Calls may share a body, as equal layers in a ``nested_compile_region`` do. Its nodes name the modules of the ``first`` call.
    """
    was, now = (next(reversed(stack.values()))[0] if stack else "" for stack in (first, here))
    if was != now:
        return lambda stack: {key: (_renamed(path, was, now), kind) for key, (path, kind) in stack.items()}
    if any(a is not b and _is_input(a) and _is_input(b) for a, b in zip(first_operands, operands, strict=True)):
        return lambda stack: {}  # it has other weights, but nothing says which module they belong to
    return lambda stack: stack


def _renamed(path: str, was: str, now: str) -> str:
    return now + path[len(was) :] if was and (path == was or path.startswith((f"{was}.", f"{was}["))) else path


def _is_input(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "placeholder"
