"""A chunk of a prompt over the pages of a cache, on torch's own fused kernels."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from sparse_compile.masks import causal
from sparse_compile.passes.choose.block_layout import Layout
from sparse_compile.passes.choose.named_mask import NamedMask
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_nodes import memory_of
from sparse_compile.passes.ir.kv_source import Paged, Quantized, Selected
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.rows.head_slices import pick_heads
from sparse_compile.passes.ir.rows.ring_rows import new_tokens
from sparse_compile.passes.ir.target import Target
from sparse_compile.passes.lower.kernel import Kernel, needs_device
from sparse_compile.passes.lower.nodes.cache_writes import write_once
from sparse_compile.passes.lower.nodes.emitter import Emitter
from sparse_compile.passes.lower.sdpa import no_fused_kernel
from sparse_compile.passes.ops.cache.chunk_attention import ChunkAttention, chunk_attention
from sparse_compile.passes.storage.codec import Format, QuantizedTensor


class ChunkedSDPA(Kernel):
    """SDPA of a chunk to itself and to the earlier keys of a cache, without any mask tensor."""

    name, title = "chunk", "SDPA over a cache"
    aliases = ("sdpa",)
    reads_mask = False
    is_recordable = False

    def rank(self, call: Attention, target: Target) -> int | None:
        if not isinstance(call.kv, Paged | Quantized | Selected) or call.kv.new.is_step:
            return None
        # FlexAttention's decode kernel reads the keys once for all query heads of a KV head, and can be recorded. It reads
        # quantized keys only after all of them are dequantized.
        is_folded = call.verifies and target.device_of(call) == "cuda" and not _is_quantized(call.kv)
        return 50 if is_folded else 5

    def why_not(self, call: Attention, target: Target) -> str:
        if reason := needs_device(self, call, target):
            return reason
        if not isinstance(call.kv, Paged | Quantized | Selected) or call.kv.new.is_step:
            return "SDPA over a cache runs prompts over the pages of a SparseCache"
        if call.score_mod is not None:
            return f"SDPA has no score mods, and this call has {call.score_mod}"
        shift = call.positions.q_shift
        if call.visible != causal or shift is None or memory_of(shift) is not call.kv.new.start:
            return f"SDPA over a cache needs a causal mask, not {call.visible}"
        if target.inner == "cudagraphs":
            return "inner='cudagraphs' records prompts, and the work of a chunk depends on how much the cache holds"
        return no_fused_kernel(call, target) if target.device_of(call) == "cuda" else _not_on_cpu(call)

    def layout(self, call: Attention, seen: NamedMask, target: Target) -> Layout:
        return Layout(seen.mask, seen.heads, split=False)

    def lower(self, call: Attention, emitter: Emitter) -> Node | Left:
        assert isinstance(call.kv, Paged | Quantized | Selected)
        write_once(emitter.node, call.kv, call.q, emitter.scene.shared)
        pages = call.kv.pages if isinstance(call.kv, Selected) else call.kv
        k, v = (pick_heads(emitter.node, x, emitter.kv_heads) for x in new_tokens(emitter.node, pages.new))
        if isinstance(pages, Paged):
            stored, forms = (QuantizedTensor(pages.keys), QuantizedTensor(pages.values)), (Format(), Format())
        else:
            stored, forms = (pages.keys, pages.values), pages.forms
        keys, values = (self._heads(emitter, part) for part in stored)
        operands: Any = ChunkAttention(emitter.query(), k, v, keys, values, pages.new.start, *forms, call.scale)
        return emitter.call_op(emitter.node, chunk_attention, operands)

    def _heads(self, emitter: Emitter, stored: QuantizedTensor[Node]) -> QuantizedTensor[Node]:
        picked = [None if part is None else pick_heads(emitter.node, part, emitter.kv_heads) for part in stored]
        return QuantizedTensor(*picked)  # type: ignore[arg-type]  # the first part is never None


def _is_quantized(kv: Paged | Quantized | Selected) -> bool:
    return isinstance(kv.pages if isinstance(kv, Selected) else kv, Quantized)


def _not_on_cpu(call: Attention) -> str:
    dims = set(call.dims)
    return "" if len(dims) == 1 else f"SDPA's fused kernel needs one head_dim, not {sorted(dims)}"
