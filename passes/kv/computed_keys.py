"""Find keys and values that a model computes from what a cache holds, as from the latent vectors of DeepSeek.

Such a model caches one narrow vector for each token and expands it into the keys and values of all heads after each update. The
cache then holds every token in pages, and the update returns what the pages hold, so the model expands that.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch.fx import Node

from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_nodes import aliases, is_in_place, memory_of, op_name
from sparse_compile.passes.ir.kv_source import Cached
from sparse_compile.passes.ir.rows.cache_rows import put_tokens, rows_in_use
from sparse_compile.passes.ops.cache.cache_update import CacheUpdate, SparseCacheError
from sparse_compile.passes.storage.layer_plan import LayerPlan


def computed_from(update: Node, call: Node, others: Collection[Node]) -> list[Node]:
    """The nodes before ``call`` that depend on the outputs of ``update``, in order, but not through the calls ``others``.

    Memory that is filled with such values depends on them as well, and so do all views of it.
    """
    between: list[Node] = []
    node = update.next
    while node is not call and node.op != "output":
        between.append(node)
        node = node.next
    found, size = {update}, 0
    while len(found) > size:
        size = len(found)
        for node in between:
            if node not in others and op_name(node) != "cache_update" and not found.isdisjoint(node.all_input_nodes):
                found.add(node)
                if is_in_place(node):
                    found |= aliases(memory_of(node))
    return [node for node in between if node in found]


def check_plan(plan: LayerPlan) -> None:
    """Raise ``SparseCacheError`` for a layer that is not stored in plain pages."""
    plain = [s.holds_every_key and s.forms is None and s.selection is None for s in plan.storages]
    if plain != [True]:
        raise SparseCacheError(
            f"layer {plan.layer} of the SparseCache is stored as {', '.join(map(str, plan.storages))}, but the model computes "
            "its keys from the contents of the cache, which needs every token unquantized: build the cache without kv formats "
            "and with a policy under which this layer keeps every key, or use a DynamicCache"
        )


def read_back(call: Attention, source: Cached, state: CacheUpdate[Node], columns: Node, others: Collection[Node]) -> Cached:
    """Write the new tokens just before ``call``, compute its keys and values from the pages there, and return these.

    ``source`` are the keys and values of the call so far, and ``columns`` ``[B, Q]`` are the columns of the new tokens.
    """
    update, point = source.update, call.node
    moved, pages, found = computed_from(update, point, others), list[Node](), dict[Node, Node]()
    for buffer, new in zip(state.buffers_of(0), (state.k, state.v), strict=True):
        put_tokens(point, buffer, columns, new, call.q)
        pages.append(rows_in_use(point, buffer, call.q))
    for node in moved:
        if op_name(node) == "getitem" and node.args[0] is update:
            found[node] = pages[int(node.args[1])]  # type: ignore[arg-type]  # the number of an output of the update
            node.replace_all_uses_with(found[node])
            node.graph.erase_node(node)
        else:
            point.prepend(node)
    update.graph.erase_node(update)
    return replace(source, k=found.get(source.k, source.k), v=found.get(source.v, source.v))
