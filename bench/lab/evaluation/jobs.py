"""Jobs of the quality bench, which each evaluate one method, and a pool that runs them on processes and GPUs."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import queue
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.lab.data.haystack import repository_text
from bench.lab.data.items import Items
from bench.lab.data.tasks import TASKS
from bench.lab.data.words import START
from bench.lab.evaluation.budgets import dense_bytes, held_bytes, read_bytes
from bench.lab.evaluation.methods import Method
from bench.lab.evaluation.rows import Row, wilson
from bench.lab.model import build, config, load
from bench.lab.session import Session
from bench.measure.stopping import end_with
from bench.measure.timing import environment

SEED = 1 << 33  # first seed of the items; neither training nor scoring uses it
LONGEST = 900  # seconds to wait until the next job ends


@dataclass(frozen=True)
class Cell:
    """A task at a length, the depth of its needle, and whether its first question is ``decoded`` or ``prefilled``."""

    task: str
    length: int
    depth: float | None = None
    question: str = "decoded"


@dataclass(frozen=True)
class Size:
    """The model, the number of seeds and of items per seed in a cell, and the number of items in a batch.

    ``folder`` None stands for a tiny model with random weights.
    """

    folder: Path | None
    items: int = 170
    seeds: int = 3
    rows: int = 255
    relaxed_rows: int = 51  # items in a batch if prompts are not cut into chunks, whose masks are large

    def model(self) -> Any:
        """Build or load a new model in float32."""
        return build(0, config(layers=2, hidden=64)).eval() if self.folder is None else load(self.folder)

    def checkpoint(self) -> str:
        """Return the first digits of the hash of the model's weights."""
        if self.folder is None:
            return "random"
        return hashlib.sha256((self.folder / "model.safetensors").read_bytes()).hexdigest()[:12]


@dataclass(frozen=True)
class Asking:
    """A job that evaluates one method on its cells, with a cache of ``length`` tokens."""

    method: Method
    cells: tuple[Cell, ...]
    length: int
    size: Size

    def __call__(self, device: str) -> list[Row]:
        rows = self.size.rows if self.method.mode == "strict" else self.size.relaxed_rows
        session = Session(self.size.model().to(device), self.method, rows=rows, length=self.length)
        return [self._row(session, cell) for cell in self.cells]

    def _row(self, session: Session, cell: Cell) -> Row:
        began = time.perf_counter()
        turns = session.right(made(cell, self.size), question=cell.question)
        every = turns.all(1)
        right, total = int(every.sum()), len(every)
        low, high = wilson(right, total)
        cache, dense = session.cache, dense_bytes(session.cache)
        return Row(
            method=self.method.name,
            budget=self.method.budget,
            counts=self.method.counts,
            held=held_bytes(cache) / dense,
            read=read_bytes(cache) / dense,
            held_bytes=round(held_bytes(cache)),
            prefill=self.method.mode,
            question=cell.question,
            task=cell.task,
            length=cell.length,
            depth=math.nan if cell.depth is None else cell.depth,
            seeds=self.size.seeds,
            items=total,
            accuracy=right / total,
            low=low,
            high=high,
            turn_accuracy=float(turns.float().mean()),
            by_turn=_listed(turns.float().mean(0)),
            by_seed=_listed(every.unflatten(0, (self.size.seeds, -1)).float().mean(1)),
            seconds=time.perf_counter() - began,
            checkpoint=self.size.checkpoint(),
            **environment(),
        )


@dataclass(frozen=True)
class Fluency:
    """Perplexity of the ``bucket`` tokens of held-out text from ``position`` on, in the second half of a cache."""

    method: str
    budget: float
    prefill: str
    held: float
    position: int
    bucket: int
    perplexity: float
    checkpoint: str
    gpu: str
    torch: str
    commit: str
    date: str


