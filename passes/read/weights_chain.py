"""Walk from the product of weights and values back to the softmax."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from sparse_compile.passes.ir.fx_nodes import Order, argument, op_name, shape_of, sizes_of
from sparse_compile.passes.ir.scalars import CASTS, number
from sparse_compile.passes.read.contents import Unread, content, operation
from sparse_compile.passes.read.operands import VIEWS, same
from sparse_compile.passes.read.score_chain import is_maximum
from sparse_compile.passes.read.softmax_sites import SOFTMAXES, computes_tensors

LOG_SOFTMAXES = {name for name in SOFTMAXES if "log" in name}


@dataclass
class Weights:
    """The nodes between a softmax and the product with the values, from the product backwards.

    ``has_sink`` says that the last column was cut off, and ``without_nan`` that NaN became zero. ``zeroed`` are the conditions
    under which weights became zero.
    """

    order: Order
    nodes: list[Node] = field(default_factory=list)
    has_sink: bool = False
    without_nan: bool = False
    zeroed: list[Node] = field(default_factory=list)

    def walk(self, node: Any, at: Node) -> Node:
        """Return the softmax that ``node``, as it is when ``at`` runs, comes from. Raises ``Unread``."""
        while True:
            node = content(node, at, self.order)
            self.nodes.append(node)
            name = operation(node)
            if name in SOFTMAXES - LOG_SOFTMAXES:
                return self._last_axis(node)
            if name == "exp" and op_name(node.args[0]) in LOG_SOFTMAXES:
                inner = content(node.args[0], node, self.order)
                self.nodes.append(inner)
                return self._last_axis(inner)
            self._step(node, name)
            node, at = node.args[0], node

    def _step(self, node: Node, name: str) -> None:
        """Record one operation on weights. Raises ``Unread`` if it changes them in a way that is not understood."""
        if name in CASTS | {"clone", "detach"} or (
            name in VIEWS and same(sizes_of(node)[-2:], sizes_of(node.all_input_nodes[0])[-2:])
        ):
            return
        if name == "dropout":
            given = argument(node, 1, "p", 0.5)
            p = given if number(given) is None else number(given)
            if argument(node, 2, "training", True) and p != 0:
                raise Unread(f"dropout of attention weights with p={p}: FlexAttention has no dropout")
        elif name == "getitem" and not self.has_sink and node.args[1] == (Ellipsis, slice(None, -1, None)):
            self.has_sink = True
        elif name == "masked_fill" and number(node.args[2]) == 0 and isinstance(node.args[1], Node):
            self.zeroed.append(node.args[1])
        elif name == "nan_to_num" and argument(node, 1, "nan") in (None, 0):
            self.without_nan = True
        else:
            raise Unread(f"the attention weights pass through {op_name(node) or node.name}, which the passes do not recognize")

    def _last_axis(self, softmax: Node) -> Node:
        axis, last = argument(softmax, 1, "dim"), len(sizes_of(softmax)) - 1
        if axis not in (-1, last):
            raise Unread(f"the softmax runs over axis {axis}, not over the keys in the last axis")
        return softmax

    def used_elsewhere(self, consumer: Node) -> list[str]:
        """The other users of the weights that ``consumer`` takes, and of the tensors of which they are views."""
        names = []
        for node in self.nodes:
            others = [user for user in node.users if user is not consumer and user not in self.nodes]
            names += [user.name for user in others if user.op == "output" or computes_tensors(user)]
            if operation(node) not in VIEWS:
                break
        return names


def split_sink(scores: Any, softmax: Node, order: Order) -> tuple[Node, Node, Node]:
    """The scores of ``cat([scores, sinks], -1)``, the node that uses them, and the logits by head.

    The maximum may be subtracted first. Raises ``Unread`` if the last column is no learned sink.
    """
    node = content(scores, softmax, order)
    while op_name(node) in CASTS:
        node = content(node.args[0], node, order)
    if op_name(node) == "sub" and isinstance(node.args[0], Node) and is_maximum(node.args[1], node.args[0]):
        node = content(node.args[0], node, order)
    parts: Any = argument(node, 0, "tensors") if op_name(node) == "cat" else ()
    if len(parts) == 2 and argument(node, 1, "dim", 0) in (-1, 3) and op_name(parts[1]) == "expand":
        logits = parts[1].args[0]
        shape = shape_of(logits) if isinstance(logits, Node) else None
        if shape is not None and len(shape) == 4 and [s for n, s in enumerate(shape) if n != 1] == [1, 1, 1]:
            return parts[0], node, logits
    raise Unread("columns are cut off the weights after the softmax, but not as a learned attention sink")
