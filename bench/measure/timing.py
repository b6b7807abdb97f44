"""Timing, the physical bounds of the machine, and rows of results."""

from __future__ import annotations

import csv
import datetime
import math
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Row:
    """One measurement. Times are in milliseconds.

    ``ratio`` is the baseline's median divided by ours. ``bound_ms`` is the physical bound: the bytes divided by the copy
    bandwidth, or the useful FLOPs divided by the matmul rate. Both rates are measured in the same run. ``share`` is
    ``bound_ms`` divided by our median. ``kv_gib`` is the device memory of a cache of ``kv_len`` tokens.
    """

    bench: str
    what: str
    shape: str
    mask: str
    density: float
    q_len: int
    kv_len: int
    dtype: str
    kernel: str
    p20: float
    p50: float
    p80: float
    peak_gib: float
    kv_gib: float = float("nan")
    baseline: str = ""
    baseline_p50: float = float("nan")
    ratio: float = float("nan")
    bound_ms: float = float("nan")
    share: float = float("nan")
    note: str = ""
    gpu: str = ""
    torch: str = ""
    commit: str = ""
    date: str = ""


@dataclass(frozen=True)
class Timing:
    """Quantiles in milliseconds, and the peak of device memory in GiB above what was allocated before."""

    p20: float
    p50: float
    p80: float
    peak_gib: float

    def per(self, parts: int) -> Timing:
        """Return the time of one of ``parts`` equal parts."""
        return Timing(self.p20 / parts, self.p50 / parts, self.p80 / parts, self.peak_gib)


def measured(
    timing: Timing, *, baseline: str = "", slow: Timing | None = None, bound: float = float("nan"), **what: Any
) -> Row:
    """Make a row of ``timing`` with the baseline ``slow`` and the ``bound`` in milliseconds, and print it at once."""
    if slow is not None:
        what |= {"baseline": baseline, "baseline_p50": slow.p50, "ratio": slow.p50 / timing.p50}
    row = Row(**asdict(timing), bound_ms=bound, share=bound / timing.p50, **what, **environment())
    print_row(row)
    return row


def measure(run: Callable[[], Any], *, repeat: int = 20, warm_up: int = 3, seconds: float = 2.0) -> Timing:
    """Time ``run`` with device events on CUDA and the clock elsewhere, at most ``repeat`` times and for about ``seconds``."""
    for _ in range(warm_up):
        run()
    _wait()
    before = 0
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < repeat and (len(times) < 3 or time.perf_counter() - began < seconds):
        times.append(_once(run))
    peak = torch.cuda.max_memory_allocated() - before if CUDA else 0
    quantiles = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(quantiles[0], statistics.median(times), quantiles[3], peak / 2**30)


def _once(run: Callable[[], Any]) -> float:
    if not CUDA:
        began = time.perf_counter()
        run()
        return (time.perf_counter() - began) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def in_graph(run: Callable[[], Any], *, times: int = 10) -> Callable[[], Any]:
    """Record ``times`` calls of ``run`` in a CUDA graph, so that the gaps between small launches are not timed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(times):
            run()
    return graph.replay


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


@cache
def bandwidth() -> float:
    """Return the bytes per second that a large copy reads and writes."""
    size = 1 << (31 if CUDA else 26)
    source, target = torch.ones(size, dtype=torch.int8, device=DEVICE), torch.empty(size, dtype=torch.int8, device=DEVICE)
    return 2 * size / (measure(lambda: target.copy_(source)).p50 * 1e-3)


@cache
def matmul_rate() -> float:
    """Return the FLOPs per second of a large matrix product, in bf16 on CUDA and fp32 elsewhere."""
    size, dtype = (8192, torch.bfloat16) if CUDA else (1024, torch.float32)
    a, b = (torch.randn(size, size, dtype=dtype, device=DEVICE) for _ in range(2))
    return 2 * size**3 / (measure(lambda: a @ b).p50 * 1e-3)


def environment() -> dict[str, Any]:
    """Return the columns that say where and when a row was measured."""
    gpu = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    return {"gpu": gpu, "torch": torch.__version__, "commit": commit(), "date": datetime.date.today().isoformat()}


@cache
def commit() -> str:
    """Return the commit of this checkout, or ``BENCH_COMMIT`` if it is set, for an exported tree."""
    if "BENCH_COMMIT" in os.environ:
        return os.environ["BENCH_COMMIT"]
    result = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS)
    return result.stdout.strip() or "unknown"


def write(rows: Iterable[Any], path: Path) -> None:
    """Write rows of one dataclass, by default ``Row``, as CSV. A process that is killed meanwhile leaves the old file."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    with new.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(rows[0] if rows else Row)])
        writer.writeheader()
        for row in rows:
            values = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow({k: "" if v == "nan" else v for k, v in values.items()})
    new.replace(path)


def table(rows: list[Row]) -> str:
    """Format the main columns of the rows as text."""
    lines = [("what", "shape", "mask", "keys", "kernel", "ms", "baseline", "ms", "ratio", "of bound", "GiB", "note")]
    for r in rows:
        ms, base, peak = f"{r.p50:.4g}", _number(r.baseline_p50, ".4g"), f"{r.peak_gib:.3g}"
        ratio, share = _number(r.ratio, ".2f", "x"), _number(r.share, ".0%")
        lines.append((r.what, r.shape, r.mask, str(r.kv_len), r.kernel, ms, r.baseline, base, ratio, share, peak, r.note))
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


@dataclass
class Results:
    """The rows of a run so far. They are written to ``path``, if there is one, whenever one is added."""

    rows: list[Row] = field(default_factory=list)
    path: Path | None = None

    def add(self, row: Row) -> None:
        """Add a row, and write all rows: a long run may be cut short."""
        self.rows.append(row)
        if self.path is not None:
            write(self.rows, self.path)


results = Results()


def print_row(row: Row) -> None:
    """Print and keep one row as soon as it is measured."""
    results.add(row)
    against = f"{_number(row.ratio, '.2f', 'x')} of {row.baseline} ({_number(row.baseline_p50, '.4g')} ms)"
    share = _number(row.share, ".0%", " of the bound")
    what = f"{row.bench}: {row.what}; {row.shape}; {row.kv_len} keys; {row.kernel}"
    print(f"{what}: {row.p50:.4g} ms, {against}, {share} {row.note}", flush=True)


def _number(value: float, how: str, unit: str = "") -> str:
    return "" if math.isnan(value) else f"{value:{how}}{unit}"
