"""Pinned tiles for the generated kernels. FlexAttention's own tiles are up to 1.8x slower in decode steps on Hopper."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch

TiledPhase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Tiles:
    """How a Triton kernel cuts its work: queries and keys in a tile, warps, and pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# The queries and keys of a table block that FLASH accepts, by major compute capability and head_dim. A block is one tile of
# the kernel (flash-attn-4, `_tile_size_fwd_sm90`); on Blackwell it is two tiles of queries.
FLASH_TILES: dict[int, dict[int, tuple[int, int]]] = {
    9: {64: (128, 128), 96: (128, 128), 128: (128, 128), 256: (128, 80)},
    10: {64: (256, 128), 96: (256, 128), 128: (256, 128)},
}

# FLASH takes some 0.3 ms of Python to launch. Single calls on an H200:
#
# | queries | FLASH   | SDPA    |
# |---------|---------|---------|
# | 8K      | 1.17 ms | 0.97 ms |
# | 16K     | 3.50 ms | 3.54 ms |
FLASH_FROM = 12288

# Measured on an H200 (bench/results/sweep.csv, `python -m bench sweep`). The keys are major compute capability, phase, the
# largest head_dim, and bytes of an element.
TILES: dict[tuple[int, TiledPhase, int, int], Tiles] = {
    (9, "prefill", 64, 2): Tiles(128, 64, 4, 3),
    (9, "prefill", 128, 2): Tiles(128, 64, 4, 2),
    (9, "prefill", 256, 2): Tiles(128, 64, 8, 2),
    (9, "decode", 64, 2): Tiles(16, 64, 4, 4),
    (9, "decode", 128, 2): Tiles(16, 64, 4, 4),
    (9, "decode", 256, 2): Tiles(16, 64, 4, 3),
}
# For devices without measurements. They need no more shared memory than FlexAttention's own tiles for an A100.
DEFAULTS: dict[tuple[TiledPhase, int], Tiles] = {
    ("prefill", 64): Tiles(128, 64, 4, 3),
    ("prefill", 128): Tiles(128, 64, 8, 2),
    ("prefill", 256): Tiles(64, 32, 4, 2),
    ("decode", 64): Tiles(16, 64, 4, 3),
    ("decode", 128): Tiles(16, 64, 4, 2),
    ("decode", 256): Tiles(16, 32, 4, 2),
}
# For the (batch, KV head, split) grid of a decode step. Two is best for one sequence; for eight sequences of 16K tokens, three
# is slightly better.
PROGRAMS_PER_SM = 2


def tiles_for(capability: tuple[int, int] | None, phase: TiledPhase, head_dim: int, dtype: torch.dtype) -> Tiles | None:
    """The pinned tiles; None for fp32 and for a head_dim above 256, where FlexAttention's own tiles are used."""
    size = dtype.itemsize
    largest = next((d for d in (64, 128, 256) if head_dim <= d), None)
    if largest is None or size != 2:
        return None
    return TILES.get((capability[0] if capability else 0, phase, largest, size)) or DEFAULTS[phase, largest]


def tiles_for_pages(tiles: Tiles | None, page_size: int) -> Tiles:
    """The tiles of a decode step that reads pages, with at most one page of keys in a tile."""
    tiles = tiles or Tiles(16, 64, 4, 2)
    return replace(tiles, block_n=min(tiles.block_n, page_size))


def kernel_options(tiles: Tiles | None, phase: TiledPhase, *, splits: int | None = None) -> dict[str, Any]:
    """``tiles`` as FlexAttention's kernel options. The prefix ``fwd_`` keeps them out of the backward kernels."""
    options: dict[str, Any] = {"BACKEND": "TRITON_DECODE" if phase == "decode" else "TRITON"}
    if tiles is not None:
        options |= {"fwd_BLOCK_N": tiles.block_n, "fwd_num_warps": tiles.num_warps, "fwd_num_stages": tiles.num_stages}
        if phase == "prefill":
            options["fwd_BLOCK_M"] = tiles.block_m
    if splits is not None:
        options["SPLIT_KV"] = splits
    return options


def splits_for(sequences: int, blocks: int) -> int:
    """The number of splits of the keys in a decode step with ``sequences`` (batch, KV head) pairs of ``blocks`` blocks each.

    It is large enough to fill the GPU, and at most one split for each block. FlexAttention's own number depends on the GPU
    alone; with a short list, most of its splits would be empty, but would still be written and merged.
    """
    filling = PROGRAMS_PER_SM * multiprocessors() // max(sequences, 1)
    return max(1, min(filling, blocks))


@cache
def multiprocessors() -> int:
    """The number of multiprocessors of the GPU; that of an H100 (132) on a machine without a GPU."""
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 132
