"""Recover the mask, the score mod and the positions of every call."""

from __future__ import annotations

from dataclasses import replace

from sparse_compile.masks import causal
from sparse_compile.passes.ir.attention_call import AttentionCall, Left
from sparse_compile.passes.ir.fx_nodes import Order
from sparse_compile.passes.ir.rewrite import Rewrite
from sparse_compile.passes.lift.lift_mask import lift_call


def lift_masks(rewrite: Rewrite) -> int:
    """Recover the mask, the score mod and the positions of every call."""
    order = Order(rewrite.gm.graph)
    rewrite.keep([_settled(lift_call(call, order)) for call in rewrite.calls])
    return 0


def _settled(call: AttentionCall | Left) -> AttentionCall | Left:
    """Attention that compares query and key positions is over one text, wherever its operands come from."""
    if isinstance(call, AttentionCall) and call.mask is not None and call.mask.implies(causal):
        return replace(call, is_self_attention=True)
    return call
