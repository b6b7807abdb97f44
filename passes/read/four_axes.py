"""Bring attention over three or five axes to ``[batch, heads, length, channels]``, and its output back.

The new nodes are views of the old ones, so a call that is left after all computes the same as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import Node

from sparse_compile.passes.ir.fx_emit import follow, inline
from sparse_compile.passes.ir.fx_nodes import hint_of, is_one, op_name, sizes_of
from sparse_compile.passes.ir.scalars import fixed
from sparse_compile.passes.read.contents import Unread
from sparse_compile.passes.read.operands import Operand, unmerged, untransposed

Lead = Literal["plain", "merged", "unbatched", "batches", "groups"]


@dataclass(frozen=True)
class Axes:
    """What the axes before ``[length, channels]`` are.

    | ``lead``    | axes                                                                   |
    |-------------|------------------------------------------------------------------------|
    | `plain`     | ``[batch, heads]``                                                     |
    | `merged`    | ``[batch * heads]``                                                    |
    | `unbatched` | ``[heads]``                                                            |
    | `batches`   | ``[outer batch, batch, heads]``                                        |
    | `groups`    | ``[batch, KV heads, query heads of each]``; keys may have 1 of the last |

    ``inner`` is the size of the last of these axes, and ``middle`` that of the axis before it.
    """

    lead: Lead
    inner: int = 1
    middle: int = 1

    def of_rank(self, rank: int, heads: int | None) -> Axes:
        """The axes of a tensor of the same attention with ``rank`` axes. Models merge batch and heads for some products only.

        Raises ``Unread`` if the number of heads, or the way in which axes are merged, is not known.
        """
        if rank == {"plain": 4, "merged": 3, "unbatched": 3}.get(self.lead, 5):
            return self
        if rank == 4:
            return Axes("plain")
        if rank == 3 and heads is not None:
            return Axes("merged", heads)
        raise Unread(f"its scores, weights or values have {rank} axes, and the passes do not know which of them are heads")

    def tensor(self, point: Node, given: Operand) -> Node:
        """Queries, keys or values with four axes, written before ``point``."""
        given = untransposed(given)
        if self.lead == "merged" and (source := unmerged(given, self.inner)) is not None:
            given = untransposed(source)
        elif self.lead != "plain":
            return self._split(point, given)
        if given.is_plain:
            return given.node
        node: Node = inline(point, lambda x: x.permute(given.order), given.node)
        return node

    def _split(self, point: Node, given: Operand) -> Node:
        narrow = len(given.order) == 5 and is_one(given.sizes[2])

        def split(x: Any) -> Any:
            x = x if given.is_plain else x.permute(given.order)
            return x.squeeze(2) if self.lead == "groups" and narrow else self._four(x)

        node: Node = inline(point, split, given.node)
        return node

    def term(self, point: Node, node: Node, rank: int, like: Node) -> Node:
        """A tensor that is added to scores with ``rank`` axes, or that hides them, so that it fits scores with four axes.

        ``like`` is a tensor with the leading axes of the scores.
        """
        sizes = sizes_of(node)
        if self.lead == "plain" or len(sizes) < 3:
            return node
        missing = rank - len(sizes)

        def four(x: Any, like: Any) -> Any:
            for _ in range(missing):
                x = x.unsqueeze(0)
            lead = [1] * missing + list(sizes[:-2])
            if self.lead == "merged" and is_one(lead[0]):
                return x.unsqueeze(0)
            first = 1 if self.lead == "groups" else 0  # the first of two axes that become one
            if len(lead) == 3:
                if is_one(lead[first]) and is_one(lead[first + 1]):
                    return x.squeeze(first)
                shape = [-1] * 5
                for axis in (first, first + 1):
                    shape[axis] = like.size(axis)
                x = x.expand(*shape)
            return self._four(x)

        result: Node = inline(point, four, node, like)
        return result

    def result(self, node: Node, order: tuple[int, ...]) -> Node:
        """The node of the output with four axes, written behind ``node``. Users of ``node`` get it in their own axes again."""
        plain = order == tuple(range(len(order)))
        if self.lead == "plain" and plain:
            return node
        back = tuple(order.index(axis) for axis in range(len(order)))

        def four(x: Any) -> Any:
            return self._four(x if plain else x.permute(order))

        def original(x: Any) -> Any:
            return self._original(x) if plain else self._original(x).permute(back)

        return follow(node, four, original)

    def _four(self, x: Any) -> Any:
        if self.lead == "merged":
            return x.unflatten(0, (-1, self.inner))
        if self.lead == "unbatched":
            return x.unsqueeze(0)
        if self.lead == "batches":
            return x.flatten(0, 1)
        return x.flatten(1, 2) if self.lead == "groups" else x

    def _original(self, x: Any) -> Any:
        if self.lead == "merged":
            return x.flatten(0, 1)
        if self.lead == "unbatched":
            return x.squeeze(0)
        if self.lead == "batches":
            return x.unflatten(0, (-1, self.middle))
        return x.unflatten(1, (self.middle, self.inner)) if self.lead == "groups" else x


def axes_of(q: Operand, k: Operand, *, heads: int | None = None, grouped: bool = False) -> Axes:
    """The axes of attention with these operands. Raises ``Unread`` for fewer than three or more than five.

    ``heads`` is their number, where the model shows it. ``grouped`` says that the axis before the lengths is one of heads.
    """
    rank = len(q.order)
    if rank != len(k.order) or not 3 <= rank <= 5:
        raise Unread(f"the query has {rank} axes and the key has {len(k.order)}, not [batch, heads, length, head_dim]")
    if rank == 4:
        return Axes("plain")
    if rank == 3:
        if heads is None and (grouped or hint_of(q.sizes[0]) != hint_of(k.sizes[0])):
            return Axes("unbatched")
        return Axes("merged", heads or _heads_before(q) or 1)
    middle, inner = fixed(q.sizes[1]), fixed(q.sizes[2])
    if middle is None or inner is None:
        raise Unread("the query has five axes, and the second and third are known at run time only")
    in_groups = heads == middle * inner if heads is not None else _is_shared(k)
    return Axes("groups" if in_groups and not grouped else "batches", inner, middle)


def _heads_before(q: Operand) -> int | None:
    """The number of heads of the tensor whose first two axes were merged into the first of ``q``; None without one."""
    node = untransposed(q).node
    while op_name(node) in ("mul", "div", "truediv", "contiguous", "to") and isinstance(node.args[0], Node):
        node = node.args[0]
    source = node.args[0] if node.args else None
    sizes = sizes_of(source) if isinstance(source, Node) and op_name(node) in ("view", "reshape", "flatten") else ()
    heads = fixed(sizes[1]) if len(sizes) == 4 else None
    fits = heads is not None and unmerged(Operand(node, (0, 1, 2)), heads) is not None
    return heads if fits else None


def _is_shared(k: Operand) -> bool:
    """Whether the keys are the same along their third axis: it has size 1, or was expanded."""
    node = k.node
    while op_name(node) in ("transpose", "contiguous") and isinstance(node.args[0], Node):
        node = node.args[0]
    source = node.args[0] if op_name(node) in ("expand", "broadcast_to") else node
    assert isinstance(source, Node)
    sizes = sizes_of(source)
    return len(sizes) == 5 and is_one(sizes[2])
