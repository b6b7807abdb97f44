"""Block tables of a mask, from its bounds: which key blocks a query block visits, and which of those are wholly visible."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from sparse_compile.masks.intervals import Intervals, normalise
from sparse_compile.masks.mask import Mask, check_sizes

# Tables as wide as the keys are what every kernel accepts; beyond this size they cost more than they are worth.
WIDE_TABLE_BYTES = 16 << 20


class Tables(NamedTuple):
    """FlexAttention's block lists: int32 counts ``[B, H, rows]`` and block indices ``[B, H, rows, width]``.

    ``kv_*`` lists partial blocks, where the mask itself is asked; ``full_*`` lists blocks that are wholly visible. Entries
    past the count are in range and never visited. Both index tables have one shape and stride: the Triton prefill kernel
    reads the full table with the strides of the partial one.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor


def block_tables(
    mask: Mask, lo: Tensor, hi: Tensor, kv_len: int, *, kv_block: int, kv_start: Tensor | int = 0, width: int | None = None
) -> Tables:
    """Tables for query blocks at positions ``lo..hi`` (int64 ``[rows]``) over keys at ``kv_start .. kv_start + kv_len``.

    ``width`` is the number of table columns: all key blocks if None. Nothing here depends on data on the host, so it runs
    under CUDA graphs. The last key block counts as full only if it is whole.
    """
    blocks = -(-kv_len // kv_block)
    width = blocks if width is None else width
    bounds = mask.bounds(lo, hi)
    maybe, surely = (Intervals(s.start - kv_start, s.stop - kv_start).clamp(0, kv_len) for s in (bounds.maybe, bounds.surely))
    index, live = _listed(maybe, kv_block, width)
    start = index * kv_block
    full = live & (surely.overlap(start, start + kv_block) == kv_block)
    return Tables(*_compact(index, live & ~full), *_compact(index, full))


def live_width(mask: Mask, lo: Tensor, hi: Tensor, kv_len: int, kv_block: int) -> int:
    """The most key blocks that any of the query blocks visits. Waits for the device."""
    touched = _in_blocks(mask.bounds(lo, hi).maybe.clamp(0, kv_len), kv_block)
    return max(int(touched.count().max()), 1)


def query_blocks(q_len: int, q_block: int, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """First and last query of each block, as indices: int64 ``[rows]`` each."""
    lo = torch.arange(0, q_len, q_block, device=device)
    return lo, (lo + q_block - 1).clamp(max=q_len - 1)


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
    lo, hi = lo + q_offset, hi + q_offset
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
        # The query-side tables serve the backward pass and are found by way of a dense grid.
        compute_q_blocks=not narrow,
    )


def _in_blocks(keys: Intervals, kv_block: int) -> Intervals:
    """The blocks that hold any key of the sets."""
    return normalise(keys.start // kv_block, torch.where(keys.stop > keys.start, -(-keys.stop // kv_block), 0))


def _listed(keys: Intervals, kv_block: int, width: int) -> tuple[Tensor, Tensor]:
    """The blocks that hold any key, in ascending order, and which columns are in use: ``[B, H, rows, width]`` each."""
    touched = _in_blocks(keys, kv_block)
    column = torch.arange(width, device=keys.start.device)
    size = (touched.stop - touched.start).clamp(min=0)
    end = size.cumsum(dim=-1)
    index = torch.zeros((), dtype=torch.int64, device=column.device)
    for k in range(size.shape[-1]):
        inside = column >= (end[..., k] - size[..., k]).unsqueeze(-1)
        index = torch.where(
            inside & (size[..., k, None] > 0), touched.start[..., k, None] + column - (end - size)[..., k, None], index
        )
    live = column < end[..., -1:]
    index = torch.where(live, index, 0)
    while index.dim() < 4:
        index, live = index.unsqueeze(0), live.unsqueeze(0)
    return index, live.expand_as(index)


def transposed(count: Tensor, index: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """The same blocks listed by key block: counts ``[B, H, columns]`` and query blocks ``[B, H, columns, rows]``, int32.

    The backward pass of FlexAttention walks the blocks this way. Found by way of a grid of blocks.
    """
    rows, width = index.shape[-2:]
    listed = torch.arange(width, device=index.device) < count.unsqueeze(-1)
    grid = torch.zeros(*index.shape[:-1], columns + 1, dtype=torch.bool, device=index.device)
    grid = grid.scatter(-1, torch.where(listed, index.long(), columns), True)[..., :columns].transpose(-1, -2)
    query_block = torch.arange(rows, device=index.device).expand_as(grid)
    return _compact(query_block, grid)


def _compact(index: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and the chosen indices moved to the front, in order; the rest of the columns is 0."""
    count = chosen.sum(dim=-1, dtype=torch.int32)
    slot = torch.where(chosen, chosen.cumsum(dim=-1) - 1, index.shape[-1])
    table = torch.zeros(*index.shape[:-1], index.shape[-1] + 1, dtype=torch.int32, device=index.device)
    table.scatter_(-1, slot, index.to(torch.int32))
    return count, table[..., :-1].contiguous()
