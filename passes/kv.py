"""Attention over a ``SparseCache``: one call for each way in which its heads are kept, and the writes of the new tokens.

Heads that keep everything are a static cache of their own: a buffer ``[B, heads, slots, D]`` with column ``n`` in slot ``n``.
Heads of a ring see ``[ring in the order of its text | chunk]`` in a prefill and the ring as it lies in a decode step, under
masks that look positions up (``Placed``). One buffer for each way rather than one pool with page lists for all: a group of
equal heads is an ordinary dense tensor, which every kernel reads at full speed (SDPA and FlexAttention's C++ template read
no page lists, and the template ignores where a view begins).

All layers share the positions of a cache. They change at the end of the graph that holds its last layer, after everything
that reads them: Inductor may sink a read below a write in the middle of a graph, and positions would silently be off.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn.functional import scaled_dot_product_attention

from sparse_compile.masks import Captured, Mask, causal, full, per_head
from sparse_compile.masks.given import Explicit
from sparse_compile.masks.placed import placed, relaxed
from sparse_compile.masks.serial import to_json
from sparse_compile.masks.unknown import without_tensors
from sparse_compile.passes.cache_ops import (
    SparseCacheError,
    cache_tokens,
    page_positions,
    ring_chunk,
    ring_step,
)
from sparse_compile.passes.call import AttentionCall, Left
from sparse_compile.passes.graph import emit, emit_int, expr_of, inline, is_one, memory_of, op_name, value_of
from sparse_compile.passes.heads import join_heads, pick_heads
from sparse_compile.passes.positions import Positions
from sparse_compile.passes.storage import LayerPlan, Pages, Ring, Storage, needed_past
from sparse_compile.passes.tables import Q_START, given
from sparse_compile.passes.words import Source

Phase = Callable[[AttentionCall], str]


@dataclass(frozen=True)
class CacheUse:
    """What one run of a graph does to a cache, for its books on the host.

    ``argument`` is the number of the graph input that counts the columns; ``batch`` and ``tokens`` are the sizes of the new
    keys: a number, or the input and axis they can be read from (no axis: the input is the number). An ``empty`` cache is
    what the graph was traced for.
    """

    argument: int
    batch: int | tuple[int, int | None]
    tokens: int | tuple[int, int | None]
    layers: tuple[int, ...]
    last: bool
    empty: bool


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
    columns = _columns(update)
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


def _columns(update: Node) -> Node:
    node = update.args[2]
    assert isinstance(node, Node)
    return node


def keep(
    gm: GraphModule, calls: list[AttentionCall], left: list[Left], phase_of: Phase
) -> tuple[list[AttentionCall], list[CacheUse]]:
    """Cut every call over a cache into pieces and emit the writes. Returns all calls, and what is done to which cache."""
    served = {call.cache for call in calls if call.cache is not None}
    updates = [node for node in gm.graph.nodes if op_name(node) == "cache_update"]
    if any(update not in served for update in updates):
        reasons = "; ".join(f"{call.node.name}: {call.reason}" for call in left) or "no attention call reads it"
        raise SparseCacheError(
            f"a SparseCache is read by attention that the passes understand, and here it is not: {reasons}. "
            "Use a DynamicCache with this model"
        )
    caches: dict[Node, _Cache] = {}
    result = []
    for call in calls:
        if call.cache is None:
            result.append(call)
            continue
        cache = caches.setdefault(_columns(call.cache), _Cache(gm, calls))
        result.append(cache.keep(call, phase_of(call)))
    return result, [use for cache in caches.values() for use in cache.finish()]


class _Cache:
    """One cache in one graph: the positions of the new tokens, computed once for all layers."""

    def __init__(self, gm: GraphModule, calls: list[AttentionCall]) -> None:
        self.gm, self.graph = gm, gm.graph
        self.calls = calls
        self.first: AttentionCall | None = None
        self.plans: list[LayerPlan] = []
        self.steps: dict[int, tuple[Node, ...]] = {}
        self.page_texts: Node | None = None
        self.empty = False

    # -- once for each cache ----------------------------------------------------------------------------------------

    def _begin(self, call: AttentionCall) -> None:
        """Columns and text positions of the new tokens."""
        self.first = call
        assert call.cache is not None
        arguments: Any = call.cache.args
        k, _, columns, texts, pages, rings, _, _ = arguments
        self.k, self.columns, self.texts, self.pages, self.rings = k, columns, texts, pages, list(rings)
        self.point = call.cache
        self.one = is_one(call.size("q", 2))
        # The mask that says what is padding: any of the layers', as tokens are padding for all of them.
        own = [c for c in self.calls if c.cache is not None and _columns(c.cache) is columns]
        padded = next((c for c in own if c.mask is not None and c.mask.captures()), None)
        self.padded = padded is not None
        mask, captures, point = "", [], call.cache
        if padded is not None:
            assert padded.mask is not None
            mask = to_json(padded.mask)
            sources = [padded.sources[name.name] for name in given(padded.mask)]
            captures = [inline(point, source.read, source.node) for source in sources]
        tokens = self._op(cache_tokens, k, columns, texts, mask, captures)
        self.column, self.text, self.new_texts = (self._op(operator.getitem, tokens, n) for n in range(3))

    def _op(self, op: Any, *args: Any) -> Node:
        return emit(self.point, op if op is operator.getitem else op._opoverload, *args)

    def _step(self, ring: int, sink: int) -> tuple[Node, ...]:
        """The positions of ring ``ring`` with the new tokens: ``ring_step`` or ``ring_chunk``."""
        if ring not in self.steps:
            state = self.rings[2 * ring], self.rings[2 * ring + 1], sink, self.column, self.text
            made = self._op(ring_step, *state) if self.one else self._op(ring_chunk, *state, self.new_texts)
            count = 4 if self.one else 6
            self.steps[ring] = tuple(self._op(operator.getitem, made, n) for n in range(count))
        return self.steps[ring]

    def _new_page_texts(self) -> Node:
        if self.page_texts is None:
            self.page_texts = self._op(page_positions, self.pages, self.column, self.text)
        return self.page_texts

    def finish(self) -> list[CacheUse]:
        """The new positions, written where the graph ends, if this graph has the last layer."""
        plan = self.plans[-1]
        last = any(p.last for p in self.plans)
        assert self.first is not None
        if last:
            if self.pages is not None:
                self._new_page_texts()
            for ring, (sink, _) in enumerate(plan.rings):
                self._step(ring, sink)
            self.point = next(iter(reversed(self.graph.nodes)))
            with self.graph.inserting_before(self.point):
                count = emit_int(self.graph, expr_of(self.first.size("q", 2)), self.point)
                self.graph.call_method("add_", (self.columns, count))
            self._commit(self.texts, self.new_texts)
            if self.page_texts is not None:
                self._commit(self.pages, self.page_texts)
            for ring, step in self.steps.items():
                for state, new in zip(self.rings[2 * ring : 2 * ring + 2], step[:2] if self.one else step[4:], strict=True):
                    self._commit(state, new)
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        where = [_size_of(self.first.size("q", axis), inputs) for axis in (0, 2)]
        layers = tuple(plan.layer for plan in self.plans)
        return [CacheUse(inputs.index(self.columns), where[0], where[1], layers, last, self.empty)]

    def _commit(self, state: Any, new: Node) -> None:
        """Write ``new`` to the rows in use of ``state``."""
        count = self._row_count()
        with self.graph.inserting_before(self.point):
            if count == value_of(state).shape[0]:
                self.graph.call_method("copy_", (state, new))
            else:
                self.graph.call_function(operator.setitem, (state, slice(0, count), new))

    # -- one call ---------------------------------------------------------------------------------------------------

    def keep(self, call: AttentionCall, phase: str) -> AttentionCall:
        """The call as pieces, one for each way in which its heads are kept, joined where the call stood."""
        if self.first is None:
            self._begin(call)
        assert call.cache is not None
        plan = LayerPlan.from_text(str(call.cache.args[7]))
        self.plans.append(plan)
        kept = plan.policy(phase)
        policy = kept if call.policy is None else call.policy if kept is None else kept & call.policy
        if policy is not None:
            policy.for_heads(call.heads)  # a head count that fits neither query nor KV heads is an error
        # A cache is causal anyway, and a policy that says no more than that changes nothing.
        call = replace(call, policy=None if policy in (full, causal) else policy)
        pieces, groups = [], []
        for number, storage in enumerate(plan.storages):
            group = call.heads // call.kv_heads
            heads = tuple(h * group + g for h in storage.heads for g in range(group))
            whole = len(heads) == call.heads
            if not whole:
                self._check_heads(call, plan)
            self._check(call, plan, storage, heads)
            pieces.append(self._piece(call, plan, storage, number, heads, whole))
            groups.append(heads)
        out = pieces[0].node if len(pieces) == 1 else join_heads(call.node, groups, [piece.node for piece in pieces])
        out.meta.setdefault("example_value", value_of(call.node))
        call.node.replace_all_uses_with(out)
        return replace(call, pieces=tuple(pieces))

    def _check_heads(self, call: AttentionCall, plan: LayerPlan) -> None:
        """Refuse to part heads that the model itself tells apart."""
        assert call.mask is not None
        visible = [call.sources[str(n.visible)] for n in call.mask.walk() if isinstance(n, Explicit)]
        mods = call.score_mod.parts() if call.score_mod is not None else ()
        if any(source.shape[1] != 1 for source in visible) or any(mod.captures() for mod in mods):
            raise SparseCacheError(
                f"layer {plan.layer} keeps its heads in different ways, and the model has a mask or a score mod of its own for "
                f"each head ({call.mask}, {call.score_mod}): give all heads of this layer one mask"
            )

    def _check(self, call: AttentionCall, plan: LayerPlan, storage: Storage, heads: tuple[int, ...]) -> None:
        """Refuse to read from a ring what it does not keep."""
        if isinstance(storage, Pages):
            return
        assert call.mask is not None
        model = call.mask if not any(isinstance(node, Explicit) for node in call.mask.walk()) else plan.model
        for head in dict.fromkeys(heads):
            seen = model if call.policy is None else model & call.policy.for_head(head, call.heads)
            past = needed_past(without_tensors(seen.for_head(head, call.heads)), plan.mode, plan.max_length)
            if past is None or past.sink > storage.sink or past.recent > storage.recent:
                raise SparseCacheError(
                    f"layer {plan.layer} of the cache keeps the first {storage.sink} and the last {storage.recent} tokens for "
                    f"query head {head}, but its mask {seen} shows more: build the SparseCache from the config and the "
                    "policy of this model"
                )
            if call.score_mod is not None and Q_START in call.score_mod.captures():
                raise SparseCacheError(
                    f"layer {plan.layer} keeps a ring, whose keys stand out of order, and its score mod {call.score_mod} reads "
                    "positions: give this layer a policy that keeps every key"
                )

    def _piece(
        self, call: AttentionCall, plan: LayerPlan, storage: Storage, number: int, heads: tuple[int, ...], whole: bool
    ) -> AttentionCall:
        """The attention of some heads: their keys and values where they are kept, and the mask over those."""
        assert call.cache is not None and call.mask is not None
        self.point = call.node
        buffers: Any = call.cache.args[6]
        new = [pick_heads(call.node, x, None if whole else storage.heads) for x in call.cache.args[:2]]  # type: ignore[arg-type]
        kept = buffers[2 * number : 2 * number + 2]
        sources = dict(call.sources)
        policy = self._policy(call, heads, whole)
        if call.cache_was_empty:
            self.empty = True
            k, v = new
            self._fill(kept, new, plan, storage)
            mask, positions = call.mask & policy, call.positions
        elif isinstance(storage, Pages):
            k, v = (self._append(buffer, x) for buffer, x in zip(kept, new, strict=True))
            mask = self._paged_mask(call.mask, policy, plan, sources)
            positions = call.positions
        else:
            k, v, mask = self._ring(kept, new, plan, storage, call.mask, policy, sources)
            positions = Positions()
        q = pick_heads(call.node, call.q, None if whole else heads)
        grouped = call.heads != call.kv_heads

        def attend(q: Any, k: Any, v: Any) -> Any:
            return scaled_dot_product_attention(q, k, v, scale=call.scale, enable_gqa=grouped)

        node = inline(call.node, attend, q, k, v)
        node.meta["nn_module_stack"] = call.node.meta.get("nn_module_stack")
        where: dict[str, Any] = {"mask": mask, "policy": None, "positions": positions, "sources": sources, "cache": None}
        return replace(call, node=node, q=q, k=k, v=v, **where)

    def _policy(self, call: AttentionCall, heads: tuple[int, ...], whole: bool) -> Mask:
        if call.policy is None:
            return full
        masks = [call.policy.for_head(head, call.heads) for head in heads]
        return masks[0] if len(set(masks)) == 1 else per_head(masks)

    def _fill(self, kept: list[Node], new: list[Node], plan: LayerPlan, storage: Storage) -> None:
        """Write the first tokens, which attend to one another as they are."""
        for buffer, x in zip(kept, new, strict=True):
            if isinstance(storage, Pages):
                self._append(buffer, x)
            else:
                order, _, _, source, *_ = self._step(plan.rings.index((storage.sink, storage.slots)), storage.sink)
                self._behind(buffer, x, order, source)

    # -- pages ------------------------------------------------------------------------------------------------------

    def _append(self, buffer: Node, new: Node) -> Node:
        """The rows in use of a buffer of pages, with new tokens ``[B, H, Q, D]`` at their columns."""
        rows = value_of(new).shape[0]
        if isinstance(rows, int) and rows == value_of(buffer).shape[0]:
            inline(self.point, lambda buffer, column, new: buffer.index_copy_(2, column[0], new), buffer, self.column, new)
            return buffer
        # Not ``buffer[:rows].index_copy_``: a write to a view becomes a copy of the whole buffer.
        self._put(buffer, self.column, new)
        return self._rows(buffer)

    def _put(self, buffer: Node, slot: Node, new: Node) -> None:
        """New tokens at their slots of the rows in use."""
        device, (_, heads, _, _) = value_of(buffer).device, value_of(buffer).shape
        row, head = (emit(self.point, torch.arange, n, device=device) for n in (self._row_count(), heads))

        def put(buffer: Any, row: Any, head: Any, slot: Any, new: Any) -> Any:
            return buffer.index_put_((row.view(-1, 1, 1), head.view(1, -1, 1), slot.unsqueeze(1)), new)

        inline(self.point, put, buffer, row, head, slot, new)

    def _row_count(self) -> int | Node:
        """How many rows of the cache are in use."""
        assert self.first is not None
        with self.graph.inserting_before(self.point):
            count = emit_int(self.graph, expr_of(self.first.size("q", 0)), self.point)
        assert count is not None
        return count

    def _rows(self, buffer: Node) -> Node:
        """The rows in use of a buffer."""
        count = self._row_count()
        if count == value_of(buffer).shape[0]:
            return buffer
        rows: Node = inline(self.point, lambda buffer, count: buffer[:count], buffer, count)
        return rows

    def _paged_mask(self, model: Mask, policy: Mask, plan: LayerPlan, sources: dict[str, Source]) -> Mask:
        """Text and columns are one unless there is padding; then the policy looks the text up."""
        if policy in (full, causal) or model.implies(policy):
            return model & policy
        if not self.padded:
            if plan.mode == "chunk_relaxed":
                policy = relaxed(policy, _capture(sources, self.columns, Source(self.columns, (), (), (None,))))
            return model & policy
        texts = _capture(sources, self._new_page_texts())
        return model & placed(self._relaxed(policy, plan, sources), texts, texts, ordered=True)

    def _relaxed(self, policy: Mask, plan: LayerPlan, sources: dict[str, Source]) -> Mask:
        if plan.mode == "strict" or policy in (full, causal):
            return policy
        before = inline(self.point, lambda texts, rows: texts[: rows.shape[0]], self.texts, self.column)
        return relaxed(policy, _capture(sources, before))

    # -- rings ------------------------------------------------------------------------------------------------------

    def _ring(
        self,
        kept: list[Node],
        new: list[Node],
        plan: LayerPlan,
        storage: Ring,
        model: Mask,
        policy: Mask,
        sources: dict[str, Source],
    ) -> tuple[Node, Node, Mask]:
        """Keys and values of a ring with the new tokens, and the mask over their places."""
        ring = plan.rings.index((storage.sink, storage.slots))
        step = self._step(ring, storage.sink)
        if self.one:
            texts, columns, slot, keeps = step
            empty = storage.slots == storage.sink
            k, v = (
                self._write(buffer, x, slot, keeps if self.padded or empty else None)
                for buffer, x in zip(kept, new, strict=True)
            )
        else:
            order, texts, columns, source, *_ = step
            k, v = (self._behind(buffer, x, order, source) for buffer, x in zip(kept, new, strict=True))
        policy = self._relaxed(policy, plan, sources)
        by_text = _capture(sources, self.text), _capture(sources, texts)
        ordered = not self.one
        if not model.captures():
            return k, v, placed(model & policy, *by_text, ordered=ordered)
        # The model's own mask counts columns, padding included; a tensor of it begins at the first new column.
        begin = _capture(sources, self.columns, Source(self.columns, (), (), (None,)))
        by_column = placed(model.bind({Q_START: begin}), _capture(sources, self.column), _capture(sources, columns), ordered)
        return k, v, by_column & placed(policy, *by_text, ordered=ordered)

    def _write(self, buffer: Node, new: Node, slot: Node, keeps: Node | None) -> Node:
        """The rows in use of a ring, with one new token in each."""
        _, heads, _, dim = value_of(buffer).shape
        if keeps is not None:

            def unless_kept(rows: Any, new: Any, slot: Any, keeps: Any) -> Any:
                return torch.where(keeps[:, None, :, None], _gathered(rows, slot, heads=heads, dim=dim), new)

            new = inline(self.point, unless_kept, self._rows(buffer), new, slot, keeps)
        self._put(buffer, slot, new)
        return self._rows(buffer)

    def _behind(self, buffer: Node, new: Node, order: Node, source: Node) -> Node:
        """What a chunk attends to: the ring in order and the chunk behind it. The ring takes from it what it keeps."""
        _, heads, _, dim = value_of(buffer).shape

        def in_order(rows: Any, order: Any, new: Any) -> Any:
            return torch.cat([_gathered(rows, order, heads=heads, dim=dim), new], dim=2)

        keys: Node = inline(self.point, in_order, self._rows(buffer), order, new)
        kept = inline(self.point, lambda keys, source: _gathered(keys, source, heads=heads, dim=dim), keys, source)
        self._commit(buffer, kept)
        return keys


def _gathered(x: Any, slot: Any, *, heads: int, dim: int) -> Any:
    """``x`` ``[B, H, N, D]`` at ``slot`` ``[B, n]``."""
    return x.gather(2, slot[:, None, :, None].expand(-1, heads, -1, dim))


def _capture(sources: dict[str, Source], node: Any, source: Source | None = None) -> Captured:
    """A symbol for a tensor of the graph, or for what ``source`` reads of it."""
    axes = len(value_of(node).shape)
    source = source or Source(node, (slice(None),) * axes, tuple(range(axes)), (slice(None),) * axes)
    name = f"{node.name}_kept"
    while sources.setdefault(name, source) != source:
        name += "_"
    return Captured.symbol(name)


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
