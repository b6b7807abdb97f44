"""Page attention, our kernel for decode steps over a cache: it reads rings and selected or quantized pages in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from sparse_compile.masks import Captured, Mask, causal, full
from sparse_compile.masks.operators import conjuncts
from sparse_compile.masks.patterns.remapped import Remapped
from sparse_compile.masks.selection.page_topk import offered
from sparse_compile.passes.choose.block_layout import Layout, selection_layout
from sparse_compile.passes.choose.named_mask import NamedMask
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.kv_source import Dense, Paged, Prompt, Quantized, Ring, Selected, can_be_read_in_place
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.target import Target
from sparse_compile.passes.kernels.limits import LARGEST_HEAD, MOST_KV_HEADS, MOST_VALUE_GROUPS, SMALLEST_KEY_GROUP
from sparse_compile.passes.kernels.operands import PagedDecode, PageRead, RingRead, Stored
from sparse_compile.passes.lower.flex import not_in_triton
from sparse_compile.passes.lower.kernel import Kernel, needs_device
from sparse_compile.passes.lower.nodes.cache_writes import page_rows, write_once
from sparse_compile.passes.lower.nodes.emitter import Emitter
from sparse_compile.passes.lower.nodes.page_choice import chosen_pages
from sparse_compile.passes.ops.block_tables import BLOCK
from sparse_compile.passes.ops.cache.paged_decode import paged_decode
from sparse_compile.passes.storage.codec import Format


class PagedAttention(Kernel):
    """Our kernel, which runs all heads of a layer in one launch and merges the splits in a second one."""

    name, title = "pages", "page attention"
    device = "cuda"

    def rank(self, call: Attention, target: Target) -> int | None:
        return 0 if call.is_step and isinstance(call.kv, Ring | Selected | Quantized | Paged) else None

    def why_not(self, call: Attention, target: Target) -> str:
        if reason := needs_device(self, call, target):
            return reason
        if not can_be_read_in_place(call.kv):
            if isinstance(call.kv, Ring):
                return f"page attention reads a ring only under a sink and a window of text positions, not under {call.visible}"
            return "page attention needs a decode step over a ring, selected pages or quantized pages of a SparseCache"
        if not isinstance(call.kv, Ring) and (call.score_mod is not None or not _sees_the_past(call)):
            return f"page attention needs a causal mask and no score mod, not {call.visible} with score mod {call.score_mod}"
        query_dim, _, value_dim = call.dims
        if max(query_dim, value_dim) > LARGEST_HEAD:
            return f"page attention needs a head_dim of at most {LARGEST_HEAD}, not {max(query_dim, value_dim)}"
        if call.kv_heads > MOST_KV_HEADS:
            return f"page attention needs at most {MOST_KV_HEADS} KV heads, not {call.kv_heads}"
        pages = call.kv.pages if isinstance(call.kv, Selected) else call.kv
        unreadable = unreadable_format(pages.forms, pages.dims) if isinstance(pages, Quantized) else ""
        return unreadable or not_in_triton(self, call)

    def layout(self, call: Attention, seen: NamedMask, target: Target) -> Layout:
        if isinstance(call.kv, Selected):
            return selection_layout(call, call.kv, seen)
        return Layout(seen.mask, seen.heads, split=False)

    def lower(self, call: Attention, emitter: Emitter) -> Node | Left:
        pages = None if isinstance(call.kv, Ring) else self._pages(call, emitter)
        ring = _ring(call.kv, emitter) if isinstance(call.kv, Ring) else None
        return _launch(emitter, emitter.query(), pages, ring)

    def lower_together(self, emitters: Sequence[Emitter], q: Node) -> Node | None:
        """Read pages and a ring in one launch, which writes the heads in ascending order."""
        kinds = [isinstance(emitter.call.kv, Ring) for emitter in emitters]
        if sorted(kinds) != [False, True] or sum(emitter.call.kv_heads for emitter in emitters) > MOST_KV_HEADS:
            return None
        paged, ringed = emitters[kinds.index(False)], emitters[kinds.index(True)]
        assert isinstance(ringed.call.kv, Ring)
        heads = list(ringed.call.kv.storage.heads)
        return _launch(paged, q, self._pages(paged.call, paged), _ring(ringed.call.kv, ringed)._replace(heads=heads))

    def _pages(self, call: Attention, emitter: Emitter) -> PageRead[Node]:
        """The pages that a step reads: the selected ones, or all."""
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
        return PageRead(keys, values, counts, table, kv.new.start, kv.new.texts, page_size, usual)


def _sees_the_past(call: Attention) -> bool:
    """Whether a step may read every earlier token that is not padding. The kernel reads padding from the text positions."""
    return all(_is_past(part, call) for part in conjuncts(offered(call.visible)))


def _is_past(part: Mask, call: Attention) -> bool:
    if not isinstance(part, Remapped):
        return part == causal
    assert not isinstance(call.kv, Dense | Prompt | Ring)
    sources = [call.sources.get(Captured.of(at).name) for at in (part.queries, part.keys)]
    return part.mask in (full, causal) and all(at is not None and at.node is call.kv.new.texts for at in sources)


def _ring(kv: Ring, emitter: Emitter) -> RingRead[Node]:
    """The ring that a step reads, with its heads numbered from 0."""
    assert kv.window is not None
    return RingRead(*emitter.keys_values(), kv.at.texts, kv.text, *kv.window, list(range(kv.heads)))


def _launch(emitter: Emitter, q: Node, pages: PageRead[Node] | None, ring: RingRead[Node] | None) -> Node:
    operands: Any = PagedDecode(q, pages, ring, emitter.call.scale)
    return emitter.call_op(emitter.node, paged_decode, operands)


def unreadable_format(forms: Sequence[Format], dims: Sequence[int]) -> str:
    """Why the kernel cannot read keys and values of sizes ``dims`` in the formats ``forms``; empty if it can."""
    for form, dim in zip(forms, dims, strict=True):
        tokens = form.tokens
        if form.kind and (dim % 4 or (tokens > 1 and (tokens < SMALLEST_KEY_GROUP or tokens & (tokens - 1)))):
            return (
                "page attention reads quantized pages only if 4 divides the head_dim and the tokens in a group are a power of "
                f"two of at least {SMALLEST_KEY_GROUP} (or 1), not head_dim {dim} and groups of {tokens}"
            )
        if tokens == 1 and form.channels and dim // form.channels > MOST_VALUE_GROUPS:
            return (
                f"page attention reads quantized values only if a head has at most {MOST_VALUE_GROUPS} groups of channels, "
                f"not {dim // form.channels}: give a group more channels"
            )
    return ""
