"""Slow references for the mask language: pairs one by one, and block tables read back as a kernel reads them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from support.masks.row import Row

Block = tuple[int, int, int, int]  # (b, h, query block, key block)


def pairs(row: Row, *, q_offset: int = 0, q_len: int | None = None) -> Tensor:
    """Call the oracle of a row for every pair: bool ``[batch, heads, q_len, kv_len]``."""
    queries = range(q_offset, q_offset + (q_len or row.q_len))
    return torch.tensor(
        [
            [[[row.oracle(b, h, i, j) for j in range(row.kv_len)] for i in queries] for h in range(row.heads)]
            for b in range(row.batch)
        ]
    )


def blocks(counts: Tensor | None, indices: Tensor | None) -> list[Block]:
    """List the blocks of one FlexAttention table in the order in which they are visited."""
    assert counts is not None
    assert indices is not None
    visited = []
    for b, per_batch in enumerate(counts.tolist()):
        for h, per_head in enumerate(per_batch):
            for row, count in enumerate(per_head):
                visited += [(b, h, row, block) for block in indices[b, h, row, :count].tolist()]
    return visited


def partial_blocks(block_mask: BlockMask) -> list[Block]:
    """List the blocks in which the kernel calls the ``mask_mod``."""
    return blocks(block_mask.kv_num_blocks, block_mask.kv_indices)


def full_blocks(block_mask: BlockMask) -> list[Block]:
    """List the blocks that the kernel treats as fully visible."""
    return blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)


def as_a_kernel_sees(block_mask: BlockMask) -> Tensor:
    """Return the pairs that a kernel computes: bool ``[batch, heads, q_len, kv_len]``.

    These are all pairs of full blocks, and the pairs of partial blocks that the ``mask_mod`` shows.
    """
    batch, heads = block_mask.kv_num_blocks.shape[:2]
    q_len, kv_len = block_mask.seq_lengths
    q_block, kv_block = block_mask.BLOCK_SIZE
    seen = torch.zeros(batch, heads, q_len, kv_len, dtype=torch.bool)
    for b, h, row, column in full_blocks(block_mask):
        seen[b, h, row * q_block : (row + 1) * q_block, column * kv_block : (column + 1) * kv_block] = True
    for b, h, row, column in partial_blocks(block_mask):
        i = torch.arange(row * q_block, min((row + 1) * q_block, q_len))
        j = torch.arange(column * kv_block, min((column + 1) * kv_block, kv_len))
        visible = block_mask.mask_mod(torch.tensor(b), torch.tensor(h), i[:, None], j)
        seen[b, h, i[:, None], j] = visible.expand(len(i), len(j))
    return seen


def blocks_where(dense: Tensor, block_size: tuple[int, int], visible: Callable[[Tensor], Tensor]) -> set[Block]:
    """Return the blocks of a dense mask in which some (``torch.any``) or all (``torch.all``) pairs are visible."""
    q_block, kv_block = block_size
    return {
        (b, h, row // q_block, column // kv_block)
        for b in range(dense.shape[0])
        for h in range(dense.shape[1])
        for row in range(0, dense.shape[2], q_block)
        for column in range(0, dense.shape[3], kv_block)
        if visible(dense[b, h, row : row + q_block, column : column + kv_block])
    }
