"""Attention over a ``SparseCache``: find the calls, check that the cache keeps what they see, cut them into pieces."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from sparse_compile.masks import Mask, causal, full
from sparse_compile.masks.patterns.tensor import Explicit
from sparse_compile.masks.selection.page_topk import choosing_together
from sparse_compile.masks.unknown_tensors import without_tensors
from sparse_compile.passes.ir.attention_call import AttentionCall, Left
from sparse_compile.passes.ir.fx_nodes import expr_of, hint_of, memory_of, op_name, value_of
from sparse_compile.passes.ir.positions import Positions
from sparse_compile.passes.ir.rewrite import CacheUse
from sparse_compile.passes.kv.expand_cache import Pieces
from sparse_compile.passes.kv.token_positions import CacheInGraph
from sparse_compile.passes.kv.update_node import Update
from sparse_compile.passes.ops.block_tables import Q_START
from sparse_compile.passes.ops.cache_update import SparseCacheError
from sparse_compile.passes.storage.layer_plan import LayerPlan, Pages, Storage, misfit, needed_past

Phase = Callable[[AttentionCall], str]


def find_cache(call: AttentionCall | Left) -> AttentionCall | Left:
    """The call with the cache update its keys come from, and with positions counted by that cache."""
    if isinstance(call, Left):
        return call
    sliced = [_first_tokens(x, call) for x in (call.k, call.v)]
    updates = [_update_of(first or x) for first, x in zip(sliced, (call.k, call.v), strict=True)]
    if updates == [None, None]:
        return call
    update = updates[0]
    if update is None or updates[1] is not update:
        return Left(call.node, "its keys and values do not come from one update of a SparseCache")
    columns = Update.of(update).columns
    assert call.mask is not None and call.positions is not None
    at = call.positions
    if all(sliced) and call.mask.implies(causal) and at == Positions():
        # What transformers does with an empty cache, and with no other: the keys are those of the new tokens.
        return replace(call, cache=update, cache_was_empty=True, is_self_attention=True)
    reads_index = any(isinstance(node, Explicit) for node in call.mask.walk())
    counted = at.q_shift is not None and memory_of(at.q_shift) is columns and at.q_start == 0 == at.kv_start
    if not counted and not (reads_index and at.q_shift is None):
        return Left(call.node, f"its mask {call.mask} counts positions otherwise than the SparseCache ({at})")
    if not reads_index and not call.mask.implies(causal):
        return Left(call.node, f"a SparseCache serves causal self-attention, and the mask of this call is {call.mask}")
    return replace(call, cache=update, positions=Positions(q_shift=columns), is_self_attention=True)


def _first_tokens(node: Node, call: AttentionCall) -> Node | None:
    """``x`` where ``node`` is ``x[:, :, :q_len, :]`` with as many keys as there are queries."""
    everything = slice(None, None, None)
    index: Any = node.args[1] if op_name(node) == "getitem" else None
    if not (isinstance(index, tuple) and len(index) == 4 and all(isinstance(part, slice) for part in index)):
        return None
    same = expr_of(value_of(node).shape[2]) == expr_of(call.size("q", 2))
    rest = [part for axis, part in enumerate(index) if axis != 2]
    source = node.args[0]
    return source if same and rest == [everything] * 3 and index[2].start is None and isinstance(source, Node) else None


def _update_of(node: Node) -> Node | None:
    """The ``cache_update`` that ``node`` is an output of."""
    while op_name(node) in ("contiguous", "clone", "detach") and isinstance(node.args[0], Node):
        node = node.args[0]
    source = node.args[0] if op_name(node) == "getitem" else None
    return source if isinstance(source, Node) and op_name(source) == "cache_update" else None


def reads_cache(gm: GraphModule) -> bool:
    """Whether a graph updates a SparseCache."""
    return any(op_name(node) == "cache_update" for node in gm.graph.nodes)


def keep(
    gm: GraphModule, calls: list[AttentionCall], left: list[Left], phase_of: Phase
) -> tuple[list[AttentionCall], list[CacheUse]]:
    """Cut every call over a cache into pieces and emit the writes. Returns all calls, and what is done to which cache."""
    updates = [node for node in gm.graph.nodes if op_name(node) == "cache_update"]
    for update in updates:
        _check_fit(Update.of(update))
    _check_layers(updates)
    served = {call.cache for call in calls if call.cache is not None}
    if any(update not in served for update in updates):
        reasons = "; ".join(f"{call.node.name}: {call.reason}" for call in left) or "no attention call reads it"
        raise SparseCacheError(
            f"a SparseCache is read by attention that the passes understand, and here it is not: {reasons}. "
            "Use a DynamicCache with this model"
        )
    for node in gm.graph.nodes if updates else ():
        if op_name(node) == "_set_grad_enabled":  # the end of a no_grad() within the model; there are no gradients anyway
            node.args = (False,)
    caches: dict[Node, CacheInGraph] = {}
    kept: dict[Node, list[AttentionCall]] = {}
    result = []
    for call in calls:
        if (update := call.cache) is not None:
            call = _with_policy(call, phase_of(call))
            read = Update.of(update)
            columns = read.columns
            if columns not in caches:
                caches[columns] = CacheInGraph(call, calls)
            kept.setdefault(columns, []).append(call)
            pieces = Pieces(caches[columns], call, read)
            for storage in read.plan.storages:
                check_storage(call, storage, pieces.heads_of(storage))
            call = replace(pieces.run(), cache_nbytes=_nbytes(read))
        result.append(call)
    return result, [_finish(cache, kept[columns]) for columns, cache in caches.items()]


def _check_fit(update: Update) -> None:
    """Raise ``ValueError`` for keys and values that the cache was not built for."""
    if why := misfit(value_of(update.k), value_of(update.v), [value_of(b) for b in update.buffers], update.plan):
        raise ValueError(why)


def _check_layers(updates: list[Node]) -> None:
    """Raise ``ValueError`` if a layer takes new tokens twice: layers beyond the cache's last are taken for that one."""
    seen = [(read.columns, read.plan.layer) for read in map(Update.of, updates)]
    again = [layer for at, (cache, layer) in enumerate(seen) if (cache, layer) in seen[:at]]
    if again:
        raise ValueError(
            f"the model has more layers than the {again[0] + 1} of the cache, or its layer {again[0]} updates it twice: build "
            "the cache from the config of this model"
        )


