"""The published policies by name, as masks of one language."""

from __future__ import annotations

from sparse_compile import masks
from sparse_compile.masks import Mask, causal, sliding_window
from sparse_compile.policy import Policy


def dense() -> Policy:
    """Every head sees everything.

    >>> dense()
    Policy(causal)
    """
    return Policy(causal)


def streaming_llm(sink: int = 4, recent: int = 1020) -> Policy:
    """Every head sees the first ``sink`` tokens and the last ``recent``, its own included."""
    return Policy(_streaming(sink, recent))


def _streaming(sink: int, recent: int) -> Mask:
    return causal & (masks.sink(sink) | sliding_window(recent))
