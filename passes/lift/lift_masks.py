"""Recover the mask, the score mod and the positions of every call."""

from __future__ import annotations

from sparse_compile.passes.ir.fx_nodes import Order
from sparse_compile.passes.ir.rewrite import Rewrite
from sparse_compile.passes.lift.lift_mask import lift_call


def lift_masks(rewrite: Rewrite) -> int:
    """Turn every ``WrittenCall`` into an ``Attention``; returns how many could be lifted."""
    order = Order(rewrite.gm.graph)
    rewrite.keep([lift_call(call, order) for call in rewrite.written])
    return len(rewrite.calls)
