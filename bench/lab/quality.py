"""``python -m bench quality``: which methods answer what, within how many bytes; see ``GROUPS`` for the parts of a run."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path

import torch

from bench.lab import methods
from bench.lab.jobs import Asking, Cell, Fluency, Job, Reading, Size, done
from bench.lab.methods import BUDGETS, FULL, FULL_FLOAT32, RANDOM_SEEDS, Method
from bench.lab.model import CHECKPOINT
from bench.lab.rows import Row, Table
from bench.lab.tasks import TASKS
from bench.timing import RESULTS
from sparse_compile import KVFormat
from sparse_compile.profile import Profile

NEEDLES = ("single", "multi", "multi_key", "multi_query", "turns")
OTHERS = tuple(name for name in TASKS if name not in NEEDLES)
TRAINED, SHORTER = 2048, 1024  # needles at the length the model was trained for, all other tasks at half of it
DEPTHS, LENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0), (512, 1024, 2048)
WORKERS = 12  # of a GPU; every step is launched by Python, so that one process leaves a GPU idle


@dataclass(frozen=True)
class Plan:
    """What all groups are made of."""

    gates: Profile
    echo: Profile
    size: Size

    def asking(self, makes: Callable[[int], Method]) -> Iterator[Job]:
        """A method made for a length, asked needles at the trained length and all other tasks at the shorter one."""
        yield self.needles(makes(TRAINED))
        yield self.others(makes(SHORTER))

    def relaxed(self, makes: Callable[[int], Method]) -> Iterator[Job]:
        """The same with a relaxed prefill, which sees more of a question that is prefilled with the context."""
        yield self.needles(makes(TRAINED).relaxed(), Cell("turns", TRAINED, question="prefilled"))
        yield self.others(makes(SHORTER).relaxed())

    def same(self, method: Method) -> Iterator[Job]:
        """A method that is the same at all lengths."""
        return self.asking(lambda length: method)

    def needles(self, method: Method, *also: Cell) -> Job:
        """The needle tasks at the trained length."""
        return Asking(method, (*(Cell(task, TRAINED) for task in NEEDLES), *also), TRAINED, self.size)

    def others(self, method: Method) -> Job:
        """All other tasks at the shorter length."""
        return Asking(method, tuple(Cell(task, SHORTER) for task in OTHERS), SHORTER, self.size)


def heads(plan: Plan) -> Iterator[Job]:
    """Full attention; a quarter of the heads by gates, echo and chance; and the model without its best heads, or others."""
    yield from plan.same(FULL)
    yield plan.needles(FULL_FLOAT32)
    yield from plan.same(methods.quarter("gates", plan.gates))
    for method in (methods.quarter("gates", plan.gates).relaxed(), methods.quarter("echo", plan.echo)):
        yield plan.needles(method)
    for seed in RANDOM_SEEDS:
        yield plan.needles(methods.quarter(f"random {seed}", methods.random_profile(plan.gates, seed)))
    yield plan.needles(methods.without("without the best heads by gates", plan.gates))
    yield plan.needles(methods.without("without the best heads by echo", plan.echo))
    worst = Profile([[-score for score in row] for row in plan.gates.scores])
    yield plan.needles(methods.without("without the last heads by gates", worst))
    for seed in RANDOM_SEEDS:
        others = methods.random_others(plan.gates, seed)
        yield plan.needles(methods.without(f"without other heads, {seed}", others))


def static(plan: Plan) -> Iterator[Job]:
    """Sink and recent tokens, and heads by gates, echo and chance, at all budgets; the prompt strictly and relaxed."""
    for budget in BUDGETS:
        window = partial(methods.sink_and_recent, budget)
        gates, echo = (partial(methods.by_heads, p.method, p, budget) for p in (plan.gates, plan.echo))
        yield from chain(*map(plan.asking, (window, gates, echo)))
        yield from chain(*map(plan.relaxed, (window, gates)))
        for seed in RANDOM_SEEDS if budget == 1 / 4 else RANDOM_SEEDS[:2]:
            profile = methods.random_profile(plan.gates, seed)
            yield plan.needles(methods.by_heads(f"random {seed}", profile, budget, TRAINED))


def chosen(plan: Plan) -> Iterator[Job]:
    """Page selection, and heads that select."""
    for budget in BUDGETS:
        selecting = [partial(methods.pages, score, budget) for score in ("minmax", "mean")]
        both = partial(methods.heads_and_pages, plan.gates, budget)
        yield from chain(*map(plan.asking, (*selecting, both)))
    yield plan.needles(methods.heads_and_pages(plan.gates, 1 / 4, TRAINED).relaxed())


def quantised(plan: Plan) -> Iterator[Job]:
    """Everything in fewer bits, and half of it."""
    for kv in ("int8", "fp8", "int4"):
        yield from plan.same(methods.in_fewer_bits(kv, kv))
    mixed = methods.in_fewer_bits(KVFormat("int8", "int4"), "int8 keys, int4 values")
    yield from plan.same(mixed)
    half = methods.by_heads("gates, a half, int8", plan.gates, 1 / 2, TRAINED)
    yield plan.needles(replace(half, kv="int8", budget=float("nan")))


def depths(plan: Plan) -> Iterator[Job]:
    """One needle by depth and length, under what a quarter of the bytes of the trained length buys."""
    cells = tuple(Cell("single", length, depth) for length in LENGTHS for depth in DEPTHS)
    for method in _quarters(plan):
        yield Asking(method, cells, TRAINED, plan.size)


def fluency(plan: Plan) -> Iterator[Job]:
    """The perplexity of held-out text by position."""
    random = methods.by_heads("random 0", methods.random_profile(plan.gates, 0), 1 / 4, TRAINED)
    for method in (*_quarters(plan), random, methods.in_fewer_bits("int8", "int8"), methods.in_fewer_bits("int4", "int4")):
        yield Reading(method, TRAINED, plan.size)


def _quarters(plan: Plan) -> list[Method]:
    found = [FULL, methods.by_heads("gates", plan.gates, 1 / 4, TRAINED), methods.sink_and_recent(1 / 4, TRAINED)]
    return [*found, methods.pages("minmax", 1 / 4, TRAINED)]


GROUPS: dict[str, Callable[[Plan], Iterator[Job]]] = {
    "heads": heads, "depths": depths, "static": static, "chosen": chosen, "quantised": quantised, "fluency": fluency,
}  # fmt: skip
FILES = {"depths": "quality-depth", "fluency": "quality-perplexity"}  # of all others: quality


def quality(out: Path, *, smoke: bool = False, groups: Sequence[str] = tuple(GROUPS), workers: int | None = None) -> list[Row]:
    """Run these groups, and write what they say as it comes; the rows of accuracies.

    Raises ``RuntimeError`` at the end, with everything else written, if a method failed.
    """
    if smoke:
        asked = _smoke()
        jobs, workers = [("heads", job) for job in asked], 0
    else:
        plan = Plan(Profile.load(CHECKPOINT / "gates.json"), Profile.load(CHECKPOINT / "echo.json"), Size(CHECKPOINT))
        jobs = [(group, job) for group in groups for job in GROUPS[group](plan)]
    if workers is None:
        workers = min(WORKERS * max(1, torch.cuda.device_count()), max(1, (os.cpu_count() or 1) - 2))
    tables = {
        name: Table(out / f"{name}.csv", Fluency if "perplexity" in name else Row) for name in ("quality", *FILES.values())
    }
    began, found, failed = time.perf_counter(), [], list[str]()
    for count, (at, rows) in enumerate(done([job for _, job in jobs], workers, failed)):
        tables[FILES.get(jobs[at][0], "quality")].add(rows)
        found += [row for row in rows if isinstance(row, Row)]
        print(f"{time.perf_counter() - began:.0f} s, {count + 1} of {len(jobs)}: {told(rows)}", flush=True)
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(jobs)} jobs failed:\n" + "\n".join(failed))
    return found


def told(rows: Sequence[Row | Fluency]) -> str:
    """A line of what a job found."""
    first = rows[0]
    budget = "" if math.isnan(first.budget) else f" at {first.budget:.4g}"
    cells = [
        f"{row.position}: {row.perplexity:.2f}" if isinstance(row, Fluency) else f"{row.cell} {row.accuracy:.1%}"
        for row in rows
    ]
    return f"{first.method}{budget}, {first.prefill}, held {first.held:.3f}: {', '.join(cells)}"


def _smoke() -> list[Job]:
    """Two methods and a task, over a tiny model with random weights."""
    size = Size(None, items=2, seeds=3, rows=6, relaxed_rows=3)
    profile = methods.random_profile(Profile([[0.0]] * 2), 0)
    cells = (Cell("multi_key", 160), Cell("turns", 160, question="prefilled"))
    return [Asking(method, cells, 160, size) for method in (FULL, methods.by_heads("gates", profile, 1 / 2, 160).relaxed())]


def main() -> None:
    """``python -m bench.lab.quality``: some groups, so many processes."""
    parser = argparse.ArgumentParser(prog="bench.lab.quality", description=__doc__)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--workers", type=int, help="processes (default: 12 for each GPU, and two fewer than cores)")
    parser.add_argument("--smoke", action="store_true", help="two methods and a task, on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the CSVs go")
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped: what was measured so far is written"))
    quality(chosen.out, smoke=chosen.smoke, groups=chosen.groups, workers=chosen.workers)


if __name__ == "__main__":
    main()
