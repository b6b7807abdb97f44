"""The methods that quality is asked of: a policy, a format and a prefill each, within a budget of bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bench.lab.evaluation.budgets import PAGE, SINK, heads_within
from sparse_compile import KVFormat, Policy
from sparse_compile.head_profile import Profile, masks_by_layer
from sparse_compile.masks import Mask, causal, page_topk, sink, sliding_window

BUDGETS = (1 / 2, 1 / 4, 1 / 8, 1 / 16)
QUARTER, RECENT = 1 / 4, 64  # of all KV heads, and the window of the others
RANDOM_SEEDS = range(5)


@dataclass(frozen=True)
class Method:
    """How keys and values are kept, read and filled.

    ``budget`` is the share of a dense cache that what it ``counts`` (bytes held, or bytes read by a step) should take; not a
    number where it takes what it takes.
    """

    name: str
    policy: Policy
    budget: float = math.nan
    counts: str = "held"
    kv: KVFormat | str | None = None
    mode: str = "strict"
    dtype: torch.dtype = torch.bfloat16

    def relaxed(self) -> Method:
        """The same, with a prompt that sees itself whole before rings forget."""
        return Method(self.name, self.policy, self.budget, self.counts, self.kv, "chunk_relaxed", self.dtype)


FULL = Method("full", Policy(causal), budget=1)


def streaming(recent: int) -> Mask:
    """The first tokens and the last ``recent``."""
    return causal & (sink(SINK) | sliding_window(recent))


def sink_and_recent(budget: float, length: int) -> Method:
    """A sink and a window in every head."""
    slots = int(budget * length) // PAGE * PAGE
    return Method("sink + recent", Policy(streaming(slots - SINK - 1)), budget)


def by_heads(name: str, profile: Profile, budget: float, length: int) -> Method:
    """The best heads of ``profile`` see everything, the others a sink and a window."""
    kv_heads = len(profile.scores) * len(profile.scores[0])
    full, recent = heads_within(budget, length, kv_heads)
    return Method(name, profile.policy(full / kv_heads, sink=SINK, recent=recent), budget)


def quarter(name: str, profile: Profile) -> Method:
    """A quarter of the KV heads sees everything, whatever bytes that takes."""
    return Method(f"{name}, a quarter of the heads", profile.policy(QUARTER, sink=SINK, recent=RECENT))


def pages(score: str, budget: float, length: int) -> Method:
    """A decode step reads the pages that promise most; all are held, and the digests of pages are read beside them."""
    chosen = causal & page_topk(_whole_pages(budget * length), page=PAGE, score=score)
    return Method(f"pages, {score}", Policy(prefill=causal, decode=chosen), budget, counts="read")


def heads_and_pages(profile: Profile, budget: float, length: int) -> Method:
    """Heads as in ``by_heads``; those that see everything hold it, and read a quarter of it."""
    kv_heads = len(profile.scores) * len(profile.scores[0])
    count, recent = heads_within(budget, length, kv_heads, digests=1 / PAGE)  # two keys for every page of keys and values
    full, others = profile.heads(count / kv_heads).full, streaming(recent)
    chosen = causal & page_topk(_whole_pages(length / 4), page=PAGE)
    prefill, decode = (
        Policy(layers=masks_by_layer(full, others)),
        Policy(layers=masks_by_layer(full, others, seeing=chosen)),
    )
    return Method("gates + pages", Policy(prefill=prefill, decode=decode), budget)


def in_fewer_bits(kv: KVFormat | str, name: str) -> Method:
    """Everything, in fewer bits."""
    return Method(name, Policy(causal), kv=kv)


def without(name: str, profile: Profile) -> Method:
    """The best quarter of the heads of ``profile`` streams, and all others see everything."""
    kept = tuple(tuple(not chosen for chosen in row) for row in profile.heads(QUARTER).full)
    return Method(name, Policy(layers=masks_by_layer(kept, streaming(RECENT))))


def random_profile(like: Profile, seed: int) -> Profile:
    """Scores by chance."""
    shape = len(like.scores), len(like.scores[0])
    return Profile(torch.rand(shape, generator=torch.Generator().manual_seed(seed)).tolist(), method="random")


def random_others(best: Profile, seed: int) -> Profile:
    """Scores by chance, all of them above those of the best quarter of ``best``."""
    kept = best.heads(QUARTER).full
    rows = zip(random_profile(best, seed).scores, kept, strict=True)
    return Profile([[score - is_best for score, is_best in zip(*row, strict=True)] for row in rows], method="random")


def _whole_pages(tokens: float) -> int:
    return max(PAGE, int(tokens) // PAGE * PAGE)
