"""Attention of a decode step to what a cache keeps, by a kernel that reads it as it is: all heads of a layer in one launch."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from sparse_compile.passes.ir.attention_call import AttentionCall, Kept
from sparse_compile.passes.ir.fx_emit import emit
from sparse_compile.passes.ir.fx_nodes import hint_of
from sparse_compile.passes.kernels.limits import MOST_KV_HEADS
from sparse_compile.passes.ops.block_tables import BLOCK
from sparse_compile.passes.ops.paged_decode import attend_kept
from sparse_compile.passes.storage.codec import Codes, Format
from sparse_compile.passes.torch_private import overload

NO_PAGES: tuple[Any, ...] = (*[None] * 9, 1, 1, "/")
NO_RING: tuple[Any, ...] = (*[None] * 4, 0, 0, [])


def pages_of(call: AttentionCall, k: Node, v: Node, lists: list[Node]) -> tuple[Any, ...]:
    """The operands, but the query, that read pages: those of ``lists``, counts and numbers, or all."""
    kept = call.kept or Kept(Codes(k), Codes(v), (Format(), Format()))
    page_size, usual = BLOCK, -(-hint_of(call.size("k", 2)) // BLOCK)
    if call.scored is not None:
        page_size, usual = call.scored.selecting.page_size, call.scored.selecting.budget
    assert call.positions is not None
    where = (*(lists or (None, None)), call.positions.q_shift, page_size, usual)
    return (*kept.keys, *kept.values, *where, "/".join(form.kind for form in kept.forms), *NO_RING, call.scale)


def ring_of(call: AttentionCall, k: Node, v: Node) -> tuple[Any, ...]:
    """The operands, but the query, that read a ring."""
    ring = call.ring
    assert ring is not None
    return (*NO_PAGES, k, v, ring.texts, ring.text, ring.sink, ring.recent, list(range(call.kv_heads)), call.scale)


def in_one_launch(call: AttentionCall, outs: list[Node]) -> None:
    """Where pages and a ring of a call are read by our kernel, let one launch read both and write the heads in their order."""
    ours = all(out.target is overload(attend_kept) for out in outs)
    rings = [piece.ring is not None for piece in call.pieces]
    if call.joined is None or not ours or sorted(rings) != [False, True] or call.kv_heads > MOST_KV_HEADS:
        return
    pages, ring = (outs[rings.index(which)] for which in (False, True))
    read = call.pieces[rings.index(True)].ring
    assert read is not None
    at = 1 + len(NO_PAGES)  # after the query
    args = (call.q, *pages.args[1:at], *ring.args[at : at + len(NO_RING) - 1], list(read.heads), call.scale)
    call.joined.replace_all_uses_with(emit(call.joined, overload(attend_kept), *args))
