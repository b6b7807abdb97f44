"""Find the calls whose keys and values come from a ``SparseCache``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from torch.fx import GraphModule, Node

from sparse_compile.masks import causal
from sparse_compile.masks.patterns.tensor import Explicit
from sparse_compile.passes.ir.attention import Attention, phase_of
from sparse_compile.passes.ir.fx_nodes import expr_of, memory_of, op_name, value_of
from sparse_compile.passes.ir.kv_source import Cached, Dense
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.positions import Positions
from sparse_compile.passes.ir.rewrite import Rewrite
from sparse_compile.passes.kv.computed_keys import computed_from
from sparse_compile.passes.ops.cache.cache_update import CacheUpdate, cache_update


def find_caches(rewrite: Rewrite) -> int:
    """Give every call over a ``SparseCache`` a ``Cached`` source; returns the number of such calls."""
    updates, nodes = updates_of(rewrite.gm), rewrite.call_nodes
    rewrite.keep([_with_cache(call, updates, nodes) for call in rewrite.calls])
    return sum(isinstance(call.kv, Cached) for call in rewrite.calls)


def reads_cache(gm: GraphModule) -> bool:
    """Whether the graph updates a SparseCache."""
    return bool(updates_of(gm))


def updates_of(gm: GraphModule) -> list[Node]:
    """The nodes that update a layer of a SparseCache."""
    return [node for node in gm.graph.nodes if op_name(node) == "cache_update"]


def read_update(node: Node) -> CacheUpdate[Node]:
    """The operands of a node that updates a layer of a SparseCache."""
    operands: CacheUpdate[Any] = cache_update.build(node.args)
    return operands


def _with_cache(call: Attention, every: Sequence[Node], calls: Collection[Node]) -> Attention | Left:
    """The call with the cache update that its keys come from, and with positions counted in columns of that cache."""
    assert isinstance(call.kv, Dense)
    sides = (call.kv.k, call.kv.v)
    sliced = [_first_tokens(x, call) for x in sides]
    updates = [_update_of(first or x) for first, x in zip(sliced, sides, strict=True)]
    is_computed = None in updates
    if is_computed:
        updates = [_source_of(call, every, calls)] * 2
    if updates == [None, None]:
        return call
    update = updates[0]
    if update is None or updates[1] is not update:
        return Left(call.node, "its keys and values need to come from one update of a SparseCache, and they do not")
    read = read_update(update)
    start, at, verifies = read.columns, call.positions, read.plan.verifies
    if all(sliced) and call.mask.implies(causal) and at == Positions():
        # Transformers slices the keys of the new tokens like this for an empty cache, and only then.
        return _over(call, Cached(*sides, update, is_prompt=True, is_computed=is_computed), at)
    reads_index = any(isinstance(node, Explicit) for node in call.mask.walk())
    counted = at.q_shift is not None and memory_of(at.q_shift) is start and at.q_start == 0 == at.kv_start
    if not counted and not (reads_index and at.q_shift is None):
        return Left(call.node, f"its mask {call.mask} needs positions that the SparseCache counts, and has {at}")
    if not reads_index and not call.mask.implies(causal):
        return Left(call.node, f"a SparseCache needs causal self-attention, and the mask of this call is {call.mask}")
    kv = Cached(*sides, update, is_prompt=False, is_computed=is_computed, verifies=verifies)
    return _over(call, kv, Positions(q_shift=start))


def _source_of(call: Attention, every: Sequence[Node], calls: Collection[Node]) -> Node | None:
    """The update from whose outputs the model computes both keys and values of a call; None if there is none."""
    assert isinstance(call.kv, Dense)
    sides = {call.kv.k, call.kv.v}
    return next((update for update in every if sides <= set(computed_from(update, call.node, calls))), None)


def _over(call: Attention, kv: Cached, positions: Positions) -> Attention:
    phase = phase_of(call.q_len, kv, call.mask, is_self_attention=True)
    return replace(call, kv=kv, positions=positions, phase=phase, is_self_attention=True, unplaced="")


def _first_tokens(node: Node, call: Attention) -> Node | None:
    """``x`` if ``node`` is ``x[:, :, :q_len, :]``, with as many keys as there are queries; else None."""
    everything = slice(None, None, None)
    index: Any = node.args[1] if op_name(node) == "getitem" else None
    if not (isinstance(index, tuple) and len(index) == 4 and all(isinstance(part, slice) for part in index)):
        return None
    same = expr_of(value_of(node).shape[2]) == expr_of(call.q_len)
    rest = [part for axis, part in enumerate(index) if axis != 2]
    source = node.args[0]
    return source if same and rest == [everything] * 3 and index[2].start is None and isinstance(source, Node) else None


def _update_of(node: Node) -> Node | None:
    """The ``cache_update`` node that ``node`` is an output of; None if there is none."""
    while op_name(node) in ("contiguous", "clone", "detach") and isinstance(node.args[0], Node):
        node = node.args[0]
    source = node.args[0] if op_name(node) == "getitem" else None
    return source if isinstance(source, Node) and op_name(source) == "cache_update" else None
