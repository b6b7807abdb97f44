"""Pullback rules of operations that compute elements: casts, comparisons, logic, arithmetic, selection, constants, sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from sparse_compile.passes.ir.fx_nodes import argument, op_name, result_shape, value_of
from sparse_compile.passes.lift.symbolic_element import (
    All,
    Element,
    Elements,
    Index,
    Negation,
    Number,
    Relation,
    Rule,
    Some,
    Sum,
    Truth,
    Value,
    Where,
    conjunction,
    constant,
    disjunction,
    negation,
    relation,
)

COMPARISONS = {"le", "lt", "ge", "gt", "eq", "ne"}
CASTS = {"to", "type", "type_as", "bool", "int", "long", "float", "half", "bfloat16"}
CONSTANTS = {"ones": 1, "zeros": 0, "new_ones": 1, "new_zeros": 0, "ones_like": 1, "zeros_like": 0}


def _cast(pull: Elements, node: Node, index: Index) -> Value | None:
    source = node.args[0]
    old, new = value_of(source), value_of(node)
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return None
    if old.dtype == new.dtype:
        return pull.element(source, index)
    inner = pull.element(source, index)
    if isinstance(inner, Element):
        return None  # keep the cast: the mask looks up its result
    if new.dtype == torch.bool:
        looked_up = isinstance(inner, Number) and inner.expr.has(sympy.Function)  # keep this cast as well
        return None if looked_up else _comparison("ne", inner, Number(sympy.Integer(0)))
    if old.dtype == torch.bool:
        return Where(inner, Number(sympy.Integer(1)), Number(sympy.Integer(0)))
    if new.dtype.is_floating_point == old.dtype.is_floating_point:
        return inner
    return None


def _compare(pull: Elements, node: Node, index: Index) -> Value | None:
    a, b = (pull.operand(arg, index, result_shape(node)) for arg in node.args[:2])
    return _comparison(op_name(node), a, b)


def _comparison(kind: str, a: Value, b: Value) -> Value | None:
    if isinstance(a, Number) and isinstance(b, Number):
        return relation(kind, a.expr, b.expr)
    if isinstance(a, Where) and isinstance(b, Number):  # mask < -1, over a mask of zeros and large negative numbers
        yes, no = _comparison(kind, a.yes, b), _comparison(kind, a.no, b)
        return None if yes is None or no is None else _choose(a.condition, yes, no)
    return None


def _logic(join: Callable[[list[Value]], Value]) -> Callable[[Elements, Node, Index], Value | None]:
    def rule(pull: Elements, node: Node, index: Index) -> Value | None:
        if value_of(node).dtype != torch.bool:
            return None
        return join([pull.operand(arg, index, result_shape(node)) for arg in node.args[:2]])

    return rule


def _not(pull: Elements, node: Node, index: Index) -> Value | None:
    if value_of(node).dtype != torch.bool:
        return None
    inner = pull.element(node.args[0], index)
    return negation(relation("ne", inner.expr, sympy.Integer(0)) if isinstance(inner, Number) else inner)


def _arithmetic(pull: Elements, node: Node, index: Index) -> Value | None:
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) < 2:
        return None
    a, b = (pull.operand(arg, index, result_shape(node)) for arg in node.args[:2])
    if op_name(node) == "rsub":
        return _combine("sub", b, a)
    return _combine(op_name(node), a, b)


def _combine(kind: str, a: Value, b: Value) -> Value | None:
    if isinstance(a, Number) and isinstance(b, Number):
        return _arithmetic_of_numbers(kind, a.expr, b.expr)
    for one, other, left in ((a, b, True), (b, a, False)):
        if isinstance(one, Where) and isinstance(other, Number) and other.expr.is_number:
            # 1 - mask, (1 - mask) * -inf and the like: apply the operation to both outcomes.
            yes = _combine(kind, one.yes, other) if left else _combine(kind, other, one.yes)
            no = _combine(kind, one.no, other) if left else _combine(kind, other, one.no)
            return Where(one.condition, yes, no) if yes is not None and no is not None else None
    if kind == "add" and not isinstance(a, All | Some | Negation | Relation | Truth):
        parts = [p for x in (a, b) for p in (x.parts if isinstance(x, Sum) else (x,)) if p != Number(sympy.Integer(0))]
        return Sum(tuple(parts))
    return None


def _arithmetic_of_numbers(kind: str, a: sympy.Expr, b: sympy.Expr) -> Value | None:
    if kind == "mul" and 0 in (a, b) and (a.is_infinite or b.is_infinite):
        return None  # 0 * inf is NaN, in the model as well
    results: dict[str, Callable[[], sympy.Expr]] = {
        "add": lambda: a + b,
        "sub": lambda: a - b,
        "mul": lambda: a * b,
        "floordiv": lambda: sympy.floor(a / b),
        "floor_divide": lambda: sympy.floor(a / b),
        "mod": lambda: sympy.Mod(a, b),
        "remainder": lambda: sympy.Mod(a, b),
    }
    return Number(sympy.expand(results[kind]())) if kind in results else None


def _negative(pull: Elements, node: Node, index: Index) -> Value | None:
    inner = pull.element(node.args[0], index)
    return Number(-inner.expr) if isinstance(inner, Number) else None


def _absolute(pull: Elements, node: Node, index: Index) -> Value | None:
    inner = pull.element(node.args[0], index)
    return Number(sympy.Abs(inner.expr)) if isinstance(inner, Number) else None


def _clamp(pull: Elements, node: Node, index: Index) -> Value | None:
    inner = pull.element(node.args[0], index)
    ends = [argument(node, 1, "min"), argument(node, 2, "max")]
    low, high = (pull.integer(end) for end in ends)
    if not isinstance(inner, Number) or [low is None, high is None] != [end is None for end in ends]:
        return None
    raised = inner.expr if low is None else sympy.Max(inner.expr, low)
    return Number(raised if high is None else sympy.Min(raised, high))


def _where(pull: Elements, node: Node, index: Index) -> Value | None:
    if len(node.args) != 3:
        return None
    condition, yes, no = (pull.operand(arg, index, result_shape(node)) for arg in node.args)
    return _choose(condition, yes, no)


def _masked_fill(pull: Elements, node: Node, index: Index) -> Value | None:
    unfilled, condition, fill = (pull.operand(arg, index, result_shape(node)) for arg in node.args)
    return _choose(condition, fill, unfilled)


def _choose(condition: Value, yes: Value, no: Value) -> Value:
    if isinstance(condition, Truth):
        return yes if condition.value else no
    yes, no = _given(condition, yes), _given(negation(condition), no)
    if isinstance(yes, Truth) or isinstance(no, Truth):
        return disjunction([conjunction([condition, yes]), conjunction([negation(condition), no])])
    return Where(condition, yes, no)


def _given(condition: Value, value: Value) -> Value:
    """``value``, simplified for the elements where ``condition`` holds."""
    if isinstance(value, Where):
        if value.condition == condition:
            return value.yes
        if value.condition == negation(condition):
            return value.no
    return value


def _fill(pull: Elements, node: Node, index: Index) -> Value | None:
    name = op_name(node)
    if name in CONSTANTS:
        fill: Any = CONSTANTS[name]
    elif name in ("full", "full_like", "new_full"):
        fill = argument(node, 2 if name == "new_full" else 1, "fill_value")
    else:
        fill = node.args[0]
    if isinstance(fill, Node) or not isinstance(fill, bool | int | float):
        return None
    return Truth(bool(fill)) if value_of(node).dtype == torch.bool else constant(fill)


def _triangle(pull: Elements, node: Node, index: Index) -> Value | None:
    diagonal = pull.integer(argument(node, 1, "diagonal", 0))
    if diagonal is None or len(index) < 2:
        return None
    row, column = index[-2:]
    kind = "le" if op_name(node).startswith("tril") else "ge"
    inside = relation(kind, column, row + diagonal)
    element = pull.element(node.args[0], index)
    if value_of(node).dtype == torch.bool:
        return conjunction([element, inside])
    return _choose(inside, element, Number(sympy.Integer(0)))


def _diff(pull: Elements, node: Node, index: Index) -> Value | None:
    """Differences of neighbors, if they are equal everywhere: 1 for positions that count up."""
    prepend, dim = argument(node, 3, "prepend"), argument(node, 2, "dim", -1)
    if argument(node, 1, "n", 1) != 1 or argument(node, 4, "append") is not None:
        return None
    dim = dim % len(index)
    at, before = list(index), list(index)
    before[dim] = index[dim] - 1
    if prepend is None:
        at[dim], before[dim] = index[dim] + 1, index[dim]
    a, b = pull.element(node.args[0], tuple(at)), pull.element(node.args[0], tuple(before))
    if not isinstance(a, Number) or not isinstance(b, Number):
        return None
    step = sympy.expand(a.expr - b.expr)
    if not step.is_number:
        return None
    if prepend is not None:
        first = list(index)
        first[dim] = sympy.Integer(0)
        p, q = pull.element(node.args[0], tuple(first)), pull.element(prepend, tuple(first))
        if not isinstance(p, Number) or not isinstance(q, Number) or sympy.expand(p.expr - q.expr) != step:
            return None
    return Number(step)


def _cumsum(pull: Elements, node: Node, index: Index) -> Value | None:
    """Running sums of a tensor whose elements are all equal."""
    inner = pull.element(node.args[0], index)
    if isinstance(inner, Truth):
        inner = Number(sympy.Integer(int(inner.value)))
    if not isinstance(inner, Number) or not inner.expr.is_number:
        return None
    return Number(inner.expr * (index[argument(node, 1, "dim") % len(index)] + 1))


COMPUTES: dict[str, Rule] = {
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys(COMPARISONS, _compare),
    **dict.fromkeys(("and_", "logical_and", "bitwise_and", "and"), _logic(conjunction)),
    **dict.fromkeys(("or_", "logical_or", "bitwise_or", "or"), _logic(disjunction)),
    **dict.fromkeys(("invert", "logical_not", "bitwise_not"), _not),
    **dict.fromkeys(("add", "sub", "rsub", "mul", "floordiv", "floor_divide", "mod", "remainder"), _arithmetic),
    "neg": _negative,
    "abs": _absolute,
    "clamp": _clamp,
    "where": _where,
    "masked_fill": _masked_fill,
    **dict.fromkeys((*CONSTANTS, "full", "full_like", "new_full", "tensor", "scalar_tensor"), _fill),
    **dict.fromkeys(("tril", "triu"), _triangle),
    "diff": _diff,
    "cumsum": _cumsum,
}
