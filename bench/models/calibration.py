"""Measure the time of a step and the memory when training the gates of an 8B model on one GPU."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from bench.measure.timing import CUDA, Row, Timing, measured
from bench.models.filled import GIB, peak, reset_peak, weights
from bench.models.model import LLAMA3_8B, TINY, build
from sparse_compile.calibration import Passkeys, train_gates

WARM_UP = 2  # untimed first steps, which compile and allocate memory
PUBLISHED = 2000  # steps of the published training


def run_gates(*, smoke: bool = False) -> list[Row]:
    """Time training steps on random weights, with one text of passkeys per step.

    The time of a step covers both forward passes and the backward pass.
    """
    config, length, steps = (TINY, 256, 6) if smoke else (LLAMA3_8B, 8192, 8)
    sizes: dict[str, Any] = {"count": 2, "size": 4} if smoke else {}
    data = Passkeys.of_tokens(config.vocab_size, longest=length, shortest=length, **sizes)
    times: list[float] = []

    def batches(step: int) -> tuple[Tensor, Tensor]:
        times.append(_now())
        if step == WARM_UP:
            reset_peak()
        return data(step)

    model = build(config)
    held = weights(model) / GIB
    train_gates(model, batches, steps=steps, progress=False, inner="inductor" if CUDA else "eager")
    times.append(_now())
    taken = [1e3 * (end - begin) for begin, end in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False)]
    return [gates_row(taken, peak() / GIB, held, length, "tiny" if smoke else "Llama-3-8B")]


def gates_row(taken: list[float], most: float, held: float, length: int, shape: str) -> Row:
    """Make a row of steps that took ``taken`` milliseconds each, with the peak of memory and the weights in GiB."""
    low, *_, high = statistics.quantiles(taken, n=5, method="inclusive")
    middle = statistics.median(taken)
    hours = PUBLISHED * middle / 3.6e6
    return measured(
        Timing(low, middle, high, most),
        bench="gates",
        what="a step of training gates, batch 1",
        shape=shape,
        mask="causal & (sink(128) | sliding_window(256))",
        density=1.0,
        q_len=length,
        kv_len=length,
        dtype="bfloat16" if CUDA or shape == "Llama-3-8B" else "float32",
        kernel="",
        note=f"peak of memory with {held:.2f} GiB of weights; {PUBLISHED:,} steps take {hours:.2f} hours; random weights",
    )


def _now() -> float:
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()
