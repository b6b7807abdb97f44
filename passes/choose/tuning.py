"""Tiles of the generated kernels, pinned: what FlexAttention picks by itself loses up to 1.8x at decode on Hopper."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, Literal

import torch

TiledPhase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Tiles:
    """How a Triton kernel cuts its work: queries and keys of a tile, warps, and loads in flight."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# Queries and keys of a table block that FLASH accepts, by major compute capability and head_dim: its own tile (flash-attn-4,
# `_tile_size_fwd_sm90`; on Blackwell two tiles of queries are in flight).
FLASH_TILES: dict[int, dict[int, tuple[int, int]]] = {
    9: {64: (128, 128), 96: (128, 128), 128: (128, 128), 256: (128, 80)},
    10: {64: (256, 128), 96: (256, 128), 128: (256, 128)},
}

# Measured on an H200 (bench/results/sweep.csv, `python -m bench sweep`). Keys: major compute capability, phase, head_dim up to
# this one, bytes of an element.
TILES: dict[tuple[int, TiledPhase, int, int], Tiles] = {
    (9, "prefill", 64, 2): Tiles(128, 64, 4, 3),
    (9, "prefill", 128, 2): Tiles(128, 64, 4, 2),
    (9, "prefill", 256, 2): Tiles(128, 64, 8, 2),
    (9, "decode", 64, 2): Tiles(16, 64, 4, 4),
    (9, "decode", 128, 2): Tiles(16, 64, 4, 4),
    (9, "decode", 256, 2): Tiles(16, 64, 4, 3),
}
# For devices nobody measured: no larger in shared memory than what FlexAttention itself takes for an A100.
DEFAULTS: dict[tuple[TiledPhase, int], Tiles] = {
    ("prefill", 64): Tiles(128, 64, 4, 3),
    ("prefill", 128): Tiles(128, 64, 8, 2),
    ("prefill", 256): Tiles(64, 32, 4, 2),
    ("decode", 64): Tiles(16, 64, 4, 3),
    ("decode", 128): Tiles(16, 64, 4, 2),
    ("decode", 256): Tiles(16, 32, 4, 2),
}
# Of a decode step, over its (batch, KV head, split) grid: best for one sequence; eight of 16K like three a little better.
PROGRAMS_PER_SM = 2


def tiles_for(capability: tuple[int, int] | None, phase: TiledPhase, head_dim: int, dtype: torch.dtype) -> Tiles | None:
    """The pinned tiles; None where FlexAttention's own choice has to do (fp32, and head_dim above 256)."""
    size = dtype.itemsize
    largest = next((d for d in (64, 128, 256) if head_dim <= d), None)
    if largest is None or size != 2:
        return None
    return TILES.get((capability[0] if capability else 0, phase, largest, size)) or DEFAULTS[phase, largest]


def tiles_for_pages(tiles: Tiles | None, page_size: int) -> Tiles:
    """The tiles of a decode step that visits pages: none larger than a page."""
    tiles = tiles or Tiles(16, 64, 4, 2)
    return replace(tiles, block_n=min(tiles.block_n, page_size))


def kernel_options(tiles: Tiles | None, phase: TiledPhase, *, splits: int | None = None) -> dict[str, Any]:
    """``tiles`` as FlexAttention's kernel options. The prefix keeps them from the kernels of the backward pass."""
    options: dict[str, Any] = {"BACKEND": "TRITON_DECODE" if phase == "decode" else "TRITON"}
    if tiles is not None:
        options |= {"fwd_BLOCK_N": tiles.block_n, "fwd_num_warps": tiles.num_warps, "fwd_num_stages": tiles.num_stages}
        if phase == "prefill":
            options["fwd_BLOCK_M"] = tiles.block_m
    if splits is not None:
        options["SPLIT_KV"] = splits
    return options


def splits_for(sequences: int, blocks: int) -> int:
    """In how many parts a decode step cuts the keys of each of ``sequences`` (batch, KV head) pairs that visit ``blocks``.

    Enough parts to fill the GPU, and none without a block of its own: FlexAttention looks at the GPU alone, and a short list
    over many splits leaves most of them empty, to be written and merged all the same.
    """
    wanted = PROGRAMS_PER_SM * multiprocessors() // max(sequences, 1)
    return max(1, min(wanted, blocks))


@cache
def multiprocessors() -> int:
    """The multiprocessors of the GPU; those of an H100 where there is none to ask."""
    return torch.cuda.get_device_properties().multi_processor_count if torch.cuda.is_available() else 132


def as_text(tiles: Tiles) -> str:
    """For tables of results."""
    return " ".join(f"{name}={value}" for name, value in asdict(tiles).items())
