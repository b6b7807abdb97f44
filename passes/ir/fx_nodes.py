"""Read an FX graph: operation names, shapes, order, aliases, and integers as sympy expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Graph, Node

from sparse_compile.passes.torch_private import example_size, op_schema, written_arguments

# Operations whose result may share memory with their first argument.
ALIASING = frozenset(
    (
        "getitem view reshape expand expand_as unsqueeze squeeze transpose permute t flatten unflatten contiguous to "
        "detach narrow select chunk split mT broadcast_to float bool long int type type_as alias view_as swapaxes "
        "movedim moveaxis T mH double cpu cuda unbind tensor_split diagonal as_strided dropout"
    ).split()
)
IN_PLACE_OPERATORS = frozenset("setitem iadd isub imul itruediv ifloordiv imod ipow iand ior ixor imatmul".split())


def op_name(node: Any) -> str:
    """The plain name of a node's operation (``add``, ``getitem``, ``softmax``), the same for functions and methods.

    Operators get the name of the method: torch 2.11 records ``a == b`` as ``__eq__``, 2.13 as ``eq``. Attributes get their
    own name: torch 2.13 records ``k.mT`` as ``getattr(k, "mT")``, 2.15 as an op. The name is empty for other nodes.
    """
    if not isinstance(node, Node) or node.op not in ("call_method", "call_function"):
        return ""
    if node.target is getattr:
        return str(node.args[1])
    if (schema := op_schema(node.target)) is not None:
        return str(schema.name.split("::")[-1])
    name = node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))
    return name[2:-2] if name.startswith("__") and name.endswith("__") else name


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, whether it was passed by position or by keyword."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def value_of(node: Any) -> Any:
    """The example value that Dynamo recorded for a node; anything that is no node is returned as it is."""
    return node.meta.get("example_value") if isinstance(node, Node) else node


def shape_of(node: Node) -> tuple[Any, ...] | None:
    """The shape of a tensor node, with SymInts for dynamic sizes; None if the node is no tensor."""
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, Tensor) else None


def sizes_of(node: Node) -> tuple[Any, ...]:
    """The shape of a node that must be a tensor."""
    shape = shape_of(node)
    assert shape is not None, f"{node} is no tensor"
    return shape


def result_shape(node: Node) -> tuple[Any, ...]:
    """The shape of a tensor node; ``()``, the shape of a scalar, for any other node."""
    return shape_of(node) or ()


def expr_of(size: Any) -> sympy.Expr:
    """An int or SymInt as a sympy expression."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def hint_of(size: Any) -> int:
    """The value of an int or SymInt in the traced example; 0 if a SymInt has none."""
    return example_size(size)


def is_one(size: Any) -> bool:
    """Whether a size is 1 in every run."""
    return isinstance(size, int) and size == 1


def is_in_place(node: Node) -> bool:
    """Whether a node writes to one of its arguments."""
    if isinstance(node.kwargs.get("out"), Node) or node.kwargs.get("inplace") is True:
        return True
    if node.op not in ("call_method", "call_function"):
        return False
    if (schema := op_schema(node.target)) is not None:
        return bool(schema.is_mutable)
    name = op_name(node)
    if getattr(node.target, "__module__", "") == "_operator" or name != str(getattr(node.target, "__name__", node.target)):
        return name in IN_PLACE_OPERATORS  # operator.and_ and operator.or_ end in an underscore and write nothing
    return name.endswith("_")


class Order:
    """The order of a graph's nodes, and which memory is written between two of them. Valid until the graph changes."""

    def __init__(self, graph: Graph) -> None:
        self._at = {node: k for k, node in enumerate(graph.nodes)}

    def holds(self, node: Node) -> bool:
        """Whether ``node`` was in the graph when this order was taken."""
        return node in self._at

    def before(self, a: Node, b: Node) -> bool:
        """Whether ``a`` runs before ``b``."""
        return self._at[a] < self._at[b]

    def last(self, nodes: Iterable[Node]) -> Node | None:
        """The one of ``nodes`` that runs last; None if there are none."""
        return max(nodes, key=self._at.__getitem__, default=None)

    def written(self, node: Node, *, since: Node, until: Node, unless: Iterable[Node] = ()) -> bool:
        """Whether any node but those in ``unless`` may write to the memory of ``node`` after ``since`` and before ``until``."""
        return any(self._at[since] < self._at[user] < self._at[until] for user in writers(node) if user not in unless)


def writers(node: Node) -> list[Node]:
    """The nodes of the whole graph that write to the memory of ``node``."""
    return [user for alias in aliases(node) for user in alias.users if is_in_place(user) and _writes(user, alias)]


def _writes(user: Node, alias: Node) -> bool:
    positions = written_arguments(user.target)
    if positions:
        return any(user.args[at] is alias for at in positions if at < len(user.args))
    return user.kwargs.get("out") is alias or (bool(user.args) and user.args[0] is alias)


def memory_of(node: Node) -> Node:
    """The node that allocated the memory of ``node``, or may have allocated it."""
    while (op_name(node) in ALIASING or is_in_place(node)) and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def aliases(node: Node) -> set[Node]:
    """The nodes that may share memory with ``node``."""
    root = memory_of(node)
    aliases, queue = {root}, [root]
    while queue:
        for user in queue.pop().users:
            shares = op_name(user) in ALIASING or is_in_place(user)
            if user not in aliases and shares and user.args and user.args[0] in aliases:
                aliases.add(user)
                queue.append(user)
    return aliases


def module_path(node: Node) -> str:
    """The path of the module that a node belongs to, spelled as in ``named_modules``; empty outside of all modules."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(next(reversed(stack.values()))[0])
    path = re.sub(r"^[LG]\['\w+'\]", "", path.replace("getattr(", ""))  # the name of the variable that holds the model
    path = re.sub(r"\['?([^'\]]+)'?\]", r".\1", path)  # .layers[0] -> .layers.0
    # A hook or a nested region calls a bound method, whose name and ``__self__`` stand for the module itself.
    path = re.sub(r"\.\w+\.__self__(?=\.|$)", "", path)
    parts = [p for p in path.split(".") if p not in ("", "_modules", "_orig_mod", "__dict__")]
    return ".".join(parts)


def layer_index(path: str) -> int | None:
    """The layer that a module path names, which is its first number; None if it has no number."""
    return next((int(part) for part in path.split(".") if part.isdigit()), None)
