"""Time tiles of the generated kernels by phase and head_dim. The table in ``passes/choose/tuning.py`` holds the best ones."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from unittest import mock

import torch

from bench.measure.shapes import WINDOW, Shape, compiled, decode, operands, prefill
from bench.measure.stopping import end_with
from bench.measure.timing import CUDA, Row, Timing, in_graph, measure, measured
from sparse_compile.masks import Mask, causal
from sparse_compile.passes.choose import tuning
from sparse_compile.passes.choose.tuning import TiledPhase, Tiles

PREFILL = [
    *(Tiles(128, 64, w, s) for w, s in ((8, 3), (4, 3), (8, 2), (4, 2))),
    *(Tiles(128, 128, w, s) for w, s in ((8, 2), (8, 3), (4, 3), (4, 2))),
    *(Tiles(128, 32, w, s) for w, s in ((4, 3), (8, 3), (8, 2))),
    *(Tiles(64, 64, w, s) for w, s in ((4, 3), (4, 2))),
    *(Tiles(64, 128, 4, s) for s in (2, 3)),
    Tiles(64, 32, 4, 3),
]
DECODE = [
    *(Tiles(16, 64, w, s) for w in (2, 4, 8) for s in (3, 4)),
    *(Tiles(16, 128, w, s) for w in (4, 8) for s in (2, 3)),
    *(Tiles(16, 32, w, s) for w, s in ((2, 4), (4, 4), (4, 6))),
    Tiles(16, 64, 4, 5),
]
PROGRAMS = (2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Trial:
    """One kernel with one setting of its tiles."""

    phase: TiledPhase
    shape: Shape
    mask: Mask | None
    length: int
    batch: int
    tiles: Tiles
    programs: int = tuning.PROGRAMS_PER_SM

    def run(self, *, timed: bool = True) -> Timing:
        """Compile the kernel through the backend and time it."""
        with torch.no_grad(), _pinned(self.tiles, self.programs):
            if self.phase == "prefill":
                q, k, v = operands(self.shape, self.length, self.length, batch=self.batch)
                run, _ = compiled(prefill, self.mask, kernel="triton")
                run(q, k, v)
                return measure(lambda: run(q, k, v), seconds=0.3) if timed else Timing(0, 0, 0, 0)
            q, k, v = operands(self.shape, 1, self.length, batch=self.batch)
            position = torch.tensor(self.length - 1, device=q.device)
            run, _ = compiled(decode, self.mask, kernel="triton")
            run(q, k, v, position)
            if not timed:
                return Timing(0, 0, 0, 0)
            # The time includes the tables, which take equally long for all tiles. A model computes them once for all layers.
            return measure(in_graph(lambda: run(q, k, v, position), times=10), seconds=0.2).per(10)


@contextmanager
def _pinned(tiles: Tiles, programs: int) -> Iterator[None]:
    saved, tuning.PROGRAMS_PER_SM = tuning.PROGRAMS_PER_SM, programs
    keys = [(major, phase, dim, 2) for major in range(7, 13) for phase in ("prefill", "decode") for dim in (64, 128, 256)]
    try:
        with mock.patch.dict(tuning.TILES, dict.fromkeys(keys, tiles)):
            yield
    finally:
        tuning.PROGRAMS_PER_SM = saved


def trials(*, smoke: bool = False) -> list[Trial]:
    """Return all trials of the sweep, or only the first for a smoke test."""
    every: list[Trial] = []
    for dim, heads, kv in ((64, 32, 8), (128, 32, 8), (256, 16, 8)):
        shape = Shape("", heads, kv, dim)
        every += [Trial("prefill", shape, None, 16384, 1, tiles) for tiles in PREFILL]
        every += [Trial("prefill", shape, WINDOW, 32768, 1, tiles) for tiles in PREFILL if tiles.block_m == 128 or dim == 256]
        every += [Trial("decode", shape, None, 131072, 1, tiles) for tiles in DECODE]
    llama = Shape("", 32, 8, 128)
    best = tuning.TILES[9, "decode", 128, 2]
    for programs in PROGRAMS:
        every += [Trial("decode", llama, None, length, 1, best, programs) for length in (8192, 131072)]
        every += [
            Trial("decode", llama, None, 16384, 8, best, programs),
            Trial("decode", llama, WINDOW, 131072, 1, best, programs),
        ]
    return every[:1] if smoke else every


def _compile_only(trial: Trial) -> str:
    try:
        trial.run(timed=False)
    except RuntimeError as error:  # tiles that do not fit the GPU are part of the sweep
        return str(error).splitlines()[0][:80]
    return ""


def sweep(*, smoke: bool = False) -> list[Row]:
    """Compile all trials in parallel, then time them one by one."""
    everything = trials(smoke=smoke)
    if not CUDA:
        print("sweep times tiles of Triton kernels, and torch finds no GPU: nothing is measured")
        return []
    workers = min(14, os.cpu_count() or 1)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=end_with, initargs=(os.getpid(),)) as pool:
        problems = list(pool.map(_compile_only, everything, chunksize=1))
    rows = []
    for trial, problem in zip(everything, problems, strict=True):
        timing = Timing(*(float("nan"),) * 4)
        if not problem:
            try:
                timing = trial.run()
            except RuntimeError as error:
                problem = str(error).splitlines()[0][:80]
        tiles = " ".join(f"{name}={value}" for name, value in asdict(trial.tiles).items())
        rows.append(
            measured(
                timing,
                bench="sweep",
                what=trial.phase,
                shape=f"{trial.batch} x {trial.shape}",
                mask=str(causal if trial.mask is None else trial.mask),
                density=float("nan"),
                q_len=trial.length if trial.phase == "prefill" else 1,
                kv_len=trial.length,
                dtype="bfloat16",
                kernel=f"{tiles} programs={trial.programs}",
                note=problem,
            )
        )
    return rows
