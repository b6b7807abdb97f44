"""Pullback rules of operations that move elements: slicing, broadcasting, reshaping, transposing."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from sparse_compile.passes.ir.fx_nodes import argument, expr_of, is_one, result_shape, shape_of, value_of
from sparse_compile.passes.lift.symbolic_element import Elements, Index, Number, Rule, Value


def _arange(pull: Elements, node: Node, index: Index) -> Value | None:
    bounds = list(node.args)
    start, step = sympy.Integer(0), sympy.Integer(1)
    if "end" in node.kwargs:
        start = pull.integer(node.kwargs.get("start", 0))
    elif len(bounds) > 1:
        start = pull.integer(bounds[0])
    if len(bounds) > 2 or "step" in node.kwargs:
        step = pull.integer(argument(node, 2, "step"))
    if start is None or step is None or value_of(node).dtype.is_floating_point:
        return None
    return Number(sympy.expand(start + step * index[0]))


def _getitem(pull: Elements, node: Node, index: Index) -> Value | None:
    base, key = node.args[0], node.args[1]
    shape = shape_of(base) if isinstance(base, Node) else None
    if shape is None:
        return None
    keys = list(key) if isinstance(key, tuple | list) else [key]
    indexed = sum(k is not None and k is not Ellipsis for k in keys)
    if Ellipsis in [k for k in keys if not isinstance(k, Node)]:
        at = next(n for n, k in enumerate(keys) if k is Ellipsis)
        keys[at : at + 1] = [slice(None)] * (len(shape) - indexed)
    else:
        keys += [slice(None)] * (len(shape) - indexed)
    tensors = [k for k in keys if isinstance(k, Node) and shape_of(k) is not None]
    if tensors:
        return _gather(pull, base, keys, tensors, index, result_shape(node))
    at_base: list[sympy.Expr] = []
    axis, place = 0, 0
    for k in keys:
        if k is None:
            place += 1
        elif isinstance(k, slice):
            start = _slice_start(k, shape[axis])
            if start is None:
                return None
            at_base.append(sympy.expand(index[place] + start))
            axis, place = axis + 1, place + 1
        else:
            picked = pull.integer(k)
            if picked is None:
                return None
            at_base.append(picked + expr_of(shape[axis]) if picked.is_negative else picked)
            axis += 1
    return pull.element(base, tuple(at_base))


def _slice_start(key: slice, size: Any) -> sympy.Expr | None:
    """Where a slice starts; None for a step other than 1, or a start that may be negative or is no number."""
    if key.step not in (None, 1):
        return None
    start = key.start or 0
    if isinstance(start, Node):
        value = value_of(start)
        return value.node.expr if isinstance(value, torch.SymInt) and value.node.expr.is_nonnegative else None
    if start >= 0:
        return sympy.Integer(start)
    return expr_of(size) + start if isinstance(size, int) and size + start >= 0 else None


def _gather(
    pull: Elements, base: Any, keys: list[Any], tensors: list[Node], index: Index, result: tuple[Any, ...]
) -> Value | None:
    """``base[t0, t1]``: advanced indexing of every axis by tensors that broadcast to the result."""
    if len(tensors) != len(keys) or len(keys) != len(shape_of(base) or ()):
        return None
    values = [pull.operand(t, index, result) for t in tensors]
    exprs = [value.expr for value in values if isinstance(value, Number)]
    # Negative indices count from the end, and i - j may be negative. Integers read from a tensor are assumed to be positions.
    if len(exprs) != len(values) or any(t.could_extract_minus_sign() for e in exprs for t in sympy.Add.make_args(e)):
        return None
    return pull.element(base, tuple(exprs))


def _unsqueeze(pull: Elements, node: Node, index: Index) -> Value | None:
    at = argument(node, 1, "dim")
    at = at + len(index) if at < 0 else at
    return pull.element(node.args[0], index[:at] + index[at + 1 :])


def _expand(pull: Elements, node: Node, index: Index) -> Value | None:
    return pull.operand(node.args[0], index, result_shape(node))


def _repeat(pull: Elements, node: Node, index: Index) -> Value | None:
    """``repeat`` along axes of size 1 and along new axes."""
    assert isinstance(node.args[0], Node)
    counts = list(node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:])
    shape = result_shape(node.args[0])
    new = len(counts) - len(shape)
    if any(count != 1 and not is_one(size) for count, size in zip(counts[new:], shape, strict=True)):
        return None
    return pull.element(
        node.args[0], tuple(sympy.Integer(0) if is_one(s) else x for s, x in zip(shape, index[new:], strict=True))
    )


def _reshape(pull: Elements, node: Node, index: Index) -> Value | None:
    """A reshape that only adds or removes axes of size 1."""
    assert isinstance(node.args[0], Node)
    old, new = shape_of(node.args[0]), shape_of(node)
    if old is None or new is None:
        return None
    wide_old = [s for s in old if not is_one(s)]
    wide_new = [(s, x) for s, x in zip(new, index, strict=True) if not is_one(s)]
    if [expr_of(s) for s in wide_old] != [expr_of(s) for s, _ in wide_new]:
        return None
    rest = iter([x for _, x in wide_new])
    return pull.element(node.args[0], tuple(sympy.Integer(0) if is_one(s) else next(rest) for s in old))


def _transpose(pull: Elements, node: Node, index: Index) -> Value | None:
    a, b = argument(node, 1, "dim0"), argument(node, 2, "dim1")
    swapped = list(index)
    swapped[a], swapped[b] = swapped[b], swapped[a]
    return pull.element(node.args[0], tuple(swapped))


def _permute(pull: Elements, node: Node, index: Index) -> Value | None:
    order = node.args[1:] if isinstance(node.args[1], int) else argument(node, 1, "dims")
    back: list[Any] = [None] * len(index)
    for new, old in enumerate(order):
        back[old] = index[new]
    return pull.element(node.args[0], tuple(back))


def _same(pull: Elements, node: Node, index: Index) -> Value | None:
    return pull.element(node.args[0], index)


SAME_ELEMENTS = {"contiguous", "clone", "detach", "alias"}
MOVES: dict[str, Rule] = {
    "arange": _arange,
    "getitem": _getitem,
    "unsqueeze": _unsqueeze,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    "repeat": _repeat,
    **dict.fromkeys(("view", "reshape", "squeeze", "flatten"), _reshape),
    **dict.fromkeys(("transpose", "swapaxes"), _transpose),
    "permute": _permute,
    **dict.fromkeys(SAME_ELEMENTS, _same),
}
