"""Record when ``generate`` produces each token."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import StoppingCriteria

from bench.measure.timing import CUDA


class Clock(StoppingCriteria):
    """Records when each token is produced, without waiting for it."""

    def __init__(self) -> None:
        self.marks: list[Any] = []

    def mark(self) -> None:
        """Record the time at which the device reaches this point."""
        if CUDA:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Record a token, and stop no text."""
        self.mark()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def milliseconds(self) -> list[float]:
        """Return the times from each mark to the next."""
        pairs = zip(self.marks[:-1], self.marks[1:], strict=True)
        if not CUDA:
            return [(end - start) * 1e3 for start, end in pairs]
        torch.cuda.synchronize()
        return [float(start.elapsed_time(end)) for start, end in pairs]
