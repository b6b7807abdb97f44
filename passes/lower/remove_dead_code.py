"""Erase the nodes that only replaced attention calls needed."""

from __future__ import annotations

from sparse_compile.passes.ir.fx_emit import erase_dead
from sparse_compile.passes.ir.rewrite import Rewrite


def remove_dead_code(rewrite: Rewrite) -> int:
    """Erase nodes that only replaced calls needed, such as dense masks and repeated keys; returns how many."""
    erased = erase_dead(rewrite.gm, rewrite.replaced)
    if rewrite.replaced:
        rewrite.gm.graph.lint()
        rewrite.gm.recompile()
    return erased
