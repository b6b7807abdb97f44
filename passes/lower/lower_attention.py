"""Replace every attention call by the kernel that runs it."""

from __future__ import annotations

from torch.fx import Node

from sparse_compile.passes.choose.head_groups import parts_of
from sparse_compile.passes.ir.attention_call import AttentionCall, Left
from sparse_compile.passes.ir.rewrite import Part, Rewrite
from sparse_compile.passes.ir.target import Target
from sparse_compile.passes.lower.lower_call import lower_call
from sparse_compile.passes.lower.paged import in_one_launch


def lower_attention(rewrite: Rewrite) -> int:
    """Replace every call by a module that runs it, with tables shared between calls of equal mask and shape."""
    shared: dict[object, Node] = {}
    lowered: list[AttentionCall] = []
    for call in rewrite.calls:
        done: list[Part] = []
        outs: list[Node] = []
        for piece in call.pieces or (call,):
            parts = parts_of(piece, rewrite.target)
            run = parts_of(piece, Target(inner="eager")) if rewrite.dry else parts
            result = lower_call(rewrite.gm, piece, run, rewrite.target, shared)
            if isinstance(result, Left):
                rewrite.left.append(result)
                break
            done += parts
            outs.append(result)
            rewrite.replaced.append(piece.node)
        else:
            rewrite.parts[call.node] = done
            in_one_launch(call, outs)
            rewrite.replaced.append(call.node)
            lowered.append(call)
    rewrite.calls = lowered
    return len(lowered)
