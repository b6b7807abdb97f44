"""Check that a cache can serve a call: the model it was built for, the keys it holds, and the pages it selects."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from sparse_compile.masks import Mask, full
from sparse_compile.masks.patterns.tensor import Explicit
from sparse_compile.masks.selection.page_topk import choosing_together
from sparse_compile.masks.unknown_tensors import without_tensors
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_nodes import value_of
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.kv.find_caches import read_update
from sparse_compile.passes.ops.block_tables import Q_START
from sparse_compile.passes.ops.cache.cache_update import CacheUpdate, SparseCacheError
from sparse_compile.passes.storage.layer_plan import LayerPlan, Storage, misfit, needed_past


def check_updates(updates: Sequence[Node], served: set[Node], left: Sequence[Left]) -> None:
    """Raise ``ValueError`` for tensors and layers that a cache was not built for, ``SparseCacheError`` if no call reads it."""
    for update in map(read_update, updates):
        _check_fit(update)
    _check_layers(updates)
    if any(update not in served for update in updates):
        reasons = "; ".join(f"{call.node.name}: {call.reason}" for call in left) or "no attention call reads it"
        raise SparseCacheError(
            f"a SparseCache needs attention that the passes can rewrite, but here attention is left as it is: {reasons}. "
            "Use a DynamicCache with this model"
        )


def _check_fit(update: CacheUpdate[Node]) -> None:
    if why := misfit(value_of(update.k), value_of(update.v), [value_of(b) for b in update.buffers], update.plan):
        raise ValueError(why)


def _check_layers(updates: Sequence[Node]) -> None:
    """Raise if a layer takes new tokens twice. A layer beyond the cache's last one is taken for the last one."""
    seen: list[tuple[Node, int]] = []
    for update in map(read_update, updates):
        layer, key = update.plan.layer, (update.columns, update.plan.layer)
        if key in seen and not update.plan.last:
            raise ValueError(
                f"layer {layer} of the model updates the SparseCache twice, as a decoder with cross-attention does: pass "
                "EncoderDecoderCache(cache, DynamicCache()) of transformers if there is an encoder, or use a DynamicCache"
            )
        if key in seen:
            raise ValueError(
                f"the model has more layers than the {layer + 1} of the cache, or its layer {layer} updates the cache twice: "
                "build the cache from the config of this model"
            )
        seen.append(key)


def check_storage(call: Attention, plan: LayerPlan, storage: Storage, heads: tuple[int, ...]) -> None:
    """Raise ``SparseCacheError`` if a storage cannot serve the query heads ``heads`` of a call."""
    explicit = [node for node in call.mask.walk() if isinstance(node, Explicit)]
    mods = call.score_mod.parts() if call.score_mod is not None else ()
    by_head = any(call.sources[str(node.visible)].shape[1] != 1 for node in explicit) or any(mod.captures() for mod in mods)
    if len(plan.storages) > 1 and by_head:
        raise SparseCacheError(
            f"layer {plan.layer} of the SparseCache stores its heads in several ways, which needs one mask and score mod for "
            f"all heads, but the model has one for each head ({call.mask}, {call.score_mod}): give all heads of this layer one "
            "policy"
        )
    if storage.selection is not None and by_head:
        raise SparseCacheError(
            f"layer {plan.layer} of the SparseCache selects pages, which needs one mask and score mod for all heads, but the "
            f"model has one for each head ({call.mask}, {call.score_mod}): give this layer a policy without page_topk"
        )
    if not storage.holds_every_key:
        _check_ring(call, plan, storage, heads, plan.model if explicit else call.mask)


def _check_ring(call: Attention, plan: LayerPlan, ring: Storage, heads: tuple[int, ...], model: Mask) -> None:
    if call.score_mod is not None and Q_START in call.score_mod.captures():
        raise SparseCacheError(
            f"layer {plan.layer} of the SparseCache keeps a ring, whose keys are out of order, but the score mod "
            f"{call.score_mod} needs keys in order: give this layer a policy that keeps every key"
        )
    # The cache was planned for the masks of the model's config and of its own policy. Every further mask only hides more, but
    # the sink and window that are left may be another pair: of a window of 8 tokens, two sink tokens and the last 4.
    of_cache = plan.policy(call.phase)
    built_for = full if of_cache is None else of_cache
    shown: dict[tuple[Mask, ...], int] = {}
    for head in heads:
        masks = [policy.for_head(head, call.heads) for policy in (call.policy, built_for)]
        shown.setdefault((model & masks[0], model & masks[1], masks[0]), head)
    for masks_of_head, head in shown.items():
        if all(ring.shortage(needed_past(without_tensors(mask), plan.mode, plan.columns)) for mask in masks_of_head):
            raise SparseCacheError(
                f"layer {plan.layer} of the cache keeps {ring.holding()} for "
                f"query head {head}, but its mask {masks_of_head[0]} shows more: build the SparseCache from the config and the "
                "policy of this model"
            )


def check_choice(call: Attention, plan: LayerPlan, built_for: Mask) -> None:
    """Raise ``SparseCacheError`` if the policy of a decode step needs a page selection that its cache does not have.

    ``built_for`` is the mask of the policy that the cache was built from. A cache that reuses a selection (``every`` > 1)
    cannot serve a narrower policy either, because the pages were selected under ``built_for``.
    """
    for first in range(0, call.heads if call.policy != full else 0, call.group):
        of_call, of_cache = (
            [mask.for_head(head, call.heads) for head in range(first, first + call.group)] for mask in (call.policy, built_for)
        )
        (needed, _), (selector, _) = choosing_together(of_call), choosing_together(of_cache)
        if needed is not None and needed != selector:
            raise SparseCacheError(
                f"layer {plan.layer} of the SparseCache was not built for {needed}: build the cache from the policy of the "
                "model"
            )
        if selector is not None and selector.every > 1 and any(a & b != b for a, b in zip(of_call, of_cache, strict=True)):
            raise SparseCacheError(
                f"layer {plan.layer} of the SparseCache reuses its page selection ({selector}), which needs one policy for "
                f"model and cache, but the model has {call.policy}: build the cache from that policy, or set every=1"
            )
