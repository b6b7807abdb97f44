"""One element of a tensor as an expression of its index: the result of pulling an index back through a mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import sympy
import torch
from torch.fx import Node

# The axes of attention scores. Every value below is a function of these four integers.
BATCH, HEAD, QUERY, KEY = (sympy.Symbol(name, integer=True, nonnegative=True) for name in ("b", "h", "i", "j"))
AXES = (BATCH, HEAD, QUERY, KEY)


@dataclass(frozen=True)
class Number:
    """An integer (or a float constant) as a sympy expression of axes, shape symbols and ``Atoms``."""

    expr: sympy.Expr


@dataclass(frozen=True)
class Truth:
    """A constant True or False."""

    value: bool


@dataclass(frozen=True)
class Relation:
    """``gap >= 0``, or ``gap == 0`` if ``equal``."""

    gap: sympy.Expr
    equal: bool = False


@dataclass(frozen=True)
class All:
    """Every part is true."""

    parts: tuple[Value, ...]


@dataclass(frozen=True)
class Some:
    """At least one part is true."""

    parts: tuple[Value, ...]


@dataclass(frozen=True)
class Negation:
    """The part is false."""

    part: Value


@dataclass(frozen=True)
class Where:
    """``yes`` where ``condition`` holds, else ``no``."""

    condition: Value
    yes: Value
    no: Value


@dataclass(frozen=True)
class Sum:
    """The sum of floats."""

    parts: tuple[Value, ...]


@dataclass(frozen=True)
class Element:
    """The element at ``index`` of the tensor that ``node`` computes, which the pullback does not resolve any further."""

    node: Node
    index: tuple[sympy.Expr, ...]


Value = Number | Truth | Relation | All | Some | Negation | Where | Sum | Element


Index = tuple[sympy.Expr, ...]


class Atoms:
    """Integers read from tensors, as opaque sympy terms. Equal elements give equal terms."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}

    def term(self, element: Element) -> sympy.Expr:
        """The term for an integer element: a symbol for a scalar, a function of its index otherwise."""
        name = f"@{element.node.name}"
        self.nodes[name] = element.node
        if not element.index:
            return sympy.Symbol(name, integer=True)
        return sympy.Function(name, integer=True)(*element.index)

    def node(self, term: sympy.Expr) -> Node | None:
        """The node a term reads, or None if the term is no atom."""
        name = str(term.func) if term.args else str(term)
        return self.nodes.get(name)


class Elements(Protocol):
    """The interface through which a rule pulls back its operands; see ``Pullback``."""

    def element(self, node: Any, index: Index) -> Value: ...

    def operand(self, node: Any, index: Index, result: tuple[Any, ...]) -> Value: ...

    def integer(self, node: Any) -> sympy.Expr | None: ...


# Expresses one element of the result of an operation by elements of its operands; None if the rule does not apply.
Rule = Callable[[Elements, Node, Index], Value | None]


def conjunction(parts: list[Value]) -> Value:
    """``All`` with constants folded."""
    if any(part == Truth(False) for part in parts):
        return Truth(False)
    parts = [p for part in parts for p in (part.parts if isinstance(part, All) else (part,)) if p != Truth(True)]
    return Truth(True) if not parts else parts[0] if len(parts) == 1 else All(tuple(parts))


def disjunction(parts: list[Value]) -> Value:
    """``Some`` with constants folded."""
    if any(part == Truth(True) for part in parts):
        return Truth(True)
    parts = [p for part in parts for p in (part.parts if isinstance(part, Some) else (part,)) if p != Truth(False)]
    return Truth(False) if not parts else parts[0] if len(parts) == 1 else Some(tuple(parts))


def negation(part: Value) -> Value:
    """``Negation`` with constants folded."""
    if isinstance(part, Truth):
        return Truth(not part.value)
    return part.part if isinstance(part, Negation) else Negation(part)


def relation(kind: str, a: sympy.Expr, b: sympy.Expr) -> Value:
    """``a kind b`` between integers, with constants folded."""
    if kind == "ne":
        return negation(relation("eq", a, b))
    gap = sympy.expand({"le": b - a, "lt": b - a - 1, "ge": a - b, "gt": a - b - 1, "eq": b - a}[kind])
    if gap.is_number:
        return Truth(bool(gap == 0 if kind == "eq" else gap >= 0))
    if kind != "eq" and (gap.is_nonnegative or gap.is_negative):  # transformers writes i >= 0 for "everything"
        return Truth(bool(gap.is_nonnegative))
    return Relation(gap, equal=kind == "eq")


def constant(value: Any) -> Value:
    """A Python number or bool as a value."""
    if isinstance(value, bool):
        return Truth(value)
    if isinstance(value, torch.SymInt):
        return Number(value.node.expr)
    if value != value or abs(value) == float("inf"):
        return Number(sympy.nan if value != value else sympy.oo * (1 if value > 0 else -1))
    # In sympy, 0.0 and 0 are different numbers, so whole floats become integers.
    return Number(sympy.Integer(int(value)) if value == int(value) else sympy.Float(value))
