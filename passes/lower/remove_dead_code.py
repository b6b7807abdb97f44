"""Erase what only replaced attention calls needed."""

from __future__ import annotations

from sparse_compile.passes.ir.fx_emit import erase_dead
from sparse_compile.passes.ir.rewrite import Rewrite


def remove_dead_code(rewrite: Rewrite) -> int:
    """Erase what the replaced calls alone needed: dense masks, repeated keys and values."""
    erased = erase_dead(rewrite.gm, rewrite.replaced)
    if rewrite.replaced:
        rewrite.gm.graph.lint()
        rewrite.gm.recompile()
    return erased
