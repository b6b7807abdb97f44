"""FlexAttention's FLASH backend (flash-attn-4): the fastest prefill under block tables on Hopper."""

from __future__ import annotations

from torch.fx import Node

from sparse_compile.masks import full
from sparse_compile.passes.choose import kernel_choice
from sparse_compile.passes.choose.block_layout import Layout, prefill_layout
from sparse_compile.passes.choose.named_mask import NamedMask
from sparse_compile.passes.choose.tuning import FLASH_TILES
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.kv_source import can_be_read_in_place
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.target import Target
from sparse_compile.passes.kernels.limits import HALF
from sparse_compile.passes.lower.emitter import Emitter
from sparse_compile.passes.lower.flex import lower_flex, no_flex_attention
from sparse_compile.passes.lower.kernel import Kernel
from sparse_compile.passes.ops.block_tables import BLOCK

# FLASH takes some 0.3 ms of Python to launch. Single calls on an H200:
#
# | queries | FLASH   | SDPA    |
# |---------|---------|---------|
# | 8K      | 1.17 ms | 0.97 ms |
# | 16K     | 3.50 ms | 3.54 ms |
FLASH_FROM = 12288


class Flash(Kernel):
    """flash-attn-4 under a block mask."""

    name, title = "flash", "FlexAttention FLASH"
    device = "cuda"
    realizes_captures = True

    def rank(self, call: Attention, target: Target) -> int | None:
        return None if can_be_read_in_place(call.kv) else 15

    def why_not(self, call: Attention, target: Target) -> str:
        return no_flex_attention(self, call, target) or _not_here(call, target) or _not_for(call, target)

    def layout(self, call: Attention, seen: NamedMask, target: Target) -> Layout:
        major, _ = target.capability or (9, 0)
        return prefill_layout(call, seen, FLASH_TILES[major][call.dims[0]], {"BACKEND": "FLASH"})

    def lower(self, call: Attention, emitter: Emitter) -> Node | Left:
        return lower_flex(call, emitter, self.layout(call, emitter.seen, emitter.scene.target))


def _not_here(call: Attention, target: Target) -> str:
    """What this installation, GPU or graph lacks."""
    if target.inner != "inductor":
        return f"inner={target.inner!r} does not reach FLASH"
    if target.gradients:
        return "FLASH is used without gradients"
    if not kernel_choice.flash_installed():
        return "flash-attn-4 is not installed: pip install --pre flash-attn-4"
    major = (target.capability or (0, 0))[0]
    if major not in FLASH_TILES:
        return f"FLASH needs a Hopper or Blackwell GPU, not compute capability {target.capability}"
    if target.is_free and major != 9:
        return "FLASH was measured on Hopper alone: kernel='flash' runs it here"
    return ""


def _not_for(call: Attention, target: Target) -> str:
    """What FLASH does not take of this call."""
    tiles, dims, at = FLASH_TILES[(target.capability or (9, 0))[0]], set(call.dims), call.positions
    if call.dtype not in HALF:
        return f"FLASH takes bfloat16 and float16, not {call.dtype}"
    if len(dims) > 1 or max(dims) not in tiles:
        return f"FLASH takes one head_dim of {', '.join(map(str, tiles))}, not {sorted(dims)}"
    if call.score_mod is not None:
        return f"FLASH is used without score mods, and this call has {call.score_mod}"
    lengths = all(isinstance(length, int) for length in (call.q_len, call.kv_len))
    if at.q_shift is not None or not (lengths and at.q_start.is_Integer and at.kv_start.is_Integer):
        return "FLASH is used with static lengths and positions"
    if call.is_step:
        return "FLASH has no kernel for one query"
    if call.selects and tiles[max(dims)] != (BLOCK, BLOCK):
        return f"page_topk chooses blocks of {BLOCK} queries and keys, and FLASH has {tiles[max(dims)]} at this head_dim"
    if call.visible == full:
        return "FLASH ignores block tables under a mask that shows everything (torch 2.11 to 2.13)"
    if call.visible.captures():
        return f"FLASH is used with masks that read no tensor, not {call.visible}"
    return ""
