"""``scaled_dot_product_attention`` without a mask tensor. On CPU, a decode step also runs with a single row of a mask."""

from __future__ import annotations

from typing import Any

from torch.fx import Node
from torch.nn.functional import scaled_dot_product_attention

from sparse_compile.masks.patterns.per_head import PerHead
from sparse_compile.passes.choose import tuning
from sparse_compile.passes.choose.block_layout import Layout
from sparse_compile.passes.choose.named_mask import NamedMask
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_emit import inline
from sparse_compile.passes.ir.fx_nodes import hint_of
from sparse_compile.passes.ir.kv_source import can_be_read_in_place
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.target import Target
from sparse_compile.passes.kernels.limits import HALF, LARGEST_HEAD
from sparse_compile.passes.lower.kernel import Kernel, needs_device
from sparse_compile.passes.lower.nodes.emitter import Emitter
from sparse_compile.passes.lower.reference import dense_or_selected, lower_dense


class SDPA(Kernel):
    """torch's own fused kernels, including cuDNN."""

    name, title = "sdpa", "SDPA"
    reads_mask = False

    def rank(self, call: Attention, target: Target) -> int | None:
        if target.device_of(call) == "cpu":
            # A dense mask of one row costs less than tables, unless a policy skips most keys of every head.
            return 30 if _skips(call) and call.plain_form is None else 10
        if can_be_read_in_place(call.kv):
            return None
        is_short = hint_of(call.q_len) < tuning.FLASH_FROM
        return 10 if call.is_step or (is_short and call.plain_form is not None) else 20

    def why_not(self, call: Attention, target: Target) -> str:
        if reason := needs_device(self, call, target):
            return reason
        if call.score_mod is not None:
            return f"SDPA has no score mods, and this call has {call.score_mod}"
        device = target.device_of(call)
        if call.plain_form is None and not (device == "cpu" and call.is_step):
            return f"SDPA needs a dense mask for {call.visible}"
        return no_fused_kernel(call, target) if device == "cuda" else ""

    def layout(self, call: Attention, seen: NamedMask, target: Target) -> Layout:
        return dense_or_selected(call, seen)

    def lower(self, call: Attention, emitter: Emitter) -> Node | Left:
        if call.plain_form is None:
            return lower_dense(call, emitter, self.layout(call, emitter.seen, emitter.scene.target))
        is_causal, grouped = call.plain_form == "causal", call.group > 1

        def attend(q: Any, k: Any, v: Any) -> Any:
            return scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=call.scale, enable_gqa=grouped)

        out: Node = inline(emitter.node, attend, emitter.query(), *emitter.keys_values())
        return out


def _skips(call: Attention) -> bool:
    """Whether a policy skips most keys of every head."""
    return call.chooses_pages or (call.has_policy and not any(isinstance(node, PerHead) for node in call.visible.walk()))


def no_fused_kernel(call: Attention, target: Target) -> str:
    """Why SDPA has no fused kernel; empty if it has. Without one, it computes all scores at once and repeats KV heads."""
    dims = set(call.dims)
    if call.dtype not in HALF:
        return f"SDPA's fused kernels need bfloat16 or float16, not {call.dtype}"
    if len(dims) > 1 or max(dims) > LARGEST_HEAD or max(dims) % 8:
        return f"SDPA's fused kernels need one head_dim, a multiple of 8 up to {LARGEST_HEAD}, not {sorted(dims)}"
    if target.capability is not None and target.capability < (8, 0):
        return f"SDPA's fused kernels need compute capability (8, 0) or later, not {target.capability}"
    return ""
