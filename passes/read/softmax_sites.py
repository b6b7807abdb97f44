"""Find attention in a graph: every softmax over what a product makes, whose result another product consumes.

Nothing here understands the attention. A site that the reader cannot read still gets a row in the report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from sparse_compile.passes.ir.fx_nodes import ALIASING, aliases, is_in_place, memory_of, op_name, value_of, writers
from sparse_compile.passes.ir.scalars import CASTS

PRODUCTS = {"matmul", "bmm", "mm", "baddbmm", "einsum"}
SOFTMAXES = {"softmax", "special_softmax", "_softmax", "_safe_softmax", "log_softmax", "special_log_softmax", "_log_softmax"}
# Operations whose result is no longer scores or weights, but the input of the next part of a model.
ENDS = {
    *"linear addmm conv1d conv2d conv3d layer_norm rms_norm group_norm batch_norm embedding".split(),
    *"scaled_dot_product_attention multi_head_attention_forward flex_attention".split(),
}


@dataclass(frozen=True)
class Site:
    """A softmax, the products that consume its result, and every node on the way from it to them."""

    softmax: Node
    consumers: tuple[Node, ...]
    way: frozenset[Node]


def softmax_sites(graph: Graph) -> list[Site]:
    """The attention sites of a graph, in its order."""
    sites = []
    for node in graph.nodes:
        if is_softmax(node) and leads_to_product(node.all_input_nodes):
            way, consumers = _below(node)
            if consumers:
                sites.append(Site(node, consumers, frozenset(way)))
    return sites


def is_softmax(node: Node) -> bool:
    """Whether ``node`` normalizes: a softmax of any name, or ``exp`` with a sum or ``logsumexp`` beside it."""
    name = op_name(node)
    if name in SOFTMAXES:
        return True
    if name not in ("exp", "exp_", "exp2"):
        return False
    around = [*_through_casts(node, lambda n: n.users), *_through_casts(node, lambda n: n.all_input_nodes)]
    return any(op_name(near) in ("sum", "logsumexp") for near in around)


def _through_casts(node: Node, step: Callable[[Node], Iterable[Node]]) -> Iterator[Node]:
    """The nodes one step away, and those that are a cast, a view or a difference further."""
    for near in step(node):
        yield near
        if op_name(near) in (*CASTS, *ALIASING, "sub"):
            yield from _through_casts(near, step)


def leads_to_product(nodes: Iterable[Any]) -> bool:
    """Whether any of ``nodes`` is computed from a product of two activations, without a layer of the model in between."""
    seen: set[Node] = set()
    queue = [node for node in nodes if isinstance(node, Node)]
    while queue:
        node = queue.pop()
        if node in seen or not computes_tensors(node):
            continue
        seen.add(node)
        if is_product(node):
            return True
        if op_name(node) not in ENDS | SOFTMAXES | PRODUCTS:
            queue += node.all_input_nodes
            if op_name(node) in ALIASING or op_name(node).startswith(("new_", "zeros", "empty", "full", "ones")):
                queue += writers(node)
    return False


def is_product(node: Node) -> bool:
    """Whether ``node`` multiplies two activations. Multiplying by a parameter is a projection, as in the router of experts."""
    name = op_name(node)
    if name not in PRODUCTS:
        return False
    inputs = node.all_input_nodes
    sides = inputs if name == "einsum" else inputs[-1:]
    return not any(isinstance(value_of(memory_of(side)), nn.Parameter) for side in sides)


def _below(softmax: Node) -> tuple[set[Node], tuple[Node, ...]]:
    """The nodes that its result passes through, and the products where it arrives."""
    way: set[Node] = set()
    consumers: dict[Node, None] = {}
    queue = [softmax]
    while queue:
        node = queue.pop(0)
        if node in way:
            continue
        way.add(node)
        for user in node.users:
            if op_name(user) in PRODUCTS:
                consumers[user] = None
            elif op_name(user) not in ENDS | SOFTMAXES and computes_tensors(user):
                queue.append(user)
            if is_in_place(user) and user.args and user.args[0] is not node:  # its result is written into another tensor
                queue += [alias for alias in aliases(user) if alias is not user and alias.op != "placeholder"]
    return way, tuple(consumers)


def computes_tensors(node: Node) -> bool:
    """Whether ``node`` computes tensors, and not a size or another number."""
    return node.op != "output" and not isinstance(value_of(node), torch.SymInt | torch.Size | int | float)
