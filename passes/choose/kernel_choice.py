"""Which kernel runs a call, or a group of its heads, and why."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch

from sparse_compile.masks import Mask, causal, full
from sparse_compile.masks.patterns.per_head import PerHead
from sparse_compile.masks.score_mods import SinkLogits
from sparse_compile.masks.selection.page_topk import has_selector, offered
from sparse_compile.passes.choose.tuning import FLASH_TILES
from sparse_compile.passes.ir.attention_call import AttentionCall, is_decode_step, plain_form
from sparse_compile.passes.ir.fx_nodes import hint_of, value_of
from sparse_compile.passes.ir.target import Kernel, Target
from sparse_compile.passes.kernels.limits import (
    LARGEST_HEAD,
    MOST_GROUPS,
    MOST_KV_HEADS,
    SMALLEST_GROUP,
    SMALLEST_HEAD,
    SMALLEST_PAGE,
)
from sparse_compile.passes.ops.block_tables import BLOCK
from sparse_compile.passes.torch_private import cpu_has_avx2

HALF = (torch.bfloat16, torch.float16)
# FLASH takes some 0.3 ms of Python to launch: single calls on an H200 take 1.17 ms against SDPA's 0.97 at 8K, and 3.50 against
# 3.54 at 16K.
FLASH_FROM = 12288
FLEX = ("flash", "triton", "cpp")  # the kernels that FlexAttention generates


def choose_kernel(call: AttentionCall, mask: Mask, target: Target) -> Kernel:
    """The fastest kernel that runs ``call`` under ``mask``, measured by ``bench``; the dense reference if there is no other.

    Raises ``ValueError`` with the reason if ``target`` demands a kernel that cannot run the call.
    """
    wanted = target.kernel
    if wanted == "reference":
        return Kernel("reference", "asked for")
    if wanted not in ("auto", "autotune"):
        name = _flex_name(call, target) if wanted == "flex" else wanted
        why = _forbids(name, call, mask, target)
        if why:
            raise ValueError(f"kernel={wanted!r} cannot run {call.module or call.node.name}: {why}; use kernel='auto'")
        return Kernel(name)
    if target.inner == "eager":
        return Kernel("reference", "inner='eager' has no FlexAttention kernels")
    for name in _order(call, mask, target):
        if not _forbids(name, call, mask, target):
            return Kernel(name)
    return Kernel("reference", _forbids(_flex_name(call, target), call, mask, target))


def _order(call: AttentionCall, mask: Mask, target: Target) -> tuple[str, ...]:
    if target.device_of(call) == "cpu":
        # One dense row of a mask costs less than tables, unless a policy skips most keys of every head.
        skips = call.scored is not None or (call.policy is not None and not any(isinstance(n, PerHead) for n in mask.walk()))
        return ("cpp", "sdpa") if skips and not plain_form(call, mask) else ("sdpa", "cpp")
    # On Blackwell nobody measured FLASH here: it runs if it is asked for by name.
    flash = ("flash",) if target.capability is not None and target.capability[0] == 9 else ()
    short = hint_of(call.size("q", 2)) < FLASH_FROM
    if call.scored is not None or call.ring is not None or (call.kept is not None and is_decode_step(call)):
        return "pages", "triton"
    dense_first = is_decode_step(call) or (short and plain_form(call, mask) is not None)
    return ("sdpa", *flash, "triton") if dense_first else (*flash, "sdpa", "triton")


def _flex_name(call: AttentionCall, target: Target) -> str:
    return "cpp" if target.device_of(call) == "cpu" else "triton"


def _forbids(name: str, call: AttentionCall, mask: Mask, target: Target) -> str:
    """Why ``name`` cannot run ``call``; empty if it can."""
    device = target.device_of(call)
    if target.inner == "eager" and name != "reference":
        return "inner='eager' has no FlexAttention kernels"
    if name in FLEX and target.inner != "inductor" and target.gradients:
        return f"inner={target.inner!r} has no gradients of FlexAttention"
    if name in ("triton", "flash", "pages") and device != "cuda":
        return f"{name} needs CUDA, and the call runs on {device}"
    if name == "cpp" and device != "cpu":
        return f"FlexAttention has no kernels for {device}"
    rules = {"sdpa": _not_sdpa, "flash": _not_flash, "triton": _not_triton, "cpp": _not_cpp, "pages": _not_pages}
    return rules[name](call, mask, target)


def _not_sdpa(call: AttentionCall, mask: Mask, target: Target) -> str:
    if call.score_mod is not None:
        return f"SDPA has no score mods, and this call has {call.score_mod}"
    device = target.device_of(call)
    if plain_form(call, mask) is None and not (device == "cpu" and is_decode_step(call)):
        return f"SDPA needs a dense mask for {mask}"
    if device != "cuda":
        return ""
    # Without one of its fused kernels SDPA writes out all scores, and repeats the KV heads.
    dtype, dims = value_of(call.q).dtype, {hint_of(call.size(x, 3)) for x in ("q", "k", "v")}
    if dtype not in HALF:
        return f"SDPA's fused kernels take bfloat16 and float16, not {dtype}"
    if len(dims) > 1 or max(dims) > LARGEST_HEAD or max(dims) % 8:
        return f"SDPA's fused kernels take one head_dim of at most {LARGEST_HEAD}, a multiple of 8, not {sorted(dims)}"
    if target.capability is not None and target.capability < (8, 0):
        return f"SDPA's fused kernels need compute capability 8.0, not {target.capability}"
    return ""


def _not_flash(call: AttentionCall, mask: Mask, target: Target) -> str:
    if target.inner != "inductor":
        return f"inner={target.inner!r} does not reach FLASH"
    if target.gradients:
        return "FLASH is used without gradients"
    if not flash_installed():
        return "flash-attn-4 is not installed: pip install --pre flash-attn-4"
    tiles = FLASH_TILES.get((target.capability or (0, 0))[0])
    if tiles is None:
        return f"FLASH needs a Hopper or Blackwell GPU, not compute capability {target.capability}"
    dtype, dims = value_of(call.q).dtype, {hint_of(call.size(x, 3)) for x in ("q", "k", "v")}
    if dtype not in HALF:
        return f"FLASH takes bfloat16 and float16, not {dtype}"
    if len(dims) > 1 or max(dims) not in tiles:
        return f"FLASH takes one head_dim of {', '.join(map(str, tiles))}, not {sorted(dims)}"
    if call.score_mod is not None:
        return f"FLASH is used without score mods, and this call has {call.score_mod}"
    at = call.positions
    assert at is not None
    static = all(isinstance(call.size(x, 2), int) for x in ("q", "k")) and at.q_start.is_Integer and at.kv_start.is_Integer
    if at.q_shift is not None or not static:
        return "FLASH is used with static lengths and positions"
    if is_decode_step(call):
        return "FLASH has no kernel for one query"
    if has_selector(mask) and tiles[max(dims)] != (BLOCK, BLOCK):
        return f"page_topk chooses blocks of {BLOCK} queries and keys, and FLASH has {tiles[max(dims)]} at this head_dim"
    if mask == full:
        return "FLASH ignores block tables under a mask that shows everything (torch 2.11 to 2.13)"
    if mask.captures():
        return f"FLASH is used with masks that read no tensor, not {mask}"
    return ""


def _not_triton(call: AttentionCall, mask: Mask, target: Target) -> str:
    smallest = min(hint_of(call.size("q", 3)), hint_of(call.size("v", 3)))
    if smallest < SMALLEST_HEAD:
        return f"FlexAttention needs a head_dim of at least {SMALLEST_HEAD} on CUDA, not {smallest}"
    page = call.scored.selecting.page_size if call.scored is not None else BLOCK
    if page < SMALLEST_PAGE or page & (page - 1):
        return f"FlexAttention visits pages of a power of two from {SMALLEST_PAGE} on on CUDA, not of {page}"
    return ""


def _not_pages(call: AttentionCall, mask: Mask, target: Target) -> str:
    if call.scored is None and call.ring is None and (call.kept is None or not is_decode_step(call)):
        return "the kernel over pages reads rings, chosen pages and encoded pages of a SparseCache in a decode step"
    if call.ring is None and (call.score_mod is not None or offered(mask) != causal):
        return f"the kernel over pages is causal, without score mods, and this call has {mask}, {call.score_mod}"
    largest = max(hint_of(call.size("q", 3)), hint_of(call.size("v", 3)))
    if largest > LARGEST_HEAD:
        return f"the kernel over pages takes a head_dim of at most {LARGEST_HEAD}, not {largest}"
    if call.kv_heads > MOST_KV_HEADS:
        return f"the kernel over pages takes at most {MOST_KV_HEADS} KV heads, not {call.kv_heads}"
    return _not_codes(call) or _not_triton(call, mask, target)


def _not_codes(call: AttentionCall) -> str:
    dims = hint_of(call.size("k", 3)), hint_of(call.size("v", 3))
    for form, dim in zip(call.kept.forms if call.kept is not None else (), dims, strict=False):
        tokens = form.tokens
        if form.kind and (dim % 4 or (tokens > 1 and (tokens < SMALLEST_GROUP or tokens & (tokens - 1)))):
            return (
                f"the kernel over pages reads codes of a head_dim that 4 divides and of groups of a power of two from "
                f"{SMALLEST_GROUP} tokens on, not of {dim} and {tokens}"
            )
        if tokens == 1 and form.channels and dim // form.channels > MOST_GROUPS:
            return f"the kernel over pages reads at most {MOST_GROUPS} groups of values in a head, not {dim // form.channels}"
    return ""


def _not_cpp(call: AttentionCall, mask: Mask, target: Target) -> str:
    if target.gradients:
        return "FlexAttention has no gradients on CPU"
    if call.score_mod is not None and isinstance(call.score_mod.parts()[-1], SinkLogits):
        return "FlexAttention returns no log-sum-exp on CPU, which learned sinks need"
    if not cpu_has_avx2():
        return "FlexAttention needs AVX2 on CPU"
    dtype = value_of(call.q).dtype
    if dtype not in (torch.float32, *HALF):
        return f"FlexAttention takes no {dtype} on CPU"
    return ""


def capability() -> tuple[int, int] | None:
    """The compute capability of this machine's GPU; None without one."""
    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


@cache
def flash_installed() -> bool:
    """Whether FlexAttention's FLASH backend can be imported."""
    try:
        return find_spec("flash_attn.cute") is not None
    except ImportError:
        return False
