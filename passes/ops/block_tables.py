"""Compute block tables while a compiled graph runs: an opaque custom op, called once per distinct mask and shape of a graph.

The op is opaque because every tensor that a ``mask_mod`` captures must be materialized: it must be a graph input, or the
output of an op that Inductor cannot fuse. An ``arange`` in the graph fails with ``NoValidChoices`` on CPU, and with ``XBLOCK is
not defined`` on CUDA. Offsets are operands and not closed over, so one graph serves all lengths, and nothing waits for the
device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from sparse_compile.masks import Captured, Mask
from sparse_compile.masks.block_mask import block_tables, query_blocks, transposed, visited_blocks
from sparse_compile.passes.ops.small_steps import in_few_kernels
from sparse_compile.passes.ops.structured import StructuredOp

T = TypeVar("T")

Q_START = Captured.symbol("q_start")
KV_START = Captured.symbol("kv_start")


def bind(mask: Mask, names: tuple[Captured, ...], tensors: Sequence[Tensor], q_start: Tensor, kv_start: Tensor) -> Mask:
    """Return the mask with the names of captured tensors replaced by tensors of the running graph."""
    values = {name: name.filled(tensor) for name, tensor in zip(names, tensors, strict=True)}
    return mask.bind(values | {Q_START: Q_START.filled(q_start), KV_START: KV_START.filled(kv_start)})


def tensor_names(mask: Mask) -> tuple[Captured, ...]:
    """Return the names of the tensors that a mask reads, in the order in which a graph passes them. All have a batch axis."""
    return tuple(c for c in mask.captures() if c not in (Q_START, KV_START))


def batch_of(captures: Sequence[Tensor]) -> int:
    """Return the batch size of a mask: that of the tensors it reads, or 1 if they serve all batches or there are none."""
    return max((c.shape[0] for c in captures), default=1)


def starts(q_start: int, kv_start: int, q_shift: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the text positions of the first query and the first key, int64 ``[1]`` each."""
    first_query = torch.full((1,), q_start, dtype=torch.int64, device=device)
    first_key = torch.full((1,), kv_start, dtype=torch.int64, device=device)
    return first_query if q_shift is None else first_query + q_shift, first_key


class Cut(NamedTuple):
    """The shape that block tables are made for.

    ``heads`` is the number of heads if the mask differs between them, else 1. ``width`` is the number of table columns. With
    ``split`` there are four tables, which list partial and full blocks separately. Without it, there are two tables, which list
    every visited block.
    """

    heads: int
    q_len: int
    kv_len: int
    q_start: int
    kv_start: int
    q_block: int
    kv_block: int
    width: int
    split: bool


class BlockTables(NamedTuple, Generic[T]):
    """The operands of block tables: a mask, a shape, and the tensors ``captures`` that the mask reads, in order.

    ``q_shift`` is added to the position of the first query.
    """

    mask: Mask
    cut: Cut
    q_shift: T | None
    captures: list[T]
    device: torch.device


def _tables(operands: BlockTables[Tensor]) -> list[Tensor]:
    return in_few_kernels(_block_tables, *operands) if operands.cut.q_len == 1 else _block_tables(*operands)


def _block_tables(mask: Mask, cut: Cut, q_shift: Tensor | None, captures: list[Tensor], device: torch.device) -> list[Tensor]:
    first_query, first_key = starts(cut.q_start, cut.kv_start, q_shift, device)
    bound = bind(mask, tensor_names(mask), captures, first_query, first_key)
    if cut.heads > 1:
        bound = bound.for_heads(cut.heads)
    lo, hi = query_blocks(cut.q_len, cut.q_block, device)
    if cut.q_start or q_shift is not None:
        shifted = lo + first_query
        lo, hi = shifted, shifted if hi is lo else hi + first_query
    lead: dict[str, Any] = {"kv_block": cut.kv_block, "kv_start": first_key if cut.kv_start else 0, "width": cut.width}
    build = block_tables if cut.split else visited_blocks
    tables = [_own(t.expand(batch_of(captures), cut.heads, *t.shape[2:])) for t in build(bound, lo, hi, cut.kv_len, **lead)]
    return [first_query.int(), first_key.int(), *tables]


def _own(table: Tensor) -> Tensor:
    """Copy a table, because the outputs of an op may not share memory."""
    return table.clone(memory_format=torch.contiguous_format)


def _shapes(operands: BlockTables[Tensor]) -> list[Tensor]:
    cut, batch = operands.cut, batch_of(operands.captures)
    rows = -(-cut.q_len // cut.q_block)
    sizes = [(1,), (1,)] + [(batch, cut.heads, rows), (batch, cut.heads, rows, cut.width)] * (2 if cut.split else 1)
    return [torch.empty(size, dtype=torch.int32, device=operands.device) for size in sizes]


# Returns the positions of the first query and key ``[1]``, then the tables of a mask for one shape. All are int32.
block_tables_op = StructuredOp("block_tables", BlockTables, _tables, fake=_shapes)


@torch.library.custom_op("sparse_compile::transpose_tables", mutates_args=())
def transpose_tables(tables: list[Tensor], columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the four tables by key block, as the backward pass needs them. ``columns`` is the number of key blocks."""
    num, index, full_num, full_index = tables
    return *transposed(num, index, columns), *transposed(full_num, full_index, columns)


@transpose_tables.register_fake
def _(tables: list[Tensor], columns: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, rows, _ = tables[1].shape
    count = tables[0].new_empty(batch, heads, columns)
    table = tables[1].new_empty(batch, heads, columns, rows)
    return count, table, count.clone(), table.clone()


BLOCK = 128  # queries and keys of a table block, unless a kernel needs another size
