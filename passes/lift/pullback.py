"""Pull the index of a tensor element back through the operations that computed the tensor.

A mask is built from ``arange``, comparisons, ``&`` and a few lookups. Starting at its element ``(b, h, i, j)``, the pullback
walks from the mask towards its inputs, and turns the ``[B, 1, Q, KV]`` tensor into a formula of four integers. An operation
without a rule becomes an ``Element`` of its node, so the result is always exact.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from sparse_compile.passes.ir.fx_nodes import is_in_place, is_one, memory_of, op_name, shape_of, value_of, writers
from sparse_compile.passes.ir.scalars import guarded
from sparse_compile.passes.lift.rules_pointwise import COMPUTES, CONSTANTS
from sparse_compile.passes.lift.rules_view import MOVES
from sparse_compile.passes.lift.symbolic_element import Atoms, Element, Index, Number, Value, constant

RULES = MOVES | COMPUTES


class Pullback:
    """Express elements of the tensors of one graph as formulas of their index."""

    def __init__(self) -> None:
        self.atoms = Atoms()

    def element(self, node: Any, index: Index) -> Value:
        """The element at ``index`` (one expression per axis) of the tensor that ``node`` computes."""
        if not isinstance(node, Node):
            return constant(node)
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            return Number(value.node.expr)
        if not isinstance(value, Tensor):
            known = value if isinstance(value, bool) else guarded(value)
            return constant(known) if known is not None else Element(node, index)
        if _is_rewritten(node):
            return self._opaque(node, index)  # its content changes in place: read the tensor instead of deriving it
        rule = RULES.get(op_name(node).removesuffix("_") if is_in_place(node) else op_name(node))
        value = rule(self, node, index) if rule is not None else None
        return value if value is not None else self._opaque(node, index)

    def _opaque(self, node: Node, index: Index) -> Value:
        element = Element(node, index)
        dtype = value_of(node).dtype
        is_integer = not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool
        return Number(self.atoms.term(element)) if is_integer else element

    def operand(self, node: Any, index: Index, result: tuple[Any, ...]) -> Value:
        """The element of an operand that broadcasts to a result of shape ``result`` indexed by ``index``.

        An axis of size 1 that is not broadcast keeps its index. The index is 0 in any case, and this way the axis of a single
        query is still recognized as the query axis.
        """
        shape = shape_of(node) if isinstance(node, Node) else None
        if shape is None:
            return self.element(node, ())
        skip = len(index) - len(shape)
        tail = zip(shape, index[skip:], result[skip:], strict=True)
        return self.element(node, tuple(sympy.Integer(0) if is_one(s) and not is_one(r) else x for s, x, r in tail))

    def integer(self, node: Any) -> sympy.Expr | None:
        """A scalar argument as an expression; None if it is no integer."""
        if node is None:
            return None
        value = self.element(node, ())
        return value.expr if isinstance(value, Number) else None


def _is_rewritten(node: Node) -> bool:
    """Whether the content of ``node`` is not the result of its operation, because its memory is written to in place.

    ``zeros_like(m).masked_fill_(m, -inf)`` does not count: it writes to a fresh tensor that no other node uses.
    """
    base = memory_of(node)
    harmless = list(base.users) if op_name(base) in CONSTANTS and len(base.users) == 1 else []
    return any(writer not in harmless or "out" in writer.kwargs for writer in writers(node))
