"""FlexAttention's C++ kernels, on CPU."""

from __future__ import annotations

import torch

from sparse_compile.masks.score_mods import SinkLogits
from sparse_compile.passes.choose.block_layout import Layout, prefill_layout, selection_layout
from sparse_compile.passes.choose.named_mask import NamedMask
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.kv_source import Selected
from sparse_compile.passes.ir.target import Target
from sparse_compile.passes.kernels.limits import HALF
from sparse_compile.passes.lower.flex import FlexKernel, no_flex_attention
from sparse_compile.passes.ops.block_tables import BLOCK
from sparse_compile.passes.torch_private import cpu_has_avx2


class Cpp(FlexKernel):
    """FlexAttention's C++ kernels."""

    name, title = "cpp", "FlexAttention"
    aliases = ("flex",)
    device = "cpu"
    takes_any_mask = True

    def rank(self, call: Attention, target: Target) -> int | None:
        return 20

    def why_not(self, call: Attention, target: Target) -> str:
        return no_flex_attention(self, call, target) or _not_in_cpp(call, target)

    def layout(self, call: Attention, seen: NamedMask, target: Target) -> Layout:
        if isinstance(call.kv, Selected) and call.kv.new.is_step:
            return selection_layout(call, call.kv, seen, every_column=True)
        return prefill_layout(call, seen, (BLOCK, BLOCK), {}, every_column=True)


def _not_in_cpp(call: Attention, target: Target) -> str:
    if target.gradients:
        return "FlexAttention has no gradients on CPU"
    if call.score_mod is not None and isinstance(call.score_mod.parts()[-1], SinkLogits):
        return "learned sinks need the log-sum-exp, which FlexAttention does not return on CPU"
    if not cpu_has_avx2():
        return "FlexAttention needs AVX2 on CPU"
    if call.dtype not in (torch.float32, *HALF):
        return f"FlexAttention needs float32, bfloat16 or float16 on CPU, not {call.dtype}"
    return ""
