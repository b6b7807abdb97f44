"""The attention of one layer over a SparseCache, cut into a call for each way in which its heads are kept.

Heads that keep everything are a static cache of their own: a buffer ``[B, heads, slots, D]`` with column ``n`` in slot ``n``.
Heads of a ring see ``[ring in the order of its text | chunk]`` in a prefill and the ring as it lies in a decode step, under
masks that look positions up (``Placed``). One buffer for each way rather than one pool with page lists for all: a group of
equal heads is an ordinary dense tensor, which every kernel reads at full speed (SDPA and FlexAttention's C++ template read
no page lists, and the template ignores where a view begins).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node
from torch.nn.functional import scaled_dot_product_attention

from sparse_compile.masks import Captured, Mask, causal, full, per_head, sink, sliding_window
from sparse_compile.masks.analysis import visible_past
from sparse_compile.masks.patterns.remapped import placed, relaxed
from sparse_compile.masks.score_mods import sink_scores
from sparse_compile.masks.selection.page_topk import choosing_together
from sparse_compile.passes.ir.attention_call import AttentionCall, Kept, RingRead, Scored
from sparse_compile.passes.ir.captured_source import Source
from sparse_compile.passes.ir.fx_emit import emit, inline
from sparse_compile.passes.ir.fx_nodes import value_of
from sparse_compile.passes.ir.head_slices import join_heads, pick_heads
from sparse_compile.passes.ir.positions import Positions
from sparse_compile.passes.kv.token_positions import CacheInGraph
from sparse_compile.passes.kv.update_node import Update
from sparse_compile.passes.ops.block_tables import Q_START
from sparse_compile.passes.ops.page_selection import describe_pages, score_pages_by_keys
from sparse_compile.passes.ops.quantized_append import append_codes, read_codes
from sparse_compile.passes.storage.codec import Codes, Format
from sparse_compile.passes.storage.layer_plan import Pages, Ring, Storage
from sparse_compile.passes.torch_private import overload, real_tensors


class Pieces:
    """The pieces of one call. ``policy`` of the call is what both the cache and the backend ask for."""

    def __init__(self, cache: CacheInGraph, call: AttentionCall, update: Update) -> None:
        assert call.mask is not None
        self.cache, self.call, self.update, self.plan, self.model = cache, call, update, update.plan, call.mask
        self.point = cache.point = call.node
        self.sources = dict(call.sources)
        self.group = call.heads // call.kv_heads

    def run(self) -> AttentionCall:
        """The call with its pieces, joined where the call stood."""
        made = [self._piece(number, storage) for number, storage in enumerate(self.plan.storages)]
        outs = [piece.node for piece in made]
        out = outs[0]
        if len(outs) > 1:
            out = join_heads(self.point, [self.heads_of(storage) for storage in self.plan.storages], outs)
        self.point.replace_all_uses_with(out)
        return replace(self.call, pieces=tuple(made), joined=out)

    def heads_of(self, storage: Storage) -> tuple[int, ...]:
        """The query heads of the KV heads that are kept in one way."""
        return tuple(head * self.group + g for head in storage.heads for g in range(self.group))

    def _piece(self, number: int, storage: Storage) -> AttentionCall:
        """The attention of some heads: their keys and values where they are kept, and the mask over those."""
        call, plan, update = self.call, self.plan, self.update
        whole = len(plan.storages) == 1
        heads = self.heads_of(storage)
        q = pick_heads(self.point, call.q, None if whole else heads)
        new = [pick_heads(self.point, x, None if whole else storage.heads) for x in (update.k, update.v)]
        kept = update.buffers[2 * number : 2 * number + 2]
        policy, score_mod, positions = self._policy(heads), call.score_mod, call.positions
        scored: Scored | None = None
        encoded: Kept | None = None
        ring: RingRead | None = None
        if call.cache_was_empty and not plan.rotation:
            if isinstance(storage, Pages) and storage.forms is not None:
                self._encode(number, storage, new)
            else:
                self._fill(kept, new, storage)
                if isinstance(storage, Pages):
                    self._describe(number, storage, q, kept[0])
            k, v = new
            mask = self.model & policy if plan.mode == "strict" else self.model  # all is one chunk, which sees itself
        elif isinstance(storage, Pages):
            scored = self._scored(number, storage, new, kept)
            leads = scored is not None and scored.new  # then the token is appended where pages are chosen
            if storage.forms is not None:
                encoded = self._encode(number, storage, new)
                k, v = (self._decode(*part) for part in zip((encoded.keys, encoded.values), storage.forms, new, strict=True))
            else:
                k, v = (self.cache.rows(b) if leads else self._append(b, x) for b, x in zip(kept, new, strict=True))
            mask = self._paged_mask(policy)
            self._describe(number, storage, q, k if encoded is not None else kept[0])
        else:
            stream = self.cache.stream(call, plan) if plan.rotation else None
            if stream is not None:
                self.cache.commit(kept[0], stream.joined(self.point, self.cache.rows(kept[0]), storage))
                new = [stream.settled(self.point, new[0], storage), new[1]]
            k, v, columns, texts = self._ring(kept, new, storage)
            mask, positions = self._ring_mask(policy, columns, texts), Positions()
            ring = self._ring_read(storage, policy, texts) if stream is None else None
            if stream is not None and storage.sink:
                scores = stream.sink_scores(self.point, q, k, texts, storage, call.scale, one=self.cache.one)
                replaced = sink_scores(self._capture(scores), self._capture(texts))
                score_mod = replaced if score_mod is None else replaced >> score_mod

        def attend(q: Any, k: Any, v: Any) -> Any:
            return scaled_dot_product_attention(q, k, v, scale=call.scale, enable_gqa=self.group > 1)

        node: Node = inline(self.point, attend, q, k, v)
        where: dict[str, Any] = {"mask": mask, "policy": None, "positions": positions, "cache": None, "sources": self.sources}
        return replace(call, node=node, q=q, k=k, v=v, score_mod=score_mod, scored=scored, kept=encoded, ring=ring, **where)

    def _policy(self, heads: tuple[int, ...]) -> Mask:
        """What the policy shows to some query heads."""
        if self.call.policy is None:
            return full
        masks = [self.call.policy.for_head(head, self.call.heads) for head in heads]
        for first in range(0, len(masks), self.group):
            masks[first : first + self.group] = choosing_together(masks[first : first + self.group])[1]
        return masks[0] if len(set(masks)) == 1 else per_head(masks)

    def _fill(self, kept: list[Node], new: list[Node], storage: Storage) -> None:
        """Write the first tokens, which attend to one another as they are."""
        for buffer, x in zip(kept, new, strict=True):
            if isinstance(storage, Pages):
                self._append(buffer, x)
            else:
                order, _, _, source, *_ = self.cache.step(self.plan, storage.kind)
                self._behind(buffer, x, order, source)

    def _capture(self, node: Any, source: Source | None = None) -> Captured:
        """A symbol for a tensor of the graph, or for what ``source`` reads of it."""
        axes = len(value_of(node).shape)
        source = source or Source(node, (slice(None),) * axes, tuple(range(axes)), (slice(None),) * axes)
        name = f"{node.name}_kept"
        while self.sources.setdefault(name, source) != source:
            name += "_"
        return Captured.symbol(name)

    def _first_column(self) -> Captured:
        """The column of the first new token, ``[1]``."""
        return self._capture(self.cache.columns, Source(self.cache.columns, (), (), (None,)))

    def _relaxed(self, policy: Mask) -> Mask:
        """The policy, or in a relaxed chunk what it shows to the position before the chunk, and the chunk."""
        if self.plan.mode == "strict" or policy in (full, causal):
            return policy
        before = inline(self.point, lambda texts, rows: texts[: rows.shape[0]], self.cache.texts, self.cache.column)
        return relaxed(policy, self._capture(before))

    # -- pages ------------------------------------------------------------------------------------------------------

    def _append(self, buffer: Node, new: Node) -> Node:
        """The rows in use of a buffer of pages, with new tokens at their columns."""
        if self.cache.row_count() == value_of(buffer).shape[0]:
            write = (buffer, self.cache.column, new)
            inline(self.point, lambda buffer, column, new: buffer.index_copy_(2, column[0], new), *write)
        else:
            self.cache.put(buffer, self.cache.column, new)
        return self.cache.rows(buffer)

    def _encode(self, number: int, storage: Pages, new: list[Node]) -> Kept:
        """Append new tokens to pages in fewer bits; in a prefill their digests are written as well."""
        cache, selecting, forms = self.cache, storage.selecting, storage.forms
        assert forms is not None
        keys, values = self.update.codes_of(number)
        leads = selecting is not None and selecting.leader == self.plan.layer and not cache.one
        digest = self.update.choice_of(number).digest if leads else None
        described = (selecting.selector.page, selecting.selector.score) if selecting is not None else (1, "")
        texts = cache.new_page_texts() if cache.padded else None
        state = (*self.update.buffers[2 * number : 2 * number + 2], *keys, *values, digest)
        written = [form.to_text() for form in forms]
        told = (*new, cache.columns, texts, *written, *described, self.plan.debug)
        return Kept(keys, values, forms, emit(self.point, overload(append_codes), *state, *told))

    def _decode(self, codes: Codes[Node], form: Format, new: Node) -> Node:
        """The numbers in the rows in use; a chunk sees itself as it is. A kernel that reads codes leaves this without users."""
        exact = not self.cache.one
        return emit(self.point, overload(read_codes), *codes, new, self.cache.columns, form.to_text(), exact)

    def _paged_mask(self, policy: Mask) -> Mask:
        """Text and columns are one unless there is padding; then the policy looks the text up."""
        if policy in (full, causal) or self.model.implies(policy):
            return self.model & policy
        if not self.cache.padded:
            return self.model & (policy if self.plan.mode == "strict" else relaxed(policy, self._first_column()))
        texts = self._capture(self.cache.new_page_texts())
        return self.model & placed(self._relaxed(policy), texts, texts, ordered=True)

    def _scored(self, number: int, storage: Pages, new: list[Node], kept: list[Node]) -> Scored | None:
        """The pages that a decode step chooses from."""
        selecting, cache = storage.selecting, self.cache
        if selecting is None or not cache.one:
            return None
        choice = self.update.choice_of(number)
        if choice.digest is None:
            return Scored(selecting, choice, padding=cache.padded)
        texts = cache.new_page_texts() if cache.padded else None
        return Scored(selecting, choice, (*new, *kept, cache.columns, cache.anchor, texts), cache.padded)

    def _describe(self, number: int, storage: Pages, q: Node, keys: Node) -> None:
        """Describe the pages of a chunk, or score pages by their keys. A step does the rest when it chooses."""
        selecting, cache = storage.selecting, self.cache
        if selecting is None or selecting.leader != self.plan.layer:
            return
        choice, selector = self.update.choice_of(number), selecting.selector
        texts = cache.new_page_texts() if cache.padded else None
        if choice.digest is not None and not cache.one and storage.forms is None:
            new = (choice.digest, keys, cache.columns, texts, cache.row_count(), cache.token_count())
            emit(self.point, overload(describe_pages), *new, selector.page, selector.score)
        elif choice.digest is None and cache.one:
            how = (selecting.page_size, selector.page, selector.group, selector.every)
            state = (choice.scores, q, keys, cache.columns, cache.anchor, texts)
            emit(self.point, overload(score_pages_by_keys), *state, *how)

    # -- rings ------------------------------------------------------------------------------------------------------

    def _ring(self, kept: list[Node], new: list[Node], storage: Ring) -> tuple[Node, Node, Node, Node]:
        """Keys and values of a ring with the new tokens, and the column and text position of each place."""
        step = self.cache.step(self.plan, storage.kind)
        if self.cache.one:
            texts, columns, slot, keeps = step
            may_keep = self.cache.padded or storage.slots == storage.sink
            k, v = (self._write(b, x, slot, keeps if may_keep else None) for b, x in zip(kept, new, strict=True))
        else:
            order, texts, columns, source, *_ = step
            k, v = (self._behind(b, x, order, source) for b, x in zip(kept, new, strict=True))
        return k, v, columns, texts

    def _ring_read(self, storage: Ring, policy: Mask, texts: Node) -> RingRead | None:
        """What a step sees of a ring, if that is a sink and a window and nothing else."""
        if not self.cache.one or self.plan.mode != "strict" or self.model.captures() or self.call.score_mod is not None:
            return None
        window = whole_window(self.model & policy, self.plan.columns)
        return None if window is None else RingRead(storage.heads, texts, self.cache.text, *window)

    def _ring_mask(self, policy: Mask, columns: Node, texts: Node) -> Mask:
        """The masks over the places of a ring and its chunk."""
        policy, ordered = self._relaxed(policy), not self.cache.one
        by_text = self._capture(self.cache.text), self._capture(texts)
        if not self.model.captures():
            return placed(self.model & policy, *by_text, ordered=ordered)
        # The model's own mask counts columns, padding included; a tensor of it begins at the first new column.
        model = self.model.bind({Q_START: self._first_column()})
        by_column = placed(model, self._capture(self.cache.column), self._capture(columns), ordered=ordered)
        return by_column & placed(policy, *by_text, ordered=ordered)

    def _write(self, buffer: Node, new: Node, slot: Node, keeps: Node | None) -> Node:
        """The rows in use of a ring, with one new token in each; where ``keeps`` is true the slot keeps what it has."""
        _, heads, _, dim = value_of(buffer).shape
        if keeps is not None:

            def unless_kept(rows: Any, new: Any, slot: Any, keeps: Any) -> Any:
                return torch.where(keeps[:, None, :, None], _gathered(rows, slot, heads=heads, dim=dim), new)

            new = inline(self.point, unless_kept, self.cache.rows(buffer), new, slot, keeps)
        self.cache.put(buffer, slot, new)
        return self.cache.rows(buffer)

    def _behind(self, buffer: Node, new: Node, order: Node, source: Node) -> Node:
        """What a chunk attends to: the ring in order and the chunk behind it. The ring takes from it what it keeps."""
        _, heads, _, dim = value_of(buffer).shape

        def in_order(rows: Any, order: Any, new: Any) -> Any:
            return torch.cat([_gathered(rows, order, heads=heads, dim=dim), new], dim=2)

        keys: Node = inline(self.point, in_order, self.cache.rows(buffer), order, new)
        kept = inline(self.point, lambda keys, source: _gathered(keys, source, heads=heads, dim=dim), keys, source)
        self.cache.commit(buffer, kept)
        return keys


def _gathered(x: Any, slot: Any, *, heads: int, dim: int) -> Any:
    """``x`` ``[B, H, N, D]`` at ``slot`` ``[B, n]``."""
    return x.gather(2, slot[:, None, :, None].expand(-1, heads, -1, dim))


def whole_window(mask: Mask, length: int) -> tuple[int, int] | None:
    """Sink and window, if they are all that ``mask`` says beside causality."""
    with real_tensors():
        past = visible_past(mask, length)
    if past is None or past.recent < 1:
        return None
    plain = causal & (sink(past.sink) | sliding_window(past.recent)) if past.sink else causal & sliding_window(past.recent)
    return (past.sink, past.recent) if mask.implies(plain) and plain.implies(mask) else None
