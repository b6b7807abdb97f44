"""The operands of a product as ``[*lead, length, channels]``, whatever the order in which the model holds their axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from sparse_compile.passes.ir.fx_nodes import argument, expr_of, hint_of, op_name, shape_of, sizes_of, writers
from sparse_compile.passes.read.contents import Unread

VIEWS = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze"}


@dataclass(frozen=True)
class Operand:
    """The tensor ``node.permute(order)``."""

    node: Node
    order: tuple[int, ...]

    @property
    def is_plain(self) -> bool:
        """Whether the axes are in order already."""
        return self.order == tuple(range(len(self.order)))

    @property
    def sizes(self) -> tuple[Any, ...]:
        """The shape after the permutation."""
        sizes = sizes_of(self.node)
        return tuple(sizes[axis] for axis in self.order)


def operand(node: Any, *, transposed: bool = False) -> Operand:
    """The operand ``node``, with its last two axes swapped if it is ``transposed``."""
    shape = shape_of(node) if isinstance(node, Node) else None
    if shape is None:
        raise Unread("an operand of its products has no recorded shape")
    axes = list(range(len(shape)))
    if transposed and len(axes) > 1:
        axes[-2:] = axes[:-3:-1]
    return Operand(node, tuple(axes))


def untransposed(given: Operand) -> Operand:
    """The same tensor without the transposes that cancel out; ``given`` itself if they do not."""
    at = given
    while not at.is_plain and (order := permutation(at.node)) is not None:
        source = at.node.args[0]
        assert isinstance(source, Node)
        at = Operand(source, tuple(order[axis] for axis in at.order))
    return at if at.is_plain else given


def unmerged(given: Operand, heads: int) -> Operand | None:
    """``[B, H, length, channels]`` if ``given`` is that tensor with its first two axes merged into one; else None.

    It is also None if either of them is written in place, because merging axes may copy.
    """
    node = given.node
    source = node.args[0] if op_name(node) in VIEWS | {"contiguous"} and given.order[0] == 0 else None
    if not isinstance(source, Node) or writers(source) or writers(node):
        return None
    if op_name(node) == "contiguous":
        return unmerged(Operand(source, given.order), heads)
    wide, narrow = shape_of(source), sizes_of(node)
    if wide is None or len(wide) != 4 or len(narrow) != 3 or hint_of(wide[1]) != heads or not same(wide[2:], narrow[1:]):
        return None
    return Operand(source, (0, 1, *(axis + 1 for axis in given.order[1:])))


def permutation(node: Node) -> tuple[int, ...] | None:
    """The axes of the input that ``node`` returns in this order, if it only reorders axes; else None."""
    name, source = op_name(node), node.args[0] if node.args else None
    shape = shape_of(source) if isinstance(source, Node) else None
    if shape is None:
        return None
    axes = list(range(len(shape)))
    if name == "permute":
        dims: Any = node.args[1:] if len(node.args) > 1 and isinstance(node.args[1], int) else argument(node, 1, "dims")
        return tuple(axes[dim] for dim in dims)
    if name in ("transpose", "swapaxes"):
        a = argument(node, 1, "dim0", node.kwargs.get("axis0"))
        b = argument(node, 2, "dim1", node.kwargs.get("axis1"))
    elif name in ("mT", "t"):
        a, b = -1, -2
    else:
        return None
    axes[a], axes[b] = axes[b], axes[a]
    return tuple(axes)


def same(sizes: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    """Whether two shapes are equal in every run."""
    return [expr_of(size) for size in sizes] == [expr_of(size) for size in others]
