"""Build block tables from the bounds of a mask: the key blocks that each query block visits, partial and full ones."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sparse_compile.masks.bounds import Bounds
from sparse_compile.masks.intervals import Intervals
from sparse_compile.masks.mask import Mask, check_sizes, view

# Every kernel accepts tables as wide as the keys. Above this size, such tables cost more than they are worth.
WIDE_TABLE_BYTES = 16 << 20
BLOCKS_AT_ONCE = 1 << 23


class Tables(NamedTuple):
    """FlexAttention's block lists: int32 counts ``[B, H, rows]`` and block indices ``[B, H, rows, width]``.

    ``kv_*`` lists partial blocks, in which the kernel calls the ``mask_mod``. ``full_*`` lists fully visible blocks. Entries
    past the count are in range and never visited. Both index tables have the same shape and strides, because the Triton
    prefill kernel reads the full table with the strides of the partial one.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor


def block_tables(
    mask: Mask, lo: Tensor, hi: Tensor, kv_len: int, *, kv_block: int, kv_start: Tensor | int = 0, width: int | None = None
) -> Tables:
    """Build tables for query blocks at positions ``lo..hi`` (int64 ``[rows]``) over ``kv_len`` keys from ``kv_start`` on.

    ``width`` is the number of table columns; None means all key blocks. Nothing here reads data on the host, so the function
    runs under CUDA graphs. A last key block that ``kv_len`` cuts off never counts as full.
    """
    blocks = -(-kv_len // kv_block)

    def tables(lo: Tensor, hi: Tensor) -> Tables:
        bounds = mask.bounds(lo, hi)
        index, count = listed_blocks(bounds, kv_len, kv_block, kv_start, blocks if width is None else width)
        start = index.long() * kv_block + kv_start
        cut_off = (index + 1) * kv_block > kv_len
        return split_tables(index, count, bounds.every(start, start + kv_block) & ~cut_off)

    parts = [tables(*run) for run in _runs_at_once(lo, hi, blocks)]
    return parts[0] if len(parts) == 1 else Tables(*(torch.cat(part, dim=2) for part in zip(*parts, strict=True)))


def listed_blocks(
    bounds: Bounds, kv_len: int, kv_block: int, kv_start: Tensor | int = 0, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """List the key blocks in which a run of queries may see a key: int32 indices ``[B, H, rows, width]`` and counts.

    Without a ``width``, the tables are as wide as the longest row, which waits for the device.
    """
    runs = Runs.of((bounds.maybe - kv_start).clamp(0, kv_len), kv_block)
    if bounds.sieve is None:
        return runs.listed(runs.widest() if width is None else width)
    index, count = runs.listed(-(-kv_len // kv_block))  # only a part of these blocks passes the sieve
    column = torch.arange(index.shape[-1], device=index.device)
    start = index.long() * kv_block
    stop = (start + kv_block).clamp(max=kv_len)
    found = bounds.some(start + kv_start, stop + kv_start) & (column < count.unsqueeze(-1))
    count, index = _compact(index.expand(found.shape), found)
    return index[..., : max(int(count.max()), 1) if width is None else width], count


def split_tables(index: Tensor, count: Tensor, full: Tensor) -> Tables:
    """Split listed blocks into partial and full ones.

    ``index`` is ``[B, H, rows, width]``, of which the first ``count`` ``[B, H, rows]`` entries are valid. ``full`` is True
    for blocks that are wholly visible, in the shape of ``index``.
    """
    width = index.shape[-1]
    column = torch.arange(width, device=index.device, dtype=torch.int32)
    full = full & (column < count.unsqueeze(-1))
    # What is wholly visible may differ between batch rows and heads even if the listed blocks do not.
    index, count = index.expand(full.shape), count.expand(full.shape[:-1])
    # One scatter moves full blocks to the right half of a table and all others to the left half, in order.
    ahead = full.cumsum(dim=-1, dtype=torch.int32)
    slot = torch.where(full, width - 1 + ahead, column - ahead)
    table = torch.zeros(*index.shape[:-1], 2 * width, dtype=torch.int32, device=index.device)
    table.scatter_(-1, slot.long(), index)
    whole = ahead[..., -1]
    return Tables(count - whole, table[..., :width].contiguous(), whole.contiguous(), table[..., width:].contiguous())


def _runs_at_once(lo: Tensor, hi: Tensor, blocks: int) -> list[tuple[Tensor, Tensor]]:
    """Split runs of queries into parts whose grid of ``blocks`` key blocks stays small."""
    step = max(1, BLOCKS_AT_ONCE // blocks)
    if lo.shape[-1] <= step:
        return [(lo, hi)]
    parts = lo.split(step, dim=-1)
    return list(zip(parts, parts if hi is lo else hi.split(step, dim=-1), strict=True))


def visited_blocks(
    mask: Mask, lo: Tensor, hi: Tensor, kv_len: int, *, kv_block: int, kv_start: Tensor | int = 0, width: int
) -> tuple[Tensor, Tensor]:
    """List all blocks of ``block_tables``, full or not: counts ``[B, H, rows]`` and indices ``[B, H, rows, width]``."""
    parts = [
        listed_blocks(mask.bounds(*run), kv_len, kv_block, kv_start, width)
        for run in _runs_at_once(lo, hi, -(-kv_len // kv_block))
    ]
    index, count = (torch.cat(part, dim=2) if len(parts) > 1 else part[0] for part in zip(*parts, strict=True))
    return count, index


def live_width(mask: Mask, lo: Tensor, hi: Tensor, kv_len: int, kv_block: int) -> int:
    """Return the largest number of key blocks that any query block visits. Waits for the device."""
    widths = []
    for run in _runs_at_once(lo, hi, -(-kv_len // kv_block)):
        bounds = mask.bounds(*run)
        runs = Runs.of(bounds.maybe.clamp(0, kv_len), kv_block)
        widths.append(runs.widest() if bounds.sieve is None else listed_blocks(bounds, kv_len, kv_block)[0].shape[-1])
    return max(widths)


def query_blocks(q_len: int, q_block: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """Return the first and last query index of each block: int64 ``[rows]`` each, one tensor if blocks are single queries."""
    lo = torch.arange(0, q_len, q_block, device=device)
    return lo, lo if q_len == 1 or q_block == 1 else (lo + q_block - 1).clamp(max=q_len - 1)


@view
def block_mask(
    mask: Mask,
    q_len: int,
    kv_len: int,
    q_offset: int,
    batch: int | None,
    heads: int | None,
    block_size: int | tuple[int, int],
    device: torch.device | str | None,
) -> BlockMask:
    """See ``Mask.block_mask``."""
    sizes = tuple(block_size) if isinstance(block_size, tuple | list) else (block_size, block_size)
    if len(sizes) != 2:
        raise ValueError(f"block_size needs one size, or one for queries and one for keys, got {block_size}")
    q_block, kv_block = sizes
    default_batch, default_heads = mask.sizes()
    batch, heads = default_batch if batch is None else batch, default_heads if heads is None else heads
    check_sizes(q_offset=q_offset, q_len=q_len, kv_len=kv_len, batch=batch, heads=heads)
    check_sizes(**{"block_size of queries": q_block, "block_size of keys": kv_block})
    mask.check(batch, heads, q_len, kv_len, q_offset)
    mask = mask.for_heads(heads).to(device)
    lo, hi = query_blocks(q_len, q_block, device)
    if q_offset:
        shifted = lo + q_offset
        lo, hi = shifted, shifted if hi is lo else hi + q_offset
    rows, blocks = lo.numel(), -(-kv_len // kv_block)
    narrow = 4 * batch * heads * rows * blocks > WIDE_TABLE_BYTES
    width = live_width(mask, lo, hi, kv_len, kv_block) if narrow else blocks
    tables = block_tables(mask, lo, hi, kv_len, kv_block=kv_block, width=width)
    tables = Tables(*(t.expand(batch, heads, *t.shape[2:]).contiguous() for t in tables))

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        visible: Tensor = mask.__call__(b, h, q_idx + q_offset if q_offset else q_idx, kv_idx)
        return visible

    return BlockMask.from_kv_blocks(
        *tables,
        BLOCK_SIZE=(q_block, kv_block),
        mask_mod=mask_mod,
        seq_lengths=(q_len, kv_len),
        # Only the backward pass needs the query-side tables, and torch builds them from a dense grid of blocks.
        compute_q_blocks=not narrow,
    )


class Runs(NamedTuple):
    """Runs of blocks that hold a key of a set: ``[B, H, rows, n]``. ``end`` is the running count of the blocks in a row."""

    first: Tensor
    size: Tensor
    end: Tensor

    @staticmethod
    def of(keys: Intervals, kv_block: int) -> Runs:
        """Find the blocks of ``kv_block`` keys. ``keys`` must be clamped to the keys of the attention."""
        start, stop = keys.start, keys.stop
        while start.dim() < 4:
            start, stop = start.unsqueeze(0), stop.unsqueeze(0)
        first = start // kv_block
        last = torch.where(stop > start, (stop + (kv_block - 1)) // kv_block, first)
        if first.shape[-1] > 1:  # adjacent intervals may share a block
            reached = last.cummax(dim=-1).values
            first = torch.cat([first[..., :1], torch.maximum(first[..., 1:], reached[..., :-1])], dim=-1)
            last = torch.maximum(first, last)
        size = last - first
        return Runs(first, size, size.cumsum(dim=-1))

    def widest(self) -> int:
        """Return the largest number of blocks in any row, at least 1. Waits for the device."""
        return max(int(self.end[..., -1].max()), 1)

    def listed(self, width: int) -> tuple[Tensor, Tensor]:
        """Return int32 block indices ``[B, H, rows, width]`` and counts ``[B, H, rows]``.

        The blocks of a row ascend, and zeros follow after them.
        """
        column = torch.arange(width, device=self.first.device, dtype=torch.int32)
        begin = (self.end - self.size).int()
        shift = self.first.int() - begin
        index = column + shift[..., :1]
        if shift.shape[-1] > 1:
            steps = shift.diff(dim=-1).unsqueeze(-2) * (column.unsqueeze(-1) >= begin[..., None, 1:])
            index = index + steps.sum(dim=-1, dtype=torch.int32)
        count = self.end[..., -1].int()
        return torch.where(column < count.unsqueeze(-1), index, 0), count


def transposed(count: Tensor, index: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """List the same blocks by key block: counts ``[B, H, columns]`` and query blocks ``[B, H, columns, rows]``, int32.

    The backward pass of FlexAttention visits the blocks in this order. The lists are built from a dense grid of blocks.
    """
    rows, width = index.shape[-2:]
    listed = torch.arange(width, device=index.device) < count.unsqueeze(-1)
    grid = torch.zeros(*index.shape[:-1], columns + 1, dtype=torch.bool, device=index.device)
    grid = grid.scatter(-1, torch.where(listed, index.long(), columns), True)[..., :columns].transpose(-1, -2)
    query_block = torch.arange(rows, device=index.device).expand_as(grid)
    return _compact(query_block, grid)


def _compact(index: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Move the chosen indices to the front, in order, and fill the other columns with 0. Also return the counts."""
    count = chosen.sum(dim=-1, dtype=torch.int32)
    slot = torch.where(chosen, chosen.cumsum(dim=-1) - 1, index.shape[-1])
    table = torch.zeros(*index.shape[:-1], index.shape[-1] + 1, dtype=torch.int32, device=index.device)
    table.scatter_(-1, slot, index.to(torch.int32))
    return count, table[..., :-1].contiguous()
