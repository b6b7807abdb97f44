"""Benchmark lossless decoding: the times of a draft and of a verification, and how fast tokens come for each acceptance.

The caches pretend to hold a text, and the weights are random, so drafts are hardly ever right here. What an acceptance is worth
follows from the times: a round of ``n`` drafts takes ``n * draft + verify`` and yields ``1 + p + ... + p**n`` tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteriaList

import sparse_compile as sc
from bench.measure.clock import Clock
from bench.measure.timing import DEVICE, environment, write
from bench.models.filled import fill, forget, randomize
from bench.models.model import LLAMA3_8B, TINY, build
from sparse_compile.masks import causal, page_topk, sink, sliding_window

ACCEPTANCES = (0.6, 0.7, 0.8, 0.9)
LENGTHS = (131072, 524288)
AHEAD = 7
NEW = 48  # tokens of a call; almost each is a round of its own
FIRST = 8
DRAFTS: dict[str, Callable[[], Any]] = {
    "page_topk(4096)": lambda: causal & page_topk(4096),
    "page_topk(1024, every=4)": lambda: causal & page_topk(1024, every=4),
    "sink(4), window of 1020": lambda: causal & (sink(4) | sliding_window(1020)),
}


@dataclass(frozen=True)
class LosslessRow:
    """One policy for drafts at one length of a text, with ``ahead`` + 1 tokens in a verification.

    ``plain_ms`` is the median of exact decode steps of the same model in the same process. ``best_*`` are the speedups over
    them at an acceptance, with the best number of drafts up to ``ahead``, and ``break_even`` is the acceptance from which on
    drafts pay.
    """

    draft: str
    shape: str
    layers: int
    kv_len: int
    ahead: int
    plain_ms: float
    draft_ms: float
    verify_ms: float
    break_even: float
    best_60: float
    best_70: float
    best_80: float
    best_90: float
    kernels: str
    gpu: str = ""
    torch: str = ""
    commit: str = ""
    date: str = ""


def run_lossless(out: Path, *, smoke: bool = False) -> None:
    """Measure all policies at all lengths, and write ``lossless.csv`` to the folder ``out`` row by row."""
    config, lengths = (TINY, (256,)) if smoke else (LLAMA3_8B, LENGTHS)
    rows: list[LosslessRow] = []
    for row in measure_all(config, lengths, ahead=3 if smoke else AHEAD):
        rows.append(row)
        write(rows, out / "lossless.csv")
        print(row, flush=True)


def measure_all(config: Any, lengths: tuple[int, ...], *, ahead: int) -> Iterator[LosslessRow]:
    """Yield one row for each length and policy. Plain steps are measured first."""
    for length in lengths:
        forget()
        model = sc.compile(build(config))
        model.generation_config.eos_token_id = None
        plain = _plain(model, length)
        for name, draft in DRAFTS.items():
            yield _measure(model, length, name, sc.lossless(draft(), ahead=ahead), plain)


def speedup(acceptance: float, plain: float, draft: float, verify: float, ahead: int) -> float:
    """How much faster tokens come than from plain steps, with the best number of drafts up to ``ahead``."""
    rounds = [
        (sum(acceptance**n for n in range(drafts + 1)), drafts * draft + verify if drafts else plain)
        for drafts in range(ahead + 1)
    ]
    return max(tokens * plain / seconds for tokens, seconds in rounds)


def _plain(model: Any, length: int) -> float:
    cache = model.sparse_cache(max_length=length + NEW)
    clock = _generate(model, cache, length)
    return statistics.median(clock.milliseconds()[FIRST:]) / 1e3


def _measure(model: Any, length: int, name: str, method: Any, plain: float) -> LosslessRow:
    cache = model.sparse_cache(max_length=length + NEW + method.room, **method.cache_options)
    _generate(model, cache, length, custom_generate=method)
    done, config = method.statistics, model.config
    times = plain, done.draft_seconds, done.verify_seconds, method.ahead
    sites = [site for site in model.sparse_compile_report.sites if site.layer == config.num_hidden_layers - 1][-2:]
    row: dict[str, Any] = {
        "draft": name,
        "shape": "Llama-3-8B" if config.hidden_size == 4096 else "tiny Llama",
        "layers": config.num_hidden_layers,
        "kv_len": length,
        "ahead": method.ahead,
        "plain_ms": plain * 1e3,
        "draft_ms": done.draft_seconds * 1e3,
        "verify_ms": done.verify_seconds * 1e3,
        "break_even": done.draft_seconds / done.verify_seconds,
        "kernels": "; ".join(f"{site.q_len}: {site.kernel}" for site in sites),
    }
    row |= {f"best_{acceptance * 100:.0f}": speedup(acceptance, *times) for acceptance in ACCEPTANCES}
    return LosslessRow(**row, **environment())


def _generate(model: Any, cache: Any, length: int, **options: Any) -> Clock:
    """Continue a text of ``length`` tokens, of which the cache pretends to hold all but the last."""
    randomize(cache)
    fill(cache, length - 1)
    ids, clock = torch.randint(model.config.vocab_size, (1, length), device=DEVICE), Clock()
    clock.mark()
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=NEW,
        stopping_criteria=StoppingCriteriaList([clock]),
        **options,
    )
    return clock
