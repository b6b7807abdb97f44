"""Split calls over a SparseCache by storage, and write the new positions at the end of the graph."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from sparse_compile.masks import causal, full
from sparse_compile.masks.lengthen import lengthened
from sparse_compile.masks.selection.page_topk import has_selector
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_nodes import expr_of, hint_of, op_name, value_of
from sparse_compile.passes.ir.kv_source import Cached
from sparse_compile.passes.ir.left import Refused
from sparse_compile.passes.ir.rewrite import CacheUse, HeldBytes, Rewrite
from sparse_compile.passes.ir.scalars import without_exact_divisions
from sparse_compile.passes.kv.checks import check_choice, check_storage, check_updates
from sparse_compile.passes.kv.computed_keys import check_plan, read_back
from sparse_compile.passes.kv.find_caches import read_update, updates_of
from sparse_compile.passes.kv.split_by_storage import over_computed_keys, query_heads, split_by_storage
from sparse_compile.passes.kv.token_positions import TokenPositions
from sparse_compile.passes.ops.cache.cache_update import CacheUpdate, SparseCacheError
from sparse_compile.passes.torch_private import real_tensors


def expand_cache(rewrite: Rewrite) -> int:
    """Split every call over a ``SparseCache`` into storage groups; returns the number of groups.

    Raises ``Refused`` if the cache does not fit the model, or if anything but rewritten attention uses it.
    """
    try:
        _expand(rewrite)
    except (SparseCacheError, ValueError) as error:
        raise Refused(error) from error
    for call in rewrite.calls:
        if not isinstance(call.kv, Cached) and call.phase == "decode" and has_selector(call.policy):
            raise Refused(
                SparseCacheError(
                    f"page_topk in a decode step needs a SparseCache, but {call.name} runs {call.policy} without one: pass "
                    "past_key_values=SparseCache(config, policy, max_length=...), or give decode steps another mask with "
                    "Policy(decode=...)"
                )
            )
    return sum(map(len, rewrite.storage_groups.values()))


def _expand(rewrite: Rewrite) -> None:
    updates = updates_of(rewrite.gm)
    check_updates(updates, {call.kv.update for call in rewrite.calls if isinstance(call.kv, Cached)}, rewrite.left)
    for node in rewrite.gm.graph.nodes if updates else ():
        if op_name(node) == "_set_grad_enabled":  # the end of a no_grad() inside the model; a cache has no gradients anyway
            node.args = (False,)
    caches: dict[Node, list[tuple[Attention, CacheUpdate[Node]]]] = {}
    for call in rewrite.calls:
        if isinstance(call.kv, Cached):
            update = read_update(call.kv.update)
            caches.setdefault(update.columns, []).append((call, update))
    replaced: dict[Node, Attention] = {}
    nodes = rewrite.call_nodes
    for served in caches.values():
        positions = TokenPositions(*served[0], [call for call, _ in served])
        for call, update in served:
            assert isinstance(call.kv, Cached)
            source, is_prompt = call.kv, call.kv.is_prompt
            call = _with_policy(call, update)
            if source.is_computed:
                check_plan(update.plan)
                call = replace(call, kv=read_back(call, source, update, positions.columns, nodes))
                replaced[call.node] = call
                rewrite.storage_groups[call.node] = over_computed_keys(call, update, positions, is_prompt=is_prompt)
                rewrite.held[call.node] = _held(update)
                continue
            for storage in update.plan.storages:
                check_storage(call, update.plan, storage, query_heads(call, storage))
            replaced[call.node] = call
            rewrite.storage_groups[call.node] = split_by_storage(call, update, positions, is_prompt=is_prompt)
            rewrite.held[call.node] = _held(update)
        rewrite.cache_uses.append(_finish(positions, served))
    rewrite.calls = [replaced.get(call.node, call) for call in rewrite.calls]


def _with_policy(call: Attention, update: CacheUpdate[Node]) -> Attention:
    """The call under the policies of both the cache and the backend."""
    plan = update.plan
    of_cache = plan.policy(call.phase)
    built_for = full if of_cache is None else of_cache
    if call.phase == "decode":
        check_choice(call, plan, built_for)
    with real_tensors():
        covering = lengthened(built_for, plan.columns)
    # Both are one mask as a rule. The model's own may cover less than the cache, whose tokens may then be fewer as well.
    policy = covering if call.policy == built_for else covering & call.policy
    policy.for_heads(call.heads)  # raises if the head count fits neither query nor KV heads
    # A cache is always causal, so a causal policy changes nothing.
    return replace(call, policy=full if policy in (full, causal) else policy)


def _held(update: CacheUpdate[Node]) -> HeldBytes:
    """The bytes of keys and values of each KV head, the bytes of a dense cache, and the tokens of both."""
    plan, dense = update.plan, 0
    heads: dict[int, int] = {}
    for number, storage in enumerate(plan.storages):
        held = [value_of(buffer) for buffer in update.buffers_of(number)]
        for buffer in held:
            dense += hint_of(buffer.shape[0]) * hint_of(buffer.shape[3]) * buffer.itemsize * len(storage.heads) * plan.columns
        if storage.forms is not None:
            held += [value_of(part) for quantized in update.quantized_of(number) for part in quantized.used()]
        size = sum(math.prod(map(hint_of, x.shape)) * x.itemsize for x in held)
        heads |= {head: size // len(storage.heads) for head in storage.heads}
    tokens = plan.columns * hint_of(value_of(update.buffers[0]).shape[0])
    return HeldBytes(tuple(heads[head] for head in sorted(heads)), dense, tokens)


def _finish(positions: TokenPositions, served: list[tuple[Attention, CacheUpdate[Node]]]) -> CacheUse:
    """Write the new positions if this graph has the last layer; returns what a run of the graph does to the cache."""
    plans = [update.plan for _, update in served]
    last = next((plan for plan in plans if plan.last), None)
    if last is not None:
        positions.finish(last)
    first = served[0][0]
    inputs = [node for node in first.node.graph.nodes if node.op == "placeholder"]
    batch, tokens = _input_size(first.batch, inputs), _input_size(first.q_len, inputs)
    empty = any(isinstance(call.kv, Cached) and call.kv.is_prompt and not update.plan.rotation for call, update in served)
    layers = tuple(plan.layer for plan in plans)
    return CacheUse(inputs.index(positions.state.columns), batch, tokens, layers, last is not None, empty)


def _input_size(size: Any, inputs: list[Node]) -> int | tuple[int, int | None]:
    """A size of the graph as a number, or as the input and axis from which it can be read when the graph runs."""
    if isinstance(size, int):
        return size
    wanted = without_exact_divisions(expr_of(size))
    for number, node in enumerate(inputs):
        value = value_of(node)
        if isinstance(value, torch.SymInt) and value.node.expr == wanted:
            return number, None
        for axis, length in enumerate(getattr(value, "shape", ())):
            if expr_of(length) == wanted:
                return number, axis
    raise SparseCacheError(
        f"a SparseCache needs batch size and length to be sizes of the graph's inputs, but one (here {hint_of(size)}) is "
        "computed in the graph: compile without dynamic=True, or pass inputs of these sizes"
    )
