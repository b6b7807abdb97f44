"""Read the numbers of a graph that are the same in every run for which the graph holds."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from sparse_compile.passes.ir.fx_nodes import argument, op_name, shape_of, value_of

CASTS = {"to", "type", "type_as", "float", "double", "half", "bfloat16", "contiguous"}


def number(value: Any) -> float | None:
    """The value of a scalar that is known while compiling; None for anything else.

    ``dynamic=True`` makes float attributes of modules symbols. The graph then gets a guard on the value that is read here.
    """
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, Node):
        return None
    if op_name(value) in ("tensor", "full", "scalar_tensor"):
        fill: Any = argument(value, 1, "fill_value") if op_name(value) == "full" else value.args[0]
        return number(fill) if (shape_of(value) or ()) == () else None
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
