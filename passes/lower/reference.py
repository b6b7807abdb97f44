"""The dense reference, which computes every score. It runs every call, and is the oracle of all other kernels."""

from __future__ import annotations

from torch.fx import Node

from sparse_compile.passes.choose.block_layout import Layout, dense_layout, selection_layout
from sparse_compile.passes.choose.named_mask import NamedMask
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.kv_source import Selected
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.target import Target
from sparse_compile.passes.lower.kernel import Kernel
from sparse_compile.passes.lower.nodes.emitter import Emitter
from sparse_compile.passes.lower.nodes.tables import seen_pairs
from sparse_compile.passes.ops.reference_attention import ReferenceAttention


class Reference(Kernel):
    """Attention under a dense mask tensor."""

    name, title = "reference", "dense reference"

    def rank(self, call: Attention, target: Target) -> int | None:
        return 100

    def why_not(self, call: Attention, target: Target) -> str:
        return ""

    def layout(self, call: Attention, seen: NamedMask, target: Target) -> Layout:
        return dense_or_selected(call, seen)

    def lower(self, call: Attention, emitter: Emitter) -> Node | Left:
        return lower_dense(call, emitter, self.layout(call, emitter.seen, emitter.scene.target))


def dense_or_selected(call: Attention, seen: NamedMask) -> Layout:
    """The layout of a kernel that reads a dense mask; for a decode step with page selection, that of the selected pages."""
    if isinstance(call.kv, Selected) and call.kv.new.is_step:
        return selection_layout(call, call.kv, seen)
    return dense_layout(call, seen)


def lower_dense(call: Attention, emitter: Emitter, layout: Layout) -> Node | Left:
    """Write the attention of the head group under a dense mask."""
    pairs = seen_pairs(emitter, layout)
    if isinstance(pairs, Left):
        return pairs
    module = ReferenceAttention(call.scale, call.score_mod)
    scores = emitter.score_captures()
    k, v = emitter.keys_values()
    return emitter.call_module(emitter.node, "attention", module, emitter.query(), k, v, pairs, *scores)
