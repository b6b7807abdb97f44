"""Follow what a tensor holds back through the operations that write to it in place."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from sparse_compile.passes.ir.fx_nodes import IN_PLACE_OPERATORS, Order, is_in_place, op_name, writers


class Unread(Exception):
    """An attention site cannot be read. The message names the operation that is not understood."""


def operation(node: Node) -> str:
    """The name of an operation, the same for its in-place form: ``add`` for ``add_`` and ``+=``."""
    name = op_name(node)
    if not is_in_place(node):
        return name
    return name[1:] if name in IN_PLACE_OPERATORS else name.removesuffix("_")


def content(node: Any, at: Node, order: Order) -> Node:
    """The node whose result is what ``node`` holds when ``at`` runs: itself, or the last operation that wrote all of it.

    Raises ``Unread`` if only a part was written, or if it was written through a view.
    """
    if not isinstance(node, Node):
        raise Unread("its scores or weights are no tensor of the graph")
    last = order.last(w for w in writers(node) if order.before(node, w) and order.before(w, at))
    if last is None:
        return node
    if not last.args or _whole(last.args[0]) is not _whole(node):
        raise Unread(
            f"its scores, weights or operands are overwritten in place by {op_name(last)} before the output is computed"
        )
    return last


def _whole(node: object) -> object:
    """The tensor whose memory an in-place operation returned."""
    while isinstance(node, Node) and is_in_place(node) and node.args:
        node = node.args[0]
    return node
