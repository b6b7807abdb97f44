"""Benchmark a long prompt in chunks and ``generate`` over a SparseCache, against a dense cache and stock transformers."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

import sparse_compile as sc
from bench.measure.clock import Clock
from bench.measure.timing import DEVICE, Row, Timing
from bench.models.filled import (
    DENSE,
    GIB,
    GQA,
    MODE,
    TINY_HALF,
    Case,
    fill,
    fill_static,
    first_call,
    forget,
    graphs,
    peak,
    randomize,
    reset_peak,
    row,
    seconds_of,
    static_cache,
    weights,
)
from bench.models.model import build, kernels_of
from sparse_compile.masks import Mask

TOKENS = 128  # tokens that generate() produces; the last LATE of them are timed
LATE = 60


def run_cache_prefill(*, smoke: bool = False) -> list[Row]:
    """Time the prefill of a long prompt in chunks."""
    case, length, chunk = (TINY_HALF, 1024, 512) if smoke else (GQA, 327680, 32768)
    model = build(case.config)
    timing, kernel, note = _prefill(model, case, case.mask, length, chunk)
    slow, _, dense_note = _prefill(model, case, None, length, chunk)
    return [
        row(
            timing,
            DENSE,
            slow,
            what=f"prefill in chunks of {chunk}, {case.what(case.mask)}",
            shape=case.name,
            mask=case.mask,
            density=case.mask.density(length, length, heads=case.config.num_attention_heads),
            lengths=(length, length),
            kernel=kernel,
            kv_gib=case.cache(case.mask, length, "meta").nbytes / GIB,
            note=f"one run; {note}; dense: {dense_note}",
        )
    ]


def _prefill(model: Any, case: Case, mask: Mask | None, length: int, chunk: int) -> tuple[Timing, str, str]:
    """Time one prompt, after a first chunk that compiles. Returns the timing, the kernels and a note."""
    forget()
    cache = case.cache(mask, length)
    backend = sc.Backend(mask)
    fast: Any = torch.compile(model, backend=backend, dynamic=False)
    chunks = torch.randint(model.config.vocab_size, (1, length), device=DEVICE).split(chunk, dim=1)

    def forward(ids: Tensor) -> None:
        with torch.no_grad():
            fast(ids, past_key_values=cache, logits_to_keep=1)

    _, first = first_call(partial(forward, chunks[0]))
    cache.reset()
    took = [seconds_of(partial(forward, ids)) for ids in chunks]
    total = sum(took) * 1e3
    timing = Timing(total, total, total, peak() / GIB)
    note = f"peak {timing.peak_gib:.1f} GiB with {cache.nbytes / GIB:.1f} of KV and {weights(model) / GIB:.1f} of weights, "
    note += f"chunks took {took[0]:.2f} s to {took[-1]:.2f} s, first call {first:.0f} s, graphs {graphs(backend)}"
    print(f"{case.what(mask)}: {total / 1e3:.1f} s, {note}", flush=True)
    return timing, kernels_of(backend), note


def run_cache_generate(*, smoke: bool = False) -> list[Row]:
    """Time ``generate`` per token, from a cache that holds the whole prompt but its last token."""
    case, length = (TINY_HALF, 512) if smoke else (GQA, 131072)
    model = build(case.config)
    forget()
    static = static_cache(model, length + TOKENS)
    fill_static(static, length - 1)
    slow = _generate(model, static, length)
    del static
    forget()
    cache = case.cache(case.mask, length + TOKENS)
    randomize(cache)
    fill(cache, length - 1)
    model = sc.compile(model, case.mask, mode=MODE)
    timing = _generate(model, cache, length)
    report = model.sparse_compile_report
    kernel = " + ".join(dict.fromkeys(site.kernel for site in report.sites))
    return [
        row(
            timing,
            "generate, StaticCache",
            slow,
            what=f"generate, {case.what(case.mask)}, per token",
            shape=case.name,
            mask=case.mask,
            density=case.mask.density(1, length, q_offset=length - 1, heads=case.config.num_attention_heads),
            lengths=(1, length),
            kernel=kernel,
            kv_gib=cache.nbytes / GIB,
            note=f"the last {LATE} of {TOKENS} tokens, prompt not computed; peak of stock {slow.peak_gib:.1f} GiB; "
            f"graphs {report.compiles}",
        )
    ]


def _generate(model: Any, cache: Any, length: int) -> Timing:
    torch.manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), device=DEVICE)
    clock = Clock()
    model.generation_config.eos_token_id = None
    reset_peak()
    with torch.no_grad():
        out = model.generate(
            ids,
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=TOKENS,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    assert out.shape[1] == length + TOKENS
    times = clock.milliseconds()[-LATE:]
    quantiles = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(quantiles[0], statistics.mean(times), quantiles[3], peak() / GIB)
