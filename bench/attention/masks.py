"""Benchmark block tables in closed form against ``create_block_mask``."""

from __future__ import annotations

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from bench.measure.shapes import WINDOW
from bench.measure.timing import CUDA, DEVICE, Row, measure, measured
from sparse_compile.masks import causal, per_head

HEADS = 32


def run_masks(*, smoke: bool = False) -> list[Row]:
    """Time the block tables of 32 heads, half of them streaming.

    Each group of equal heads has its own table. Dense causal heads need none. ``create_block_mask`` visits every pair of
    tokens, so it gets a shorter text, whose length is in the row.
    """
    length, other = (16384, 2048) if smoke else (1 << 20, 1 << 17 if CUDA else 1 << 14)
    mask = per_head([causal, WINDOW] * (HEADS // 2))

    def build() -> list[BlockMask]:
        groups = mask.head_groups(HEADS)
        return [group.block_mask(length, length, device=DEVICE) for group in groups if group != causal]

    def mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        visible: Tensor = WINDOW(b, h, q_idx, kv_idx)
        return visible

    made = build()
    size = sum(t.numel() * t.element_size() for m in made for t in m.as_tuple() if isinstance(t, Tensor))
    timing = measure(build)
    slow = measure(
        lambda: create_block_mask(mod, 1, 1, other, other, device=str(DEVICE), _compile=not smoke), repeat=3, warm_up=1
    )
    row = measured(
        timing,
        baseline=f"create_block_mask, one head, {other}",
        slow=slow,
        bench="masks",
        what=f"{HEADS} heads, half streaming",
        shape="block tables",
        mask=str(WINDOW),
        density=WINDOW.density(length, length),
        q_len=length,
        kv_len=length,
        dtype="int32",
        kernel="",
        note=f"{size / 2**20:.1f} MiB of tables",
    )
    return [row]
