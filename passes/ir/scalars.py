"""Read the numbers of a graph that are the same in every run for which the graph holds."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node

from sparse_compile.passes.ir.fx_nodes import argument, op_name, value_of, writers

CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous"}

# The position of the number with which an operation fills a tensor.
FILLS = {"tensor": 0, "scalar_tensor": 0, "full": 1, "full_like": 1, "new_full": 2}


def number(value: Any) -> float | None:
    """The value of a scalar, or of every element of a tensor, that is known while compiling; None for anything else.

    ``dynamic=True`` makes float attributes of modules symbols. The graph then gets a guard on the value that is read here.
    """
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, Node):
        return None
    if op_name(value) in FILLS:
        fill: Any = argument(value, FILLS[op_name(value)], "fill_value")
        return number(fill) if fill is not None and not writers(value) else None
    if op_name(value) in CASTS:
        return number(value.args[0])
    return guarded(value_of(value))


def guarded(value: Any) -> float | None:
    """A Python number, or the value of a symbolic one, on which the graph then gets a guard; None for anything else.

    It is also None for a number that follows from lengths, such as ``log(length)``: a guard would compile every length anew.
    """
    if isinstance(value, torch.SymInt | torch.SymFloat):
        follows = any(symbol.is_integer for symbol in value.node.expr.free_symbols)
        return None if follows or value.node.hint is None else float(value)
    return float(value) if isinstance(value, int | float) else None


def fixed(size: Any) -> int | None:
    """A size that must be the same in every run, on which the graph then gets a guard; None if it is known at run time only."""
    if isinstance(size, torch.SymInt) and size.node.hint is None:
        return None
    return int(size)


def without_exact_divisions(expr: sympy.Expr) -> sympy.Expr:
    """Write divisions of sizes that have no remainder without a division: ``s**2 // s`` as ``s``.

    Torch gives two sizes that are equal one symbol, such as a batch of three texts of three tokens.
    """

    def divided(division: sympy.Expr) -> sympy.Expr:
        quotient = sympy.cancel(division.args[0] / division.args[1])
        exact = quotient.is_polynomial() and all(number.is_Integer for number in sympy.Poly(quotient).coeffs())
        return quotient if exact else division

    return expr.replace(lambda part: type(part).__name__ == "FloorDiv", divided)