def _nbytes(update: Update) -> tuple[tuple[int, ...], int, int]:
    """The bytes of keys and values of each KV head as they are kept, of all in a dense cache, and for how many tokens."""
    plan, dense = update.plan, 0
    heads: dict[int, int] = {}
    for number, storage in enumerate(plan.storages):
        kept = [value_of(buffer) for buffer in update.buffers[2 * number : 2 * number + 2]]
        for buffer in kept:
            dense += hint_of(buffer.shape[0]) * hint_of(buffer.shape[3]) * buffer.itemsize * len(storage.heads) * plan.columns
        if isinstance(storage, Pages) and storage.forms is not None:
            kept += [value_of(part) for codes in update.codes_of(number) for part in codes.used()]
        size = sum(math.prod(map(hint_of, x.shape)) * x.itemsize for x in kept)
        heads |= {head: size // len(storage.heads) for head in storage.heads}
    return tuple(heads[head] for head in sorted(heads)), dense, plan.columns * hint_of(value_of(update.buffers[0]).shape[0])


def plan_of(call: AttentionCall) -> LayerPlan:
    """How the layer of a call is kept."""
    assert call.cache is not None
    return Update.of(call.cache).plan


def _with_policy(call: AttentionCall, phase: str) -> AttentionCall:
    """The call under what both the cache and the backend ask for."""
    kept = plan_of(call).policy(phase)
    if phase == "decode":
        _check_choice(call, kept)
    policy = kept if call.policy is None else call.policy if kept is None else kept & call.policy
    if policy is not None:
        policy.for_heads(call.heads)  # a head count that fits neither query nor KV heads is an error
    # A cache is causal anyway, and a policy that says no more than that changes nothing.
    return replace(call, policy=None if policy in (full, causal) else policy)


def _finish(cache: CacheInGraph, calls: list[AttentionCall]) -> CacheUse:
    """Write the new positions if this graph has the last layer, and say what a run does."""
    plans = [plan_of(call) for call in calls]
    last = next((plan for plan in plans if plan.last), None)
    if last is not None:
        cache.finish(last)
    inputs = [node for node in cache.graph.nodes if node.op == "placeholder"]
    batch, tokens = (_size_of(cache.first.size("q", axis), inputs) for axis in (0, 2))
    empty = any(call.cache_was_empty and not plan.rotation for call, plan in zip(calls, plans, strict=True))
    layers = tuple(plan.layer for plan in plans)
    return CacheUse(inputs.index(cache.columns), batch, tokens, layers, last is not None, empty)


def check_storage(call: AttentionCall, storage: Storage, heads: tuple[int, ...]) -> None:
    """Raise ``SparseCacheError`` where a storage cannot serve some query heads of a call."""
    plan = plan_of(call)
    assert call.mask is not None
    explicit = [node for node in call.mask.walk() if isinstance(node, Explicit)]
    mods = call.score_mod.parts() if call.score_mod is not None else ()
    by_head = any(call.sources[str(node.visible)].shape[1] != 1 for node in explicit) or any(mod.captures() for mod in mods)
    if len(plan.storages) > 1 and by_head:
        raise SparseCacheError(
            f"layer {plan.layer} of the SparseCache keeps its heads in different ways, and the model has a mask or score mod "
            f"for each head ({call.mask}, {call.score_mod}): give all heads of this layer one mask"
        )
    if isinstance(storage, Pages):
        _check_selection(call, storage, by_head)
        return
    if call.score_mod is not None and Q_START in call.score_mod.captures():
        raise SparseCacheError(
            f"layer {plan.layer} of the SparseCache keeps a ring, whose keys are out of order, and {call.score_mod} reads "
            "positions: give this layer a policy that keeps every key"
        )
    model = plan.model if explicit else call.mask
    shown: dict[Mask, int] = {}
    for head in heads:
        shown.setdefault(model if call.policy is None else model & call.policy.for_head(head, call.heads), head)
    for mask, head in shown.items():
        past = needed_past(without_tensors(mask), plan.mode, plan.columns)
        if past is None or past.sink > storage.sink or past.recent > storage.recent:
            raise SparseCacheError(
                f"layer {plan.layer} of the cache keeps the first {storage.sink} and the last {storage.recent} tokens for "
                f"query head {head}, but its mask {mask} shows more: build the SparseCache from the config and the policy "
                "of this model"
            )


def _check_choice(call: AttentionCall, kept: Mask | None) -> None:
    """Raise ``SparseCacheError`` if a model asks for pages that its cache does not choose, or would see others than those."""
    layer, group = plan_of(call).layer, call.heads // call.kv_heads
    for first in range(0, call.heads if call.policy is not None else 0, group):
        asked, built = (
            [full if mask is None else mask.for_head(head, call.heads) for head in range(first, first + group)]
            for mask in (call.policy, kept)
        )
        (wanted, _), (chosen, _) = choosing_together(asked), choosing_together(built)
        if wanted is not None and wanted != chosen:
            raise SparseCacheError(
                f"layer {layer} of the SparseCache was not built for {wanted}: build the cache from the policy of the model"
            )
        if chosen is not None and chosen.every > 1 and any(a & b != b for a, b in zip(asked, built, strict=True)):
            raise SparseCacheError(
                f"layer {layer} of the SparseCache uses choices again ({chosen}), and this model's policy {call.policy} is not "
                "that of the cache: build the cache from the policy of the model, or let every be 1"
            )


def _check_selection(call: AttentionCall, storage: Pages, by_head: bool) -> None:
    """Raise unless heads that share their pages also share the model's masks and scores."""
    if storage.selecting is not None and by_head:
        raise SparseCacheError(
            f"layer {plan_of(call).layer} of the SparseCache chooses pages, and the model has a mask or score mod for each "
            f"head ({call.mask}, {call.score_mod}): give this layer a policy without page_topk"
        )


def _size_of(size: Any, inputs: list[Node]) -> int | tuple[int, int | None]:
    """Where a size of the graph can be read when it runs."""
    if isinstance(size, int):
        return size
    for number, node in enumerate(inputs):
        value = value_of(node)
        if isinstance(value, torch.SymInt) and value.node.expr == size.node.expr:
            return number, None
        for axis, there in enumerate(getattr(value, "shape", ())):
            if expr_of(there) == size.node.expr:
                return number, axis
    raise SparseCacheError(f"a SparseCache takes batch and length from the inputs of the model, and {size} is not one")
