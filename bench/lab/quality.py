"""``python -m bench quality``: which methods answer what, within how many bytes; ``plan.GROUPS`` are the parts of a run."""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import torch

from bench.lab.evaluation import findings, methods
from bench.lab.evaluation.jobs import Asking, Cell, Fluency, Job, Size, done
from bench.lab.evaluation.methods import FULL
from bench.lab.evaluation.plan import GROUPS, NEEDLES, TRAINED, Plan
from bench.lab.evaluation.rows import Row, Table
from bench.lab.model import CHECKPOINT
from bench.measure.timing import RESULTS
from sparse_compile.head_profile import Profile

PUBLISHED = "gates-published-penalty.json"
WORKERS = 12  # of a GPU; every step is launched by Python, so that one process leaves a GPU idle
FILES = {"depths": "quality-depth", "fluency": "quality-perplexity"}  # of groups; all others: quality


def quality(
    out: Path, *, folder: Path = CHECKPOINT, groups: Sequence[str] = tuple(GROUPS), named: str = "", workers: int | None = None
) -> None:
    """Ask the model of ``folder``, whose profiles ``calibrate`` wrote beside it, in so many processes; CSVs grow in ``out``.

    Raises ``RuntimeError`` at the end, with everything else written, if a method failed.
    """
    plan = Plan(Profile.load(folder / "gates.json"), Profile.load(folder / "echo.json"), Size(folder))
    jobs = [
        (FILES.get(group, "quality"), job)
        for group in groups
        for job in GROUPS[group](plan)
        if re.search(named, job.method.name)
    ]
    if workers is None:
        workers = min(WORKERS * max(1, torch.cuda.device_count()), max(1, (os.cpu_count() or 1) - 2))
    failed = _run(jobs, out, workers)
    told = findings.found(out, plan.gates, plan.echo, needles=NEEDLES, length=TRAINED)
    if (folder / PUBLISHED).exists():
        told = chain(told, findings.published(Profile.load(folder / PUBLISHED), plan.echo))
    findings.write(out, told)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(jobs)} jobs failed:\n" + "\n".join(failed))


def smoke(out: Path) -> None:
    """Two methods and two tasks, over a tiny model with random weights."""
    size = Size(None, items=2, seeds=3, rows=6, relaxed_rows=3)
    profile = methods.random_profile(Profile([[0.0]] * 2), 0)
    cells = (Cell("multi_key", 160), Cell("turns", 160, question="prefilled"))
    both = FULL, methods.by_heads("gates", profile, 1 / 2, 160).relaxed()
    _run([("quality", Asking(method, cells, 160, size)) for method in both], out, workers=0)


def _run(jobs: Sequence[tuple[str, Job]], out: Path, workers: int) -> list[str]:
    """Run jobs, each of which writes to a file; what went wrong."""
    tables = {name: Table(out / f"{name}.csv", Fluency if "perplexity" in name else Row) for name, _ in jobs}
    began, failed = time.perf_counter(), list[str]()
    for count, (at, rows) in enumerate(done([job for _, job in jobs], workers, failed)):
        tables[jobs[at][0]].add(rows)
        print(f"{time.perf_counter() - began:.0f} s, {count + 1} of {len(jobs)}: {told(rows)}", flush=True)
    return failed


def told(rows: Sequence[Row | Fluency]) -> str:
    """A line of what a job found."""
    first = rows[0]
    budget = "" if math.isnan(first.budget) else f" at {first.budget:.4g}"
    cells = [
        f"{row.position}: {row.perplexity:.2f}" if isinstance(row, Fluency) else f"{row.cell} {row.accuracy:.1%}"
        for row in rows
    ]
    return f"{first.method}{budget}, {first.prefill}, held {first.held:.3f}: {', '.join(cells)}"


def main() -> None:
    """``python -m bench.lab.quality``: some groups, so many processes."""
    parser = argparse.ArgumentParser(prog="bench.lab.quality", description=__doc__)
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="the folder of the checkpoint, gates.json and echo.json")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--named", default="", help="methods whose name this regular expression finds (default: all)")
    parser.add_argument("--workers", type=int, help=f"processes (default: {WORKERS} for each GPU, and two fewer than cores)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the CSVs go")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped: what was measured so far is written"))
    quality(chosen.out, folder=chosen.model, groups=chosen.groups, named=chosen.named, workers=chosen.workers)


if __name__ == "__main__":
    main()
