"""``python -m bench quality``: measure how well each method answers, and within how many bytes.

``plan.GROUPS`` are the parts of a run.
"""

from __future__ import annotations

import argparse
import math
import os
import re
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
WORKERS = 12  # processes per GPU; Python launches every step, so one process leaves a GPU idle
FILES = {"depths": "quality-depth", "fluency": "quality-perplexity"}  # CSVs of these groups; all others write to quality


def quality(
    out: Path, *, folder: Path = CHECKPOINT, groups: Sequence[str] = tuple(GROUPS), named: str = "", workers: int | None = None
) -> None:
    """Evaluate the model of ``folder`` in ``workers`` processes, and add rows to the CSVs in ``out`` as jobs end.

    ``folder`` also holds the profiles that ``calibrate`` wrote. ``named`` is a regular expression that selects methods by name.
    Raises ``RuntimeError`` at the end if a method failed; everything else is written by then.
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
    lines = findings.found(out, plan.gates, plan.echo, needles=NEEDLES, length=TRAINED)
    if (folder / PUBLISHED).exists():
        lines = chain(lines, findings.published(Profile.load(folder / PUBLISHED), plan.echo))
    findings.write(out, lines)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(jobs)} jobs failed:\n" + "\n".join(failed))


def smoke(out: Path) -> None:
    """Run two methods and two tasks on a tiny model with random weights."""
    size = Size(None, items=2, seeds=3, rows=6, relaxed_rows=3)
    profile = methods.random_profile(Profile([[0.0]] * 2), 0)
    cells = (Cell("multi_key", 160), Cell("turns", 160, question="prefilled"))
    both = FULL, methods.by_heads("gates", profile, 1 / 2, 160).relaxed()
    _run([("quality", Asking(method, cells, 160, size)) for method in both], out, workers=0)


def _run(jobs: Sequence[tuple[str, Job]], out: Path, workers: int) -> list[str]:
    """Run jobs, add the rows of each to its file, and return the errors."""
    tables = {name: Table(out / f"{name}.csv", Fluency if "perplexity" in name else Row) for name, _ in jobs}
    began, failed = time.perf_counter(), list[str]()
    for count, (at, rows) in enumerate(done([job for _, job in jobs], workers, failed)):
        tables[jobs[at][0]].add(rows)
        print(f"{time.perf_counter() - began:.0f} s, {count + 1} of {len(jobs)}: {told(rows)}", flush=True)
    return failed


def told(rows: Sequence[Row | Fluency]) -> str:
    """Summarize the rows of a job in one line."""
    first = rows[0]
    budget = "" if math.isnan(first.budget) else f" at {first.budget:.4g}"
    cells = [
        f"{row.position}: {row.perplexity:.2f}" if isinstance(row, Fluency) else f"{row.cell} {row.accuracy:.1%}"
        for row in rows
    ]
    return f"{first.method}{budget}, {first.prefill}, held {first.held:.3f}: {', '.join(cells)}"


def main() -> None:
    """Run ``python -m bench.lab.quality`` for some groups, with some number of processes."""
    parser = argparse.ArgumentParser(prog="bench.lab.quality", description=__doc__)
    parser.add_argument("--model", type=Path, default=CHECKPOINT, help="folder of the checkpoint, gates.json and echo.json")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--named", default="", help="regular expression for the names of methods to run (default: all)")
    parser.add_argument("--workers", type=int, help=f"processes (default: {WORKERS} per GPU, at most two fewer than cores)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSVs")
    chosen = parser.parse_args()
    quality(chosen.out, folder=chosen.model, groups=chosen.groups, named=chosen.named, workers=chosen.workers)


if __name__ == "__main__":
    main()
