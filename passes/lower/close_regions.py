"""Turn every region of the graph into a body of its higher-order op again."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from sparse_compile.passes.ir.fx_nodes import op_name, value_of
from sparse_compile.passes.ir.region import BODY, HIGHER_ORDER_OPS, body_of, end_region, nodes_of, regions_around
from sparse_compile.passes.ir.rewrite import Rewrite


def close_regions(rewrite: Rewrite) -> int:
    """Close all regions; returns how many there were. Everything that a body reads becomes an operand of its op."""
    gm = rewrite.gm
    if any(node.target is end_region for node in gm.graph.nodes):
        _move_constants_out(gm)
    shared: dict[str, list[Node]] = {}
    closed = 0
    for node in list(gm.graph.nodes):  # an inner op comes before the op that it is in
        if any(source.target is end_region for source in node.all_input_nodes):
            if op_name(node) == "invoke_subgraph" and rewrite.target.inner == "eager":
                _stay_open(gm, node)  # a body saves compile time only, and torch has no gradients for it here
            else:
                _close(gm, node, shared)
            closed += 1
    if closed:
        gm.graph.lint()
        gm.recompile()
    return closed


def _move_constants_out(gm: GraphModule) -> None:
    """Read every constant of a region outside of it, and once, because operands of an op may not share memory."""
    constants: dict[str, Node] = {}
    for node in list(gm.graph.nodes):
        if node.op != "get_attr" or isinstance(getattr(gm, str(node.target)), nn.Module):
            continue
        first = constants.setdefault(str(node.target), node)
        around = regions_around(node)
        if first is not node:
            node.replace_all_uses_with(first)
            gm.graph.erase_node(node)
        elif around:
            around[0].prepend(node)


def _close(gm: GraphModule, node: Node, shared: dict[str, list[Node]]) -> None:
    op = HIGHER_ORDER_OPS[op_name(node)]
    ends = [source for source in node.all_input_nodes if source.target is end_region]
    inputs = list(dict.fromkeys(read for end in ends for read in _read_outside(end)))
    bodies = [_body(gm, end, inputs) for end in ends]
    holders = [_hold(gm, node, body) for body in bodies]
    op.give(node, holders, inputs)
    for end in ends:
        begin = end.args[0]
        inside = nodes_of(end)
        for old in (end, *reversed(inside), begin):
            assert isinstance(old, Node)
            gm.graph.erase_node(old)
        for name in {str(old.target) for old in inside if old.op in ("call_module", "get_attr")}:
            if not any(n.op in ("call_module", "get_attr") and n.target == name for n in gm.graph.nodes):
                gm.delete_submodule(name)
    if op_name(node) == "invoke_subgraph":
        _share(gm, node, shared)


def _stay_open(gm: GraphModule, node: Node) -> None:
    """Make the nodes of a region ordinary nodes of the graph around it."""
    (end,) = node.all_input_nodes
    begin, outputs = end.args
    for item in list(node.users):
        assert op_name(item) == "getitem"
        item.replace_all_uses_with(outputs[item.args[1]])  # type: ignore[index, arg-type]
        gm.graph.erase_node(item)
    for old in (node, end, begin):
        assert isinstance(old, Node)
        gm.graph.erase_node(old)


def _read_outside(end: Node) -> list[Node]:
    """The nodes outside of a region that its nodes read."""
    inside = {*nodes_of(end), *end.all_input_nodes[:1]}
    for node in inside:
        assert all(user in inside or user is end for user in node.users), f"{node} is read outside of its region"
    return [read for node in (*nodes_of(end), end) for read in node.all_input_nodes if read not in inside]


def _body(gm: GraphModule, end: Node, inputs: list[Node]) -> GraphModule:
    """The nodes of a region as a graph of their own, with a placeholder for each of ``inputs``."""
    begin, outputs = end.args
    assert isinstance(begin, Node)
    graph = Graph()
    stands_for: dict[Node, Node] = {}
    for read in inputs:
        stands_for[read] = graph.placeholder(read.name)
        stands_for[read].meta = {key: value for key, value in read.meta.items() if key != BODY}
    attributes: dict[str, Any] = {}
    for node in nodes_of(end):
        stands_for[node] = graph.node_copy(node, lambda n: stands_for[n])
        if node.op in ("call_module", "get_attr"):
            attributes[str(node.target)] = getattr(gm, str(node.target))
    graph.output(map_arg(outputs, lambda n: stands_for[n]))
    graph.lint()
    body, old = GraphModule(attributes, graph), body_of(begin)
    body.meta.update(old.meta)
    return body


def _hold(gm: GraphModule, node: Node, body: GraphModule) -> Node:
    """Make ``body`` an attribute of the graph, and return a node that reads it before ``node``."""
    count = 0
    while hasattr(gm, f"sparse_body_{count}"):
        count += 1
    gm.add_submodule(f"sparse_body_{count}", body)
    with gm.graph.inserting_before(node):
        return gm.graph.get_attr(f"sparse_body_{count}")


def _share(gm: GraphModule, node: Node, shared: dict[str, list[Node]]) -> None:
    """Let equal bodies that were one body before be one again, and give different ones different names.

    The compiler compiles a body once for each name.
    """
    holder, name, *operands = node.args
    assert isinstance(holder, Node)
    same_name = shared.setdefault(str(name), [])
    for other in same_name:
        known, given, *others = other.args
        assert isinstance(known, Node)
        if _are_equal(*(getattr(gm, str(body.target)) for body in (holder, known))) and all(map(_are_alike, operands, others)):
            gm.delete_submodule(str(holder.target))
            holder.target = known.target
            node.args = (holder, given, *operands)
            return
    node.args = (holder, f"{name}_sparse_{len(same_name)}" if same_name else name, *operands)
    same_name.append(node)


def _are_equal(a: GraphModule, b: GraphModule) -> bool:
    """Whether two bodies compute the same."""
    if len(a.graph.nodes) != len(b.graph.nodes) or a.meta != b.meta:
        return False
    numbers = {n: k for body in (a, b) for k, n in enumerate(body.graph.nodes)}
    for x, y in zip(a.graph.nodes, b.graph.nodes, strict=True):
        if x.op != y.op or _arguments(x, numbers) != _arguments(y, numbers):
            return False
        if x.op in ("call_module", "get_attr"):
            same = _are_one_module(getattr(a, str(x.target)), getattr(b, str(y.target)))
        else:
            same = x.op == "placeholder" or x.target == y.target
        if not same:
            return False
    return True


def _arguments(node: Node, numbers: dict[Node, int]) -> Any:
    """The arguments of a node, with a number in the place of every node."""
    return map_arg((node.args, node.kwargs), lambda n: ("node", numbers[n]))


def _are_alike(a: Any, b: Any) -> bool:
    """Whether two operands have the same shape and type. Two nodes without a recorded value may differ."""
    x, y = value_of(a), value_of(b)
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        same = x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype and x.device == y.device
        return same and x.requires_grad == y.requires_grad
    return a is b or (x is not None and bool(type(x) is type(y) and x == y))


def _are_one_module(x: nn.Module, y: nn.Module) -> bool:
    """Whether two modules compute the same: they are one, are equal bodies, or are ours and hold equal values."""
    if x is y:
        return True
    if isinstance(x, GraphModule) and isinstance(y, GraphModule):
        return _are_equal(x, y)
    public = [{key: value for key, value in vars(module).items() if not key.startswith("_")} for module in (x, y)]
    return type(x) is type(y) and type(x).__module__.startswith("sparse_compile.") and public[0] == public[1]
