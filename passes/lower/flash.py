"""FlexAttention's FLASH backend (flash-attn-4): the fastest prefill under block tables on Hopper."""

from __future__ import annotations

from sparse_compile.masks import full
from sparse_compile.passes.choose import kernel_choice
from sparse_compile.passes.choose.block_layout import Layout, prefill_layout
from sparse_compile.passes.choose.named_mask import NamedMask
from sparse_compile.passes.choose.tuning import FLASH_TILES
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.kv_source import can_be_read_in_place
from sparse_compile.passes.ir.target import Target
from sparse_compile.passes.kernels.limits import HALF
from sparse_compile.passes.lower.flex import FlexKernel, no_flex_attention
from sparse_compile.passes.ops.block_tables import BLOCK


class Flash(FlexKernel):
    """flash-attn-4 under a block mask."""

    name, title = "flash", "FlexAttention FLASH"
    device = "cuda"

    def rank(self, call: Attention, target: Target) -> int | None:
        return None if can_be_read_in_place(call.kv) else 15

    def why_not(self, call: Attention, target: Target) -> str:
        return no_flex_attention(self, call, target) or _not_here(call, target) or _not_for(call, target)

    def layout(self, call: Attention, seen: NamedMask, target: Target) -> Layout:
        major, _ = target.capability or (9, 0)
        return prefill_layout(call, seen, FLASH_TILES[major][call.dims[0]], {"BACKEND": "FLASH"})


def _not_here(call: Attention, target: Target) -> str:
    """What FLASH needs of the installation, the GPU or the graph, and does not have; empty if it has everything."""
    if target.inner != "inductor":
        return f"FLASH needs inner='inductor', not inner={target.inner!r}"
    if target.gradients:
        return "FLASH is not used for training: run the model under torch.no_grad()"
    if not kernel_choice.flash_installed():
        return "flash-attn-4 is not installed: pip install --pre flash-attn-4"
    major = (target.capability or (0, 0))[0]
    if major not in FLASH_TILES:
        return f"FLASH needs a Hopper or Blackwell GPU, not compute capability {target.capability}"
    if target.is_free and major != 9:
        return "FLASH was measured on Hopper only: force it here with kernel='flash'"
    return ""


def _not_for(call: Attention, target: Target) -> str:
    """Why FLASH cannot run this call; empty if it can."""
    tiles, dims, at = FLASH_TILES[(target.capability or (9, 0))[0]], set(call.dims), call.positions
    if call.dtype not in HALF:
        return f"FLASH needs bfloat16 or float16, not {call.dtype}"
    if len(dims) > 1 or max(dims) not in tiles:
        return f"FLASH needs one head_dim of {', '.join(map(str, tiles))}, not {sorted(dims)}"
    if call.score_mod is not None:
        return f"FLASH is not used with score mods, and this call has {call.score_mod}"
    lengths = all(isinstance(length, int) for length in (call.q_len, call.kv_len))
    if at.q_shift is not None or not (lengths and at.q_start.is_Integer and at.kv_start.is_Integer):
        return "FLASH needs lengths and positions that are known while compiling"
    if call.is_step:
        return "FLASH has no kernel for a single query"
    if call.selects and tiles[max(dims)] != (BLOCK, BLOCK):
        return f"page_topk needs blocks of {BLOCK} queries and keys, but FLASH has {tiles[max(dims)]} at this head_dim"
    if call.visible == full:
        return "FLASH ignores block tables if the mask shows every key (torch 2.11 to 2.13)"
    if call.visible.captures():
        return f"FLASH needs a mask that reads no tensor, not {call.visible}"
    return ""
