"""The heads and windows that a budget of bytes buys, and the bytes that a cache holds and reads.

Budgets are shares of a dense cache of 16-bit numbers.
"""

from __future__ import annotations

from typing import NamedTuple

from sparse_compile import SparseCache
from sparse_compile.cache.layer import SparseCacheLayer
from sparse_compile.passes.storage.layer_plan import quantized_of

PAGE = 16  # tokens of a page in all caches here, and of a page summary
SINK = 4


class Heads(NamedTuple):
    """How many KV heads see everything, and the window of the others, which also cache the first ``SINK`` tokens."""

    full: int
    recent: int


def heads_within(budget: float, length: int, kv_heads: int, *, summaries: float = 0) -> Heads:
    """Return as many full heads as ``budget`` pays for, out of all ``kv_heads`` of a model, and the window of the others.

    ``budget`` is a share of a dense cache. Every other head gets a ring of at least a page. The page summaries of a full head
    take the share ``summaries`` of its keys and values on top. Raises ``ValueError`` for budgets too small for these rings.
    """
    tokens, each = int(budget * length * kv_heads), round(length * (1 + summaries))
    full = min(kv_heads, max(0, tokens - kv_heads * PAGE) // (each - PAGE))
    if full == kv_heads:
        return Heads(full, length)
    slots = (tokens - full * each) // (kv_heads - full) // PAGE * PAGE
    if slots < PAGE:
        raise ValueError(
            f"budget {budget:g} of {length} tokens needs a page of {PAGE} for each KV head, got {slots} tokens: raise it"
        )
    return Heads(full, slots - SINK - 1)  # a relaxed prefill caches one token more


def held_bytes(cache: SparseCache) -> float:
    """Return the bytes that a cache holds for one sequence."""
    return cache.nbytes / cache.max_batch


def dense_bytes(cache: SparseCache) -> float:
    """Return the bytes of one sequence of the same length in a dense cache of 16-bit numbers."""
    return 2 * cache.dense_nbytes / cache.cached_layers[0].dtype.itemsize / cache.max_batch


def read_bytes(cache: SparseCache) -> float:
    """Return the bytes of one sequence that the last decode step reads.

    It reads rings, all pages or the selected ones, and the page summaries.
    """
    return sum(_read(layer) for layer in cache.cached_layers) / cache.max_batch


def _read(layer: SparseCacheLayer) -> float:
    total = 0.0
    for number, storage in enumerate(layer.plan.storages):
        numbers = sum(buffer.nbytes for buffer in layer.buffers[2 * number : 2 * number + 2])
        quantized = sum(part.nbytes for pair in quantized_of(layer.plan, layer.quantized, number) for part in pair.used())
        chosen = storage.selection
        pages = 1 if chosen is None else min(1, chosen.budget * chosen.page_size / storage.slots)
        total += numbers + pages * quantized if quantized else pages * numbers
    return total + sum(summary.nbytes for summary, _ in layer.summaries())
