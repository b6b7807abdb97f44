"""Write the block tables and dense masks of one head group. Calls with equal masks and shapes share them."""

from __future__ import annotations

import hashlib
from typing import Any

from torch.fx import Node

from sparse_compile.masks import Mask
from sparse_compile.masks.selection.page_topk import has_selector, offered
from sparse_compile.passes.choose.block_layout import Layout
from sparse_compile.passes.ir.fx_nodes import expr_of, hint_of
from sparse_compile.passes.ir.kv_source import Selected
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.region import regions_around
from sparse_compile.passes.lower.nodes.emitter import Emitter
from sparse_compile.passes.lower.nodes.page_choice import chosen_blocks, chosen_pages
from sparse_compile.passes.ops.block_tables import BlockTables, Cut, block_tables_op, tensor_names
from sparse_compile.passes.ops.reference_attention import DenseMask, ListedPairs
from sparse_compile.passes.torch_private import real_tensors

CONSTANT_TABLE_BYTES = 16 << 20


def tables(emitter: Emitter, layout: Layout, *, repeat_for_group: bool = False) -> Node | list[Node] | Left:
    """The positions of the first query and key, and the block tables of a layout.

    If the mask has a selector, the tables list the blocks that it selects. With ``repeat_for_group``, tables of selected pages
    are repeated for query heads, instead of one for each KV head.
    """
    if not has_selector(emitter.seen.mask):
        return _block_tables(emitter, layout)
    kv = emitter.call.kv
    if isinstance(kv, Selected) and kv.new.is_step:
        return chosen_pages(emitter, kv, layout, repeat_for_group=repeat_for_group)
    return chosen_blocks(emitter, layout)


def _block_tables(emitter: Emitter, layout: Layout) -> Node | list[Node] | Left:
    if _is_constant(emitter, layout):
        return _constant_tables(emitter, layout)
    numbers = _numbers(emitter)
    if isinstance(numbers, Left):
        return numbers
    q_len, kv_len, q_start, kv_start = numbers

    def make() -> Node:
        width: Any = emitter.blocks(emitter.point, kv_len, layout.block[1]) if layout.width is None else layout.width
        cut = Cut(layout.heads, q_len, kv_len, q_start, kv_start, *layout.block, width, layout.split)
        captures, shift = emitter.captures(layout.mask), emitter.call.positions.q_shift
        operands: BlockTables[Node] = BlockTables(layout.mask, cut, shift, captures, emitter.device)
        return emitter.call_op(emitter.point, block_tables_op, operands)

    kind = (layout.mask, layout.heads, layout.block, layout.split, layout.width)
    node = emitter.share(("tables", emitter.seen.heads, kind, *_where(emitter)), emitter.scene.reads, make)
    return _outputs(emitter, node, 6 if layout.split else 4)


def _outputs(emitter: Emitter, node: Node, count: int) -> Node | list[Node]:
    """A node with ``count`` outputs, or its outputs if the call is in a region, because only tensors can be passed into it."""
    if not regions_around(emitter.node):
        return node
    return [emitter.share((node, n), (), lambda n=n: emitter.item(emitter.point, node, n)) for n in range(count)]  # type: ignore[misc]


def dense_mask(emitter: Emitter, mask: Mask) -> Node | list[Node] | Left:
    """The positions of the first query and key, and ``mask`` as a tensor: the outputs of ``DenseMask``."""
    numbers = _numbers(emitter)
    if isinstance(numbers, Left):
        return numbers

    def make() -> Node:
        captures, shift = emitter.captures(mask), emitter.call.positions.q_shift
        module = DenseMask(mask, emitter.seen.heads)
        return emitter.call_module(emitter.point, "dense_mask", module, *numbers, shift, emitter.device, *captures)

    key = ("dense mask", mask, emitter.seen.heads, *_where(emitter))
    return _outputs(emitter, emitter.share(key, emitter.scene.reads, make), 3)


def seen_pairs(emitter: Emitter, layout: Layout) -> Node | list[Node] | Left:
    """The mask of the dense reference: ``dense_mask`` without the blocks that a selector does not select."""
    if not has_selector(emitter.seen.mask):
        return dense_mask(emitter, emitter.seen.mask)
    selected = tables(emitter, layout)
    dense = dense_mask(emitter, offered(emitter.seen.mask))
    if isinstance(selected, Left) or isinstance(dense, Left):
        return selected if isinstance(selected, Left) else dense
    point, heads = emitter.node, emitter.call.heads if emitter.heads is None else len(emitter.heads)
    first_query, first_key, visible = [emitter.item(point, dense, n) for n in range(3)] if isinstance(dense, Node) else dense
    listed = [emitter.item(point, selected, n) for n in (2, 3)] if isinstance(selected, Node) else selected[2:]
    pairs = emitter.call_module(point, "listed_pairs", ListedPairs(layout.block), visible, *listed, heads)
    return [first_query, first_key, pairs]


def _where(emitter: Emitter) -> tuple[Any, ...]:
    """The key that differs between tables of one mask: lengths, positions, device, and the tensors that names stand for."""
    call = emitter.call
    return expr_of(call.q_len), expr_of(call.kv_len), call.positions, call.device, str(call.sources)


def _numbers(emitter: Emitter) -> list[Any] | Left:
    """The lengths, and the positions of the first query and key, as ints or nodes that exist where tables are computed."""
    call, at = emitter.call, emitter.call.positions
    q_len, kv_len = expr_of(call.q_len), expr_of(call.kv_len)
    integers = [emitter.integer(emitter.point, expr) for expr in (q_len, kv_len, at.q_start, at.kv_start)]
    numbers = [number for number in integers if number is not None]
    if len(numbers) == len(integers):
        return numbers
    return Left(emitter.node, f"its lengths or positions ({q_len}, {kv_len}, {at}) are not known where its mask is computed")


def _is_constant(emitter: Emitter, layout: Layout) -> bool:
    """Whether the tables depend on static shapes only, and are small enough to keep as buffers."""
    if layout.width is None or tensor_names(emitter.seen.mask):
        return False
    rows = -(-hint_of(emitter.call.q_len) // layout.block[0])
    return 2 * 4 * layout.heads * rows * layout.width <= CONSTANT_TABLE_BYTES


def _constant_tables(emitter: Emitter, layout: Layout) -> list[Node]:
    """The tables as buffers of the graph, so that a short prompt does not wait for the launches that would build them."""
    call = emitter.call
    lengths = int(call.q_len), int(call.kv_len), int(call.positions.q_start), 0
    cut = Cut(layout.heads, *lengths, *layout.block, layout.width or 0, layout.split)
    name = f"tables_{hashlib.sha256(repr((str(layout.mask), cut, call.device)).encode()).hexdigest()[:16]}"

    def make() -> Any:
        with real_tensors():
            return block_tables_op(BlockTables(layout.mask, cut, None, [], call.device))

    return emitter.constants(emitter.point, name, 6 if layout.split else 4, make)
