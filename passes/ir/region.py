"""Regions: the body of a higher-order op, written out in the graph that runs the op, between two marker nodes.

The passes work on one flat graph, in which an operand of the op is the tensor itself and a mask can be followed through it.
``read/open_regions.py`` opens regions, and ``lower/close_regions.py`` turns each of them into a body again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node


@dataclass(frozen=True)
class HigherOrderOp:
    """Where an op has its bodies and their operands.

    ``nested`` says that the operands are one tuple. Otherwise they are the last arguments.
    """

    bodies: tuple[int, ...]
    operands: int
    nested: bool = False

    def operands_of(self, node: Node) -> tuple[Any, ...]:
        """The operands of a node that calls the op."""
        operands: Any = node.args[self.operands] if self.nested else node.args[self.operands :]
        return tuple(operands)

    def give(self, node: Node, bodies: list[Node], operands: list[Node]) -> None:
        """Replace the bodies and the operands of a node that calls the op."""
        args = list(node.args[: self.operands])
        for at, body in zip(self.bodies, bodies, strict=True):
            args[at] = body
        node.args = (*args, tuple(operands)) if self.nested else (*args, *operands)


# The ops whose bodies the passes rewrite. Loops are not among them, because their operands differ from one step to the next.
HIGHER_ORDER_OPS = {
    "tag_activation_checkpoint": HigherOrderOp(bodies=(0,), operands=1),
    "invoke_subgraph": HigherOrderOp(bodies=(0,), operands=2),
    "cond": HigherOrderOp(bodies=(1, 2), operands=3, nested=True),
}
BODY = "sparse_compile_body"  # the key under which the marker of a region's beginning holds the body as it was


def begin_region() -> None:
    """Mark the beginning of a region. The marker is a node and never runs."""
    raise AssertionError("a region was not closed")


def end_region(begin: Node, outputs: Any) -> None:
    """Mark the end of the region of ``begin``, and name its outputs. The marker is a node and never runs."""
    raise AssertionError("a region was not closed")


def body_of(begin: Node) -> GraphModule:
    """The body that a region was opened from."""
    body: GraphModule = begin.meta[BODY]
    return body


def regions_around(node: Node) -> tuple[Node, ...]:
    """The beginnings of all regions that ``node`` is in, from the outermost to the innermost."""
    around: list[Node] = []
    at = node.prev
    while at.op != "root":
        if at.target is end_region:
            at = _begin_of(at)
        elif at.target is begin_region:
            around.insert(0, at)
        at = at.prev
    return tuple(around)


def is_visible(node: Node, point: Node) -> bool:
    """Whether a node at ``point`` may read ``node``: it is in no region, or in one that ``point`` is in as well."""
    inside = regions_around(node)
    return inside == regions_around(point)[: len(inside)]


def nodes_of(end: Node) -> list[Node]:
    """The nodes of a region, without its markers."""
    nodes, at = [], _begin_of(end).next
    while at is not end:
        nodes.append(at)
        at = at.next
    return nodes


def _begin_of(end: Node) -> Node:
    begin = end.args[0]
    assert isinstance(begin, Node)
    return begin
