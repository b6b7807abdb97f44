"""Our kernel for decode steps over a cache: it reads rings, and chosen or quantized pages, where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from sparse_compile.masks import causal
from sparse_compile.masks.selection.page_topk import offered
from sparse_compile.passes.choose.block_layout import Layout, selection_layout
from sparse_compile.passes.choose.named_mask import NamedMask
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.kv_source import Paged, Quantized, Ring, Selected, can_be_read_in_place
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.target import Target
from sparse_compile.passes.kernels.limits import LARGEST_HEAD, MOST_KV_HEADS, MOST_VALUE_GROUPS, SMALLEST_KEY_GROUP
from sparse_compile.passes.kernels.operands import PagedDecode, PageRead, RingRead, Stored
from sparse_compile.passes.lower.cache_writes import page_rows, write_once
from sparse_compile.passes.lower.emitter import Emitter
from sparse_compile.passes.lower.flex import not_in_triton
from sparse_compile.passes.lower.kernel import Kernel, needs_device
from sparse_compile.passes.lower.page_choice import chosen_pages
from sparse_compile.passes.ops.block_tables import BLOCK
from sparse_compile.passes.ops.paged_decode import paged_decode
from sparse_compile.passes.storage.codec import Format


class PagedAttention(Kernel):
    """One launch for all heads of a layer, and one that merges its splits."""

    name, title = "pages", "page attention"
    device = "cuda"

    def rank(self, call: Attention, target: Target) -> int | None:
        return 0 if call.is_step and isinstance(call.kv, Ring | Selected | Quantized | Paged) else None

    def why_not(self, call: Attention, target: Target) -> str:
        if reason := needs_device(self, call, target):
            return reason
        if not can_be_read_in_place(call.kv):
            return "the kernel over pages reads rings, chosen pages and encoded pages of a SparseCache in a decode step"
        if not isinstance(call.kv, Ring) and (call.score_mod is not None or offered(call.visible) != causal):
            return f"the kernel over pages is causal, without score mods, and this call has {call.visible}, {call.score_mod}"
        query_dim, _, value_dim = call.dims
        if max(query_dim, value_dim) > LARGEST_HEAD:
            return f"the kernel over pages takes a head_dim of at most {LARGEST_HEAD}, not {max(query_dim, value_dim)}"
        if call.kv_heads > MOST_KV_HEADS:
            return f"the kernel over pages takes at most {MOST_KV_HEADS} KV heads, not {call.kv_heads}"
        pages = call.kv.pages if isinstance(call.kv, Selected) else call.kv
        unreadable = unreadable_format(pages.forms, pages.dims) if isinstance(pages, Quantized) else ""
        return unreadable or not_in_triton(call)

    def layout(self, call: Attention, seen: NamedMask, target: Target) -> Layout:
        if isinstance(call.kv, Selected):
            return selection_layout(call, call.kv, seen)
        return Layout(seen.mask, seen.heads, split=False)

    def lower(self, call: Attention, emitter: Emitter) -> Node | Left:
        pages = None if isinstance(call.kv, Ring) else self._pages(call, emitter)
        ring = _ring(call.kv, emitter) if isinstance(call.kv, Ring) else None
        return _launch(emitter, emitter.query(), pages, ring)

    def lower_together(self, emitters: Sequence[Emitter], q: Node) -> Node | None:
        """Read pages and a ring in one launch, which writes the heads in their order."""
        kinds = [isinstance(emitter.call.kv, Ring) for emitter in emitters]
        if sorted(kinds) != [False, True] or sum(emitter.call.kv_heads for emitter in emitters) > MOST_KV_HEADS:
            return None
        paged, ringed = emitters[kinds.index(False)], emitters[kinds.index(True)]
        assert isinstance(ringed.call.kv, Ring)
        heads = list(ringed.call.kv.storage.heads)
        return _launch(paged, q, self._pages(paged.call, paged), _ring(ringed.call.kv, ringed)._replace(heads=heads))

    def _pages(self, call: Attention, emitter: Emitter) -> PageRead[Node]:
        """The pages that a step reads: those it chooses, or all."""
        kv, shared = call.kv, emitter.scene.shared
        assert isinstance(kv, Selected | Quantized)
        counts = table = None
        page_size, usual = BLOCK, -(-kv.length // BLOCK)
        if isinstance(kv, Selected):
            layout = self.layout(call, emitter.seen, emitter.scene.target)
            _, _, counts, table = chosen_pages(emitter, kv, layout)
            page_size, usual = kv.selection.page_size, kv.selection.budget
        else:
            write_once(emitter.node, kv, call.q, shared)
        pages = kv.pages if isinstance(kv, Selected) else kv
        if isinstance(pages, Quantized):
            keys, values = (Stored.of(c, form) for c, form in zip((pages.keys, pages.values), pages.forms, strict=True))
        else:
            keys, values = (Stored(rows) for rows in page_rows(emitter.node, pages, call.q))
        return PageRead(keys, values, counts, table, kv.new.start, None, page_size, usual)


def _ring(kv: Ring, emitter: Emitter) -> RingRead[Node]:
    """The ring that a step reads, as if all heads were in it."""
    assert kv.window is not None
    return RingRead(*emitter.keys_values(), kv.at.texts, kv.text, *kv.window, list(range(kv.heads)))


def _launch(emitter: Emitter, q: Node, pages: PageRead[Node] | None, ring: RingRead[Node] | None) -> Node:
    operands: Any = PagedDecode(q, pages, ring, emitter.call.scale)
    return emitter.call_op(emitter.node, paged_decode, operands)


def unreadable_format(forms: Sequence[Format], dims: Sequence[int]) -> str:
    """Why the kernel cannot read keys and values of sizes ``dims`` that are quantized so; empty if it can."""
    for form, dim in zip(forms, dims, strict=True):
        tokens = form.tokens
        if form.kind and (dim % 4 or (tokens > 1 and (tokens < SMALLEST_KEY_GROUP or tokens & (tokens - 1)))):
            return (
                f"the kernel over pages reads codes of a head_dim that 4 divides and of groups of a power of two from "
                f"{SMALLEST_KEY_GROUP} tokens on, not of {dim} and {tokens}"
            )
        if tokens == 1 and form.channels and dim // form.channels > MOST_VALUE_GROUPS:
            return (
                f"the kernel over pages reads at most {MOST_VALUE_GROUPS} groups of values in a head, "
                f"not {dim // form.channels}"
            )
    return ""
