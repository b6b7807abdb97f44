"""The methods of the quality bench: each has a policy, a KV format and a prefill mode, within a budget of bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bench.lab.evaluation.budgets import PAGE, SINK, heads_within
from sparse_compile import KVFormat, Policy
from sparse_compile.head_profile import Profile, masks_by_layer
from sparse_compile.masks import Mask, causal, page_topk, sink, sliding_window

BUDGETS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
QUARTER, RECENT = 1 / 4, 64  # share of KV heads that see everything, and the window of the others
RANDOM_SEEDS = range(5)


@dataclass(frozen=True)
class Method:
    """How keys and values are cached, read and prefilled.

    ``budget`` is the share of a dense cache that the method should take, or NaN if it has no budget. ``counts`` says which
    bytes count: those ``held`` by the cache, or those ``read`` by a step.
    """

    name: str
    policy: Policy
    budget: float = math.nan
    counts: str = "held"
    kv: KVFormat | str | None = None
    mode: str = "strict"
    dtype: torch.dtype = torch.bfloat16

    def relaxed(self) -> Method:
        """Return the same method with a relaxed prefill: the prompt sees all of itself before rings drop tokens."""
        return Method(self.name, self.policy, self.budget, self.counts, self.kv, "chunk_relaxed", self.dtype)


FULL = Method("full", Policy(causal), budget=1)


def streaming(recent: int) -> Mask:
    """Return a mask of the first ``SINK`` tokens and the last ``recent`` ones."""
    return causal & (sink(SINK) | sliding_window(recent))


def sink_and_recent(budget: float, length: int) -> Method:
    """Return a method that gives every head a sink and a window."""
    slots = int(budget * length) // PAGE * PAGE
    return Method("sink + recent", Policy(streaming(slots - SINK - 1)), budget)


def by_heads(name: str, profile: Profile, budget: float, length: int) -> Method:
    """Return a method in which the best heads of ``profile`` see everything, and the others a sink and a window."""
    kv_heads = len(profile.scores) * len(profile.scores[0])
    full, recent = heads_within(budget, length, kv_heads)
    return Method(name, profile.policy(full / kv_heads, sink=SINK, recent=recent), budget)


def quarter(name: str, profile: Profile) -> Method:
    """Return a method in which a quarter of the KV heads see everything, however many bytes that takes."""
    return Method(f"{name}, a quarter of the heads", profile.policy(QUARTER, sink=SINK, recent=RECENT))


def pages(score: str, budget: float, length: int) -> Method:
    """Return a method whose decode steps read only the top-scoring pages.

    The cache holds all pages. A step reads the page summaries as well.
    """
    chosen = causal & page_topk(_whole_pages(budget * length), page=PAGE, score=score)
    return Method(f"pages, {score}", Policy(prefill=causal, decode=chosen), budget, counts="read")


def heads_and_pages(profile: Profile, budget: float, length: int) -> Method:
    """Return a method with full heads as in ``by_heads``. They hold all tokens and read a quarter of them."""
    kv_heads = len(profile.scores) * len(profile.scores[0])
    count, recent = heads_within(budget, length, kv_heads, summaries=1 / PAGE)  # a page summary is as large as two keys
    full, others = profile.heads(count / kv_heads).full, streaming(recent)
    chosen = causal & page_topk(_whole_pages(length / 4), page=PAGE)
    prefill, decode = (
        Policy(layers=masks_by_layer(full, others)),
        Policy(layers=masks_by_layer(full, others, seeing=chosen)),
    )
    return Method("gates + pages", Policy(prefill=prefill, decode=decode), budget)


def in_fewer_bits(kv: KVFormat | str, name: str) -> Method:
    """Return a method that caches all tokens, quantized."""
    return Method(name, Policy(causal), kv=kv)


def without(name: str, profile: Profile) -> Method:
    """Return a method in which the best quarter of the heads of ``profile`` stream, and all others see everything."""
    kept = tuple(tuple(not chosen for chosen in row) for row in profile.heads(QUARTER).full)
    return Method(name, Policy(layers=masks_by_layer(kept, streaming(RECENT))))


def random_profile(like: Profile, seed: int) -> Profile:
    """Return random scores for the heads of ``like``."""
    shape = len(like.scores), len(like.scores[0])
    return Profile(torch.rand(shape, generator=torch.Generator().manual_seed(seed)).tolist(), method="random")


def random_others(best: Profile, seed: int) -> Profile:
    """Return random scores that rank the best quarter of the heads of ``best`` below all others."""
    kept = best.heads(QUARTER).full
    rows = zip(random_profile(best, seed).scores, kept, strict=True)
    return Profile([[score - is_best for score, is_best in zip(*row, strict=True)] for row in rows], method="random")


def _whole_pages(tokens: float) -> int:
    return max(PAGE, int(tokens) // PAGE * PAGE)
