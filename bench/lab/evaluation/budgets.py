"""What a budget of bytes buys, and what a cache holds and reads of it: shares of a dense cache of 16-bit numbers."""

from __future__ import annotations

from typing import NamedTuple

from sparse_compile import SparseCache
from sparse_compile.cache.layer import SparseCacheLayer
from sparse_compile.passes.storage.layer_plan import Pages, codes_of

PAGE = 16  # tokens of a page in all caches here, and of what a page selection describes as one
SINK = 4


class Heads(NamedTuple):
    """How many KV heads see everything, and the window of the others, which also keep ``SINK`` tokens."""

    full: int
    recent: int


def heads_within(budget: float, length: int, kv_heads: int, *, digests: float = 0) -> Heads:
    """As many full heads of all ``kv_heads`` of a model as ``budget`` of a dense cache pays for, and windows of what is left.

    Every other head has a ring of at least a page; ``digests`` of full heads come on top, as a share of them. Raises
    ``ValueError`` for budgets that do not pay for these.
    """
    tokens, each = int(budget * length * kv_heads), round(length * (1 + digests))
    full = min(kv_heads, max(0, tokens - kv_heads * PAGE) // (each - PAGE))
    if full == kv_heads:
        return Heads(full, length)
    slots = (tokens - full * each) // (kv_heads - full) // PAGE * PAGE
    if slots < PAGE:
        raise ValueError(f"budget {budget:g} of {length} tokens needs a page of {PAGE} for each KV head, got {slots} tokens")
    return Heads(full, slots - SINK - 1)  # a relaxed prefill keeps one token more


def held_bytes(cache: SparseCache) -> float:
    """Bytes of a sequence."""
    return cache.nbytes / cache.max_batch


def dense_bytes(cache: SparseCache) -> float:
    """Bytes of a sequence of the same length in a dense cache of 16-bit numbers."""
    return 2 * cache.dense_nbytes / cache.kept[0].dtype.itemsize / cache.max_batch


def read_bytes(cache: SparseCache) -> float:
    """Bytes of a sequence that the last decode step reads: rings, pages or those chosen among them, and their digests."""
    return sum(_read(layer) for layer in cache.kept) / cache.max_batch


def _read(layer: SparseCacheLayer) -> float:
    total = 0.0
    for number, storage in enumerate(layer.plan.storages):
        numbers = sum(buffer.nbytes for buffer in layer.buffers[2 * number : 2 * number + 2])
        codes = sum(part.nbytes for pair in codes_of(layer.plan, layer.codes, number) for part in pair.used())
        chosen = storage.selecting if isinstance(storage, Pages) else None
        pages = 1 if chosen is None else min(1, chosen.budget * chosen.page_size / storage.slots)
        total += numbers + pages * codes if codes else pages * numbers
    return total + sum(digest.nbytes for digest, _ in layer.digests())
