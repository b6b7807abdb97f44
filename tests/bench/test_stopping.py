"""Check that SIGTERM ends a benchmark and its workers at once, and that the rows measured so far are kept."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from bench import __main__ as entry
from bench.attention import sweep
from bench.lab.evaluation import jobs
from bench.measure import timing
from bench.measure.stopping import end_with

ROOT = Path(__file__).parents[2]
SOON = 10  # seconds; the operations below take minutes
LONG = """
def long(*given, **options):
    print("running", os.getpid(), flush=True)
    torch.linalg.eigvals(torch.randn(4000, 4000))
"""
MEASURES = f"""
import os, sys, torch
import bench.__main__ as entry
from bench.measure import timing
{LONG}
def measures_first(*, smoke):
    timing.measured(timing.Timing(1, 1, 1, 0), bench="mine", what="first", shape="", mask="", density=1.0, q_len=1, kv_len=1,
                    dtype="", kernel="")
    long()

entry.BENCHES = dict.fromkeys(entry.BENCHES, measures_first)
entry.smoke = entry.run_generate = long
sys.argv = ["bench", *sys.argv[1:]]
entry.main()
"""
HAS_WORKER = f"""
import multiprocessing, os, sys, torch
from bench.measure.stopping import end_with
{LONG}
if __name__ == "__main__":
    multiprocessing.get_context("spawn").Pool(1, end_with, (os.getpid(),)).apply(long)
"""


@contextmanager
def started(script: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Run a script until it says that it runs a long operation, and yield it with the process that does."""
    command = [sys.executable, "-W", "ignore", str(script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=quiet, text=True) as process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if line.startswith("running"))
            yield process, int(line.split()[1])
        finally:
            process.kill()


def is_running(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has asked for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("name", ["prefill", "sweep", "generate", "quality"])
def test_a_long_operation_does_not_keep_a_benchmark_alive(name: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(MEASURES)
    with started(script, name, "--smoke", "--out", str(tmp_path)) as (process, _):
        process.terminate()
        assert process.wait(SOON) == -signal.SIGTERM
    if name in entry.BENCHES:
        with (tmp_path / f"{name}.csv").open(encoding="utf-8") as file:
            assert [row["what"] for row in csv.DictReader(file)] == ["first"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_benchmark(how: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(HAS_WORKER)
    with started(script) as (process, worker):
        assert worker != process.pid and is_running(worker)
        process.send_signal(how)
        process.wait(SOON)
    end = time.monotonic() + SOON
    while is_running(worker) and time.monotonic() < end:
        time.sleep(0.1)
    assert not is_running(worker)


def test_a_worker_whose_benchmark_is_gone_ends() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "bench.models.compiling", "ours", "1", "8", "1"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    assert done.returncode == 1 and not done.stdout


def test_pools_prepare_their_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quality bench and the sweep hand their own process id to each worker."""
    watched: list[int] = []
    monkeypatch.setattr(jobs, "end_with", watched.append)
    threads = torch.get_num_threads()
    jobs._begin(17)
    torch.set_num_threads(threads)
    assert watched == [17]
    made: list[tuple[object, ...]] = []

    class Made(Exception):
        """The pool was made, and the test needs no more."""

    def pool(*arguments: object, initializer: object, initargs: tuple[int], **options: object) -> object:
        made.append((initializer, *initargs))
        raise Made

    monkeypatch.setattr(sweep, "CUDA", True)
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", pool)
    with pytest.raises(Made):
        sweep.sweep(smoke=True)
    assert made == [(end_with, os.getpid())]


@pytest.mark.parametrize("name", [name for name in ("generate", *entry.BENCHES) if name not in entry.ANY_MACHINE])
def test_sizes_for_a_gpu_are_refused_without_one(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(timing, "CUDA", False)
    monkeypatch.setattr(sys, "argv", ["bench", name])
    with pytest.raises(SystemExit, match="2"):
        entry.main()
    message = f"{name} has texts and models that take hours on a CPU, and torch finds no GPU: use --smoke"
    assert message in capsys.readouterr().err