@dataclass(frozen=True)
class Reading:
    """A job that measures the perplexity of held-out text under one method, decoded from the middle of ``length`` tokens on."""

    method: Method
    length: int
    size: Size
    rows: int = 32
    bucket: int = 64

    def __call__(self, device: str) -> list[Fluency]:
        session = Session(self.size.model().to(device), self.method, rows=self.rows, length=self.length)
        pool = repository_text().pool
        begins = torch.linspace(0, len(pool) - self.length, self.rows).long()
        text = pool[begins[:, None] + torch.arange(self.length - 1)]
        tokens = torch.cat([text.new_full((self.rows, 1), START), text], dim=1)
        begin = self.length // 2
        losses = session.losses(tokens, begin).double().unflatten(1, (-1, self.bucket)).mean((0, 2)).exp().tolist()
        same: dict[str, Any] = {"method": self.method.name, "budget": self.method.budget, "prefill": self.method.mode}
        same |= {"held": held_bytes(session.cache) / dense_bytes(session.cache), "bucket": self.bucket}
        same |= {"checkpoint": self.size.checkpoint(), **environment()}
        return [
            Fluency(position=begin + at * self.bucket, perplexity=perplexity, **same) for at, perplexity in enumerate(losses)
        ]


Job = Asking | Reading


def made(cell: Cell, size: Size) -> Items:
    """Make the items of all seeds, one seed after the other. They are made on the CPU and are the same on every machine."""
    task = TASKS[cell.task]
    parts = []
    for seed in range(size.seeds):
        rng = torch.Generator().manual_seed(SEED + seed)
        parts.append(task.make(size.items, cell.length, rng, depth=cell.depth))
    turns = tuple(
        (torch.cat(question), torch.cat(answer))
        for question, answer in (zip(*turn, strict=True) for turn in zip(*(part.turns for part in parts), strict=True))
    )
    return Items(torch.cat([part.context for part in parts]), turns)


def done(jobs: Sequence[Job], workers: int, failed: list[str]) -> Iterator[tuple[int, list[Any]]]:
    """Run jobs in ``workers`` processes, and yield the number and the rows of each job when it ends.

    The errors of failed jobs are appended to ``failed``. Jobs are assigned to the GPUs in turn. With 0 ``workers``, jobs run in
    this process one after the other, and errors are raised.
    """
    devices = [f"cuda:{at}" for at in range(torch.cuda.device_count())] or ["cpu"]
    if not workers:
        yield from ((at, job(devices[0])) for at, job in enumerate(jobs))
        return
    ended: queue.Queue[tuple[int, list[Any]] | None] = queue.Queue()
    with multiprocessing.get_context("spawn").Pool(workers, _begin, (os.getpid(),)) as pool:
        for at, job in enumerate(jobs):
            call = run, (at, job, devices[at % len(devices)])
            pool.apply_async(*call, callback=ended.put, error_callback=_telling(job, failed, ended))
        for _ in jobs:
            result = ended.get(timeout=LONGEST)
            if result is not None:
                yield result
        pool.close()
        pool.join()


def run(at: int, job: Job, device: str) -> tuple[int, list[Any]]:
    """Run a job in a worker process."""
    try:
        rows = job(device)
        torch.cuda.empty_cache()
    except RuntimeError as error:  # errors of torch's compiler cannot be pickled for the parent process
        raise RuntimeError("".join(traceback.format_exception(error))) from None
    return at, rows


def _begin(parent: int) -> None:
    """Prepare a worker process. It has one thread, because there are as many workers as the machine can run."""
    end_with(parent)
    torch.set_num_threads(1)


def _telling(job: Job, failed: list[str], ended: queue.Queue[Any]) -> Callable[[BaseException], None]:
    def tell(error: BaseException) -> None:
        failed.append(f"{job.method.name}: {''.join(traceback.format_exception(error))}")
        print(f"failed: {job.method.name}: {error}", flush=True)
        ended.put(None)

    return tell


def _listed(shares: Tensor) -> str:
    return " ".join(f"{share:.3f}" for share in shares.tolist())
