"""Draw masks as text and as figures."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

import torch

from sparse_compile.masks.block_mask import Tables, block_tables, query_blocks
from sparse_compile.masks.mask import Mask, check_sizes, view
from sparse_compile.masks.optional_packages import needed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PAIRS = 4096 * 4096


@view
def draw(mask: Mask, q_len: int, kv_len: int, q_offset: int, batch: int | None, heads: int | None) -> str:
    """See ``Mask.draw``."""
    default_batch, default_heads = mask.sizes()
    batch, heads = default_batch if batch is None else batch, default_heads if heads is None else heads
    pairs = mask.dense(q_len, kv_len, q_offset=q_offset, batch=batch, heads=heads)
    lines = []
    for b in range(batch):
        drawings = ["\n".join("".join("█" if seen else "·" for seen in row) for row in head) for head in pairs[b].tolist()]
        first = 0
        for drawing, alike in groupby(drawings):
            last = first + len(list(alike)) - 1
            head = f"head {first}" if first == last else f"heads {first}-{last}"
            title = [f"batch {b}"] * (batch > 1) + [head] * (heads > 1)
            lines += [", ".join(title)] * bool(title) + [drawing]
            first = last + 1
    return "\n".join(lines)


@view
def plot(mask: Mask, q_len: int, kv_len: int, q_offset: int, block_size: int, head: int) -> Figure:
    """See ``Mask.plot``."""
    with needed("plot", "matplotlib"):
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
    check_sizes(q_offset=q_offset, q_len=q_len, kv_len=kv_len, block_size=block_size)
    if q_len * kv_len > MOST_PAIRS:
        raise ValueError(f"plot shows at most {MOST_PAIRS} pairs, got {q_len} x {kv_len}: plot fewer queries or keys")
    one = mask.for_head(head, mask.sizes()[1])
    pairs = one.dense(q_len, kv_len, q_offset=q_offset, batch=one.sizes()[0])[0, 0]
    lo, hi = query_blocks(q_len, block_size, None)
    tables = block_tables(one, lo + q_offset, hi + q_offset, kv_len, kv_block=block_size)
    classes = _classes(tables, -(-kv_len // block_size))
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(
        pairs.numpy(), cmap=ListedColormap(["#f2f2f2", "#1f4e79"]), vmin=0, vmax=1, aspect="auto", interpolation="nearest"
    )
    left.set_title(f"pairs: {100 * float(pairs.float().mean()):.1f} % visible")
    colors = ["#f2f2f2", "#f0a04b", "#1f4e79"]
    right.imshow(classes.numpy(), cmap=ListedColormap(colors), vmin=0, vmax=2, aspect="auto", interpolation="nearest")
    shares = [100 * float((classes == k).float().mean()) for k in range(3)]
    right.set_title(f"blocks of {block_size}: {shares[0]:.0f} % skipped, {shares[1]:.0f} % partial, {shares[2]:.0f} % full")
    for axes, unit in ((left, "position"), (right, "block")):
        axes.set_xlabel(f"key {unit}")
        axes.set_ylabel(f"query {unit}")
        axes.locator_params(integer=True)  # there is no key 0.5
    figure.suptitle(str(mask))
    return figure


def _classes(tables: Tables, blocks: int) -> torch.Tensor:
    """Return 0 for each skipped block, 1 for each partial one and 2 for each full one: ``[query blocks, key blocks]``."""
    rows = tables.kv_indices.shape[2]
    grid = torch.zeros(rows, blocks, dtype=torch.int64)
    for row in range(rows):
        grid[row, tables.kv_indices[0, 0, row, : tables.kv_num_blocks[0, 0, row]].long()] = 1
        grid[row, tables.full_kv_indices[0, 0, row, : tables.full_kv_num_blocks[0, 0, row]].long()] = 2
    return grid
