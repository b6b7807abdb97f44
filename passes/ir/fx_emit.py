"""Write nodes into an FX graph, with the example values that later passes read."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node, Proxy
from torch.fx.node import map_aggregate
from torch.fx.proxy import GraphAppendingTracer

from sparse_compile.passes.ir.fx_nodes import aliases, is_in_place, memory_of, value_of
from sparse_compile.passes.ir.region import is_visible
from sparse_compile.passes.torch_private import mode_of, name_source, written_arguments


def emit_int(graph: Graph, expr: sympy.Expr, point: Node) -> int | Node | None:
    """The integer ``expr`` as an int, or as a node that can be used before ``point``; None if it cannot be computed there.

    New nodes go to the graph's current insertion point.
    """
    expr = sympy.expand(expr)
    if expr.is_Integer:
        return int(expr)
    for node in graph.nodes:
        if node is point:
            break
        if isinstance(value := value_of(node), torch.SymInt) and value.node.expr == expr and is_visible(node, point):
            holder: Node = node
            return holder
    if not isinstance(expr, sympy.Add | sympy.Mul):
        return None
    combine: Callable[[Any, Any], Any] = operator.add if isinstance(expr, sympy.Add) else operator.mul
    terms = [emit_int(graph, term, point) for term in expr.args]
    if any(term is None for term in terms):
        return None
    total: Any = terms[0]
    for term in terms[1:]:
        total = combine(total, term) if isinstance(total, int) and isinstance(term, int) else _call(graph, combine, total, term)
    result: int | Node = total
    return result


def _call(graph: Graph, function: Callable[[Any, Any], Any], a: Any, b: Any) -> Node:
    node = graph.call_function(function, (a, b))
    node.meta["example_value"] = function(value_of(a), value_of(b))
    return node


def attach(gm: GraphModule, name: str, tensor: Tensor) -> None:
    """Add a tensor that is no input of the model to the graph. If ``name`` is taken, it must hold an equal tensor already."""
    if hasattr(gm, name):
        return
    if isinstance(tensor, nn.Parameter):
        gm.register_parameter(name, tensor)
    else:
        gm.register_buffer(name, tensor)
    name_source(gm, name)


def inline(node: Node, function: Callable[..., Any], *args: Any) -> Any:
    """Write ``function(*args)`` as nodes before ``node``, with example values, and return the node of the result.

    Arguments that are nodes stand for their tensors. ``function`` may call torch operations and tensor methods only.
    """
    graph = node.graph
    tracer = GraphAppendingTracer(graph)
    before = set(graph.nodes)
    with graph.inserting_before(node):
        proxies: Any = map_aggregate(args, _proxy(tracer))
        result = function(*proxies)
    _describe([new for new in graph.nodes if new not in before], node)
    return result.node if isinstance(result, Proxy) else result


def follow(node: Node, function: Callable[..., Any], back: Callable[..., Any]) -> Node:
    """Write ``back(function(node))`` behind ``node``, give it to the users of ``node``, and return ``function(node)``."""
    point = node.next
    users = list(node.users)
    result: Node = inline(point, function, node)
    original = inline(point, back, result)
    for new in (result, original):
        new.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
    for user in users:
        user.replace_input_with(node, original)
    return result


def emit(point: Node, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
    """Add one node ``function(*args, **kwargs)`` before ``point``, with its example value."""
    with point.graph.inserting_before(point):
        new = point.graph.call_function(function, args, kwargs)
    _describe([new], point)
    return new


def _describe(nodes: list[Node], like: Node) -> None:
    """Give new nodes example values and the module stack of ``like``."""
    for new in nodes:
        new.meta["nn_module_stack"] = like.meta.get("nn_module_stack")
        with fake_mode_of(like.graph):
            new.meta["example_value"] = _run(new)


def fake_mode_of(graph: Graph) -> AbstractContextManager[Any]:
    """The fake mode of the example values, in which Dynamo traced. The mode that is active now is another one."""
    return mode_of(value_of(node) for node in graph.nodes)


def _proxy(tracer: GraphAppendingTracer) -> Any:
    return lambda arg: Proxy(arg, tracer) if isinstance(arg, Node) else arg


def _run(node: Node) -> Any:
    args: Any = map_aggregate(node.args, value_of)
    kwargs: Any = map_aggregate(node.kwargs, value_of)
    if node.op == "call_method":
        receiver, *rest = args
        return getattr(receiver, str(node.target))(*rest, **kwargs)
    assert callable(node.target)
    return node.target(*args, **kwargs)


def erase_dead(gm: GraphModule, candidates: Iterable[Node]) -> int:
    """Erase the ``candidates`` without users, and then the nodes that only they used; returns how many.

    ``eliminate_dead_code`` would also remove in-place calls such as ``length.add_(1)``, whose results have no users.
    """
    erased = 0
    queue = list(dict.fromkeys(candidates))
    gone: set[Node] = set()
    while queue:
        node = queue.pop()
        for member in () if node in gone else _unread_memory(node):
            queue += member.all_input_nodes
            gm.graph.erase_node(member)
            gone.add(member)
            erased += 1
        if (
            node in gone
            or node.users
            or node.op not in ("call_function", "call_method", "get_attr", "call_module")
            or is_in_place(node)
        ):
            continue
        queue += node.all_input_nodes
        gm.graph.erase_node(node)
        gone.add(node)
        erased += 1
    return erased


def _unread_memory(node: Node) -> list[Node]:
    """The nodes that allocate, view and write the memory of ``node``, the last one first, if no other node uses them."""
    root = memory_of(node)
    if root.op not in ("call_function", "call_method"):
        return []
    family = aliases(root)
    escapes = any(user not in family for member in family for user in member.users)
    writes_more = any(set(written_arguments(member.target)) > {0} for member in family)
    return [] if escapes or writes_more else [other for other in reversed(root.graph.nodes) if other in family]
