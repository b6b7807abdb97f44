"""Ask the trained model for a needle in 1,024 tokens, with all of its cache and with half: ``python -m bench.lab.demo``."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from bench.lab.data.items import Items
from bench.lab.data.tasks import TASKS
from bench.lab.evaluation import methods
from bench.lab.evaluation.budgets import dense_bytes, held_bytes
from bench.lab.evaluation.methods import FULL, Method
from bench.lab.model import CHECKPOINT, load
from bench.lab.session import Session
from sparse_compile.head_profile import Profile

ITEMS, LENGTH, DEPTH = 48, 1024, 0.25
SEED = 1 << 35  # nothing else uses it


def run_demo(folder: Path = CHECKPOINT, *, items: int = ITEMS, length: int = LENGTH) -> dict[str, float]:
    """Print the accuracy and the bytes of every method, and return the accuracies by name."""
    gates = Profile.load(folder / "gates.json")
    asked = TASKS["single"].make(items, length, torch.Generator().manual_seed(SEED), depth=DEPTH)
    print(f"{items} texts of {length} tokens, with a needle at a quarter of each. The model has 4.6 million parameters and was")
    print("trained to retrieve (bench/lab). An answer counts if all of it is right. The cache is a SparseCache, and attention")
    print("runs on the dense reference.")
    halves = methods.by_heads("half of it, by calibrated heads", gates, 1 / 2, length), methods.sink_and_recent(1 / 2, length)
    names = "all of the cache", "half of it: retrieval heads see all", "half of it: all heads stream"
    return {
        name: _answered(name, folder, replace(method, dtype=torch.float32), asked)
        for name, method in zip(names, (FULL, *halves), strict=True)
    }


def _answered(name: str, folder: Path, method: Method, asked: Items) -> float:
    began = time.perf_counter()
    session = Session(load(folder), method, rows=len(asked.context), length=asked.tokens().shape[1])
    accuracy = float(session.right(asked).float().mean())
    held, dense = held_bytes(session.cache), 2 * dense_bytes(session.cache)  # twice, because the model runs in float32 here
    kept = f"{held / 2**10:.0f} of {dense / 2**10:.0f} KiB a text"
    print(f"  {name:<38} {accuracy:6.1%} right  {kept}  {time.perf_counter() - began:5.1f} s", flush=True)
    return accuracy


if __name__ == "__main__":
    run_demo()
