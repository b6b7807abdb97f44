"""Split the attention of one layer over a SparseCache by storage, and build the mask of each storage group.

Heads that keep every key have a static cache of their own: a buffer ``[B, heads, slots, D]`` with column ``n`` in slot ``n``.
Heads of a ring see ``[ring sorted by text position | chunk]`` in a prefill, and the unsorted ring in a decode step. Their masks
look positions up in tables (``Remapped``).

There is one buffer for each storage, instead of one pool with page lists for all. A storage group is then an ordinary dense
tensor, which every kernel reads at full speed. SDPA and FlexAttention's C++ template cannot read page lists, and the template
ignores the offset of a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch.fx import Node

from sparse_compile.masks import Captured, Mask, ScoreMod, causal, full, per_head, sink, sliding_window
from sparse_compile.masks.analysis import visible_past
from sparse_compile.masks.patterns.remapped import relaxed, remapped
from sparse_compile.masks.score_mods import sink_scores
from sparse_compile.masks.selection.page_topk import choosing_together
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.captured_source import Source
from sparse_compile.passes.ir.fx_emit import inline
from sparse_compile.passes.ir.fx_nodes import value_of
from sparse_compile.passes.ir.kv_source import (
    Dense,
    KVSource,
    NewTokens,
    Paged,
    Prompt,
    Quantized,
    Ring,
    Selected,
    can_be_read_in_place,
)
from sparse_compile.passes.ir.positions import Positions
from sparse_compile.passes.ir.rewrite import StorageGroup
from sparse_compile.passes.ir.rows.head_slices import pick_heads
from sparse_compile.passes.kv.moving_ring import moving_ring
from sparse_compile.passes.kv.own_padding import without_own_padding
from sparse_compile.passes.kv.token_positions import TokenPositions
from sparse_compile.passes.ops.block_tables import Q_START
from sparse_compile.passes.ops.cache.cache_update import CacheUpdate
from sparse_compile.passes.storage import layer_plan
from sparse_compile.passes.storage.layer_plan import LayerPlan, Storage
from sparse_compile.passes.torch_private import real_tensors


def split_by_storage(
    call: Attention, update: CacheUpdate[Node], positions: TokenPositions, *, is_prompt: bool
) -> tuple[StorageGroup, ...]:
    """Return the storage groups of ``call``, whose policy combines those of the cache and the backend.

    With ``is_prompt``, the call sees the new tokens only.
    """
    cached = _CachedCall(call, update, positions)
    return tuple(_group(cached, number, storage, is_prompt) for number, storage in enumerate(update.plan.storages))


def over_computed_keys(
    call: Attention, update: CacheUpdate[Node], positions: TokenPositions, *, is_prompt: bool
) -> tuple[StorageGroup, ...]:
    """Return the one group of a call whose keys the model computes from pages. They are ordinary tensors of the graph."""
    cached, names = _CachedCall(call, update, positions), _Names(dict(call.sources))
    heads = tuple(range(call.heads))
    policy = _policy(call, heads)
    if is_prompt:
        mask = call.mask & policy if cached.is_strict else call.mask
    else:
        new = positions.of(call.node, update, None)
        mask = _mask_over_pages(cached, policy, new, names, in_place=False)
    assert isinstance(call.kv, Dense)
    group = replace(call, kv=Dense(call.kv.k, call.kv.v), mask=mask, policy=full, sources=names.sources)
    return (StorageGroup(group, heads),)


@dataclass(frozen=True)
class _CachedCall:
    """One call over the cache of its layer."""

    call: Attention
    update: CacheUpdate[Node]
    positions: TokenPositions

    @property
    def plan(self) -> LayerPlan:
        return self.update.plan

    @cached_property
    def without_padding(self) -> Mask:
        """The mask of the model without the padding that the cache records."""
        return without_own_padding(self.call, self.update)

    @property
    def is_strict(self) -> bool:
        """Whether the policy applies to each query of a chunk by itself, as in mode ``strict``."""
        return self.plan.mode == "strict"


def query_heads(call: Attention, storage: Storage) -> tuple[int, ...]:
    """The query heads of ``call`` whose KV heads are in ``storage``."""
    return tuple(head * call.group + g for head in storage.heads for g in range(call.group))


def _group(cached: _CachedCall, number: int, storage: Storage, is_prompt: bool) -> StorageGroup:
    call, plan = cached.call, cached.plan
    heads, names = query_heads(call, storage), _Names(dict(call.sources))
    policy = _policy(call, heads)
    new = cached.positions.of(call.node, cached.update, storage.heads if len(plan.storages) > 1 else None)
    group_call = replace(call, q=pick_heads(call.node, call.q, heads if len(plan.storages) > 1 else None), policy=full)
    if is_prompt and not plan.rotation:
        mask = call.mask & policy if cached.is_strict else call.mask  # without strict, the prompt sees itself
        group_call = replace(group_call, kv=Prompt(_stored(cached, number, storage, new, None)), mask=mask)
    elif isinstance(storage, layer_plan.PageStorage):
        kv = _stored(cached, number, storage, new, None)
        in_place = can_be_read_in_place(kv)
        group_call = replace(group_call, kv=kv, mask=_mask_over_pages(cached, policy, new, names, in_place=in_place))
    else:
        assert isinstance(storage, layer_plan.RingStorage)
        group_call = _over_ring(cached, group_call, number, storage, policy, new, names)
    return StorageGroup(replace(group_call, sources=names.sources), heads)


def _policy(call: Attention, heads: Sequence[int]) -> Mask:
    """The policy of the query heads ``heads``. Heads of one KV head share a selector, or have none."""
    masks = [call.policy.for_head(head, call.heads) for head in heads]
    for first in range(0, len(masks), call.group):
        masks[first : first + call.group] = choosing_together(masks[first : first + call.group])[1]
    return masks[0] if len(set(masks)) == 1 else per_head(masks)


def _stored(
    cached: _CachedCall, number: int, storage: Storage, new: NewTokens, window: tuple[int, int] | None
) -> Paged | Quantized | Selected | Ring:
    """The KV source of storage ``number`` of a layer."""
    keys, values = cached.update.buffers_of(number)
    if isinstance(storage, layer_plan.RingStorage):
        at, positions = cached.positions.ring(cached.call.node, cached.plan, storage.ring_kind), cached.positions
        may_hold = positions.has_padding or storage.slots == storage.sink
        return Ring(storage, keys, values, new, at, positions.text, window, may_hold)
    pages: Paged | Quantized = Paged(keys, values, new)
    if storage.forms is not None:
        pages = Quantized(Paged(keys, values, new), *cached.update.quantized_of(number), storage.forms, cached.plan.debug)
    if storage.selection is None:
        return pages
    state = cached.update.selection_state_of(number)
    return Selected(pages, storage.selection, state, storage.leads(cached.plan.layer))


# -- pages --------------------------------------------------------------------------------------------------------------


def _mask_over_pages(cached: _CachedCall, policy: Mask, new: NewTokens, names: _Names, *, in_place: bool) -> Mask:
    """The mask over columns. Text positions equal columns unless there is padding; then the policy looks text positions up.

    A kernel that reads pages ``in_place`` gets the padding of the cache as text positions as well.
    """
    model = cached.call.mask
    if in_place and new.texts is not None and cached.without_padding != model:
        model, policy = cached.without_padding, full if model.implies(policy) else policy
    elif policy in (full, causal) or model.implies(policy):
        return model & policy
    if new.texts is None:
        return model & (policy if cached.is_strict else relaxed(policy, _first_column(cached, names)))
    texts = names.capture(new.texts)
    return model & remapped(_relaxed(cached, policy, names), texts, texts, ordered=True)


def _first_column(cached: _CachedCall, names: _Names) -> Captured:
    """The column of the first new token, ``[1]``."""
    start = cached.update.columns
    return names.capture(start, Source(start, (), (), (None,)))


def _relaxed(cached: _CachedCall, policy: Mask, names: _Names) -> Mask:
    """The policy. In mode ``chunk_relaxed``, a query sees its chunk, and what the policy shows to the one before it."""
    if cached.is_strict or policy in (full, causal):
        return policy
    positions = cached.positions
    before = inline(cached.call.node, lambda texts, rows: texts[: rows.shape[0]], cached.update.texts, positions.columns)
    return relaxed(policy, names.capture(before))


# -- rings --------------------------------------------------------------------------------------------------------------


def _over_ring(
    cached: _CachedCall,
    group_call: Attention,
    number: int,
    storage: layer_plan.RingStorage,
    policy: Mask,
    new: NewTokens,
    names: _Names,
) -> Attention:
    window = _window(cached, policy)
    ring = _stored(cached, number, storage, new, window)
    assert isinstance(ring, Ring)
    mask = _mask_over_ring(cached, policy, ring, names)
    kv: KVSource = ring
    score_mod: ScoreMod | None = group_call.score_mod
    if cached.plan.rotation:
        frame = cached.positions.frame(cached.call, cached.update)
        k, v, scores = moving_ring(group_call, ring, frame)
        kv = Dense(k, v)
        if scores is not None:
            replaced = sink_scores(names.capture(scores), names.capture(ring.at.texts))
            score_mod = replaced if score_mod is None else replaced >> score_mod
    return replace(group_call, kv=kv, mask=mask, score_mod=score_mod, positions=Positions())


def _window(cached: _CachedCall, policy: Mask) -> tuple[int, int] | None:
    """The sizes of sink and window, if a step sees exactly these of a ring, counted in text positions; else None.

    A window of the model counts columns. They are as far apart as text positions where all padding is on the left.
    """
    call, model = cached.call, cached.without_padding
    if not cached.positions.is_step or not cached.is_strict or model.captures() or call.score_mod is not None:
        return None
    if model not in (causal, call.mask) and not cached.update.is_left:
        return None
    return whole_window(model & policy, cached.plan.columns)


def whole_window(mask: Mask, length: int) -> tuple[int, int] | None:
    """The sizes of sink and window, if ``mask`` is causal with a sink and a window, and nothing else; else None."""
    with real_tensors():
        past = visible_past(mask, length)
    if past is None or past.recent < 1:
        return None
    plain = causal & (sink(past.sink) | sliding_window(past.recent)) if past.sink else causal & sliding_window(past.recent)
    return (past.sink, past.recent) if mask.implies(plain) and plain.implies(mask) else None


def _mask_over_ring(cached: _CachedCall, policy: Mask, ring: Ring, names: _Names) -> Mask:
    """The mask over the places of a ring and its chunk, with positions looked up."""
    policy, ordered = _relaxed(cached, policy, names), not cached.positions.is_step
    by_text = names.capture(ring.text), names.capture(ring.at.texts)
    model = cached.call.mask
    if not model.captures():
        return remapped(model & policy, *by_text, ordered=ordered)
    # The model's own mask counts columns, padding included, and a tensor in it begins at the first new column.
    model = model.bind({Q_START: _first_column(cached, names)})
    by_column = remapped(model, names.capture(cached.positions.columns), names.capture(ring.at.columns), ordered=ordered)
    return by_column & remapped(policy, *by_text, ordered=ordered)


class _Names:
    """Symbols for tensors of the graph, and the source of each."""

    def __init__(self, sources: dict[str, Source]) -> None:
        self.sources = sources

    def capture(self, node: Any, source: Source | None = None) -> Captured:
        """A symbol for a tensor of the graph, or for the part of it that ``source`` reads."""
        axes = len(value_of(node).shape)
        source = source or Source(node, (slice(None),) * axes, tuple(range(axes)), (slice(None),) * axes)
        name = f"{node.name}_cached"
        while self.sources.setdefault(name, source) != source:
            name += "_"
        return Captured.symbol(name)
