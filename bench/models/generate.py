"""Benchmark what users do: a tokenizer's mask, ``sparse_compile.compile(model, policy)``, ``model.generate(...)``.

Nothing is pretended: prompts are prefilled, and every call is public. Each row is written as soon as it is measured.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import StoppingCriteriaList

import sparse_compile as sc
from bench.measure.clock import Clock
from bench.measure.timing import CUDA, DEVICE, bandwidth, environment, write
from bench.models.filled import GIB, forget, peak, reset_peak, weights
from bench.models.model import LLAMA3_8B, TINY, build
from sparse_compile.generation import rounded
from sparse_compile.masks import causal, page_topk

TOKENS = 64  # tokens of a call; the times of the 5th to the last count
FIRST = 4


@dataclass(frozen=True)
class GenerateRow:
    """One method at one length of a prompt. Medians are over the steps 5 to 64 of a second call.

    ``first_call_s`` is the whole first call, which compiles; ``first_token_s`` and all other numbers are those of the second.
    ``cache_gib`` is what the cache holds, and ``beside_gib`` what the peak holds besides weights and cache. ``equal`` is the
    share of the tokens that are equal to those of eager. ``share`` is the time to read the weights and the visible keys once,
    at the copy bandwidth that was measured in the same process, divided by the median.
    """

    method: str
    shape: str
    layers: int
    prompt: int
    first_call_s: float
    first_token_s: float
    p20_ms: float
    p50_ms: float
    p80_ms: float
    peak_gib: float
    cache_gib: float
    beside_gib: float
    equal: float
    share: float
    kernels: str
    notes: str
    gpu: str = ""
    torch: str = ""
    transformers: str = transformers.__version__
    commit: str = ""
    date: str = ""


@dataclass(frozen=True)
class Method:
    """How a model is prepared, and with which arguments ``generate`` is called.

    ``ours`` says that ``sparse_compile`` compiles the model. ``exact`` methods read all keys in 16 bits, and are measured
    against the physical bound.
    """

    name: str
    policy: Callable[[Any, int], Any] | None = None
    cache: dict[str, Any] | None = None
    arguments: dict[str, Any] | None = None
    ours: bool = True
    exact: bool = False


def _half(config: Any) -> list[list[float]]:
    """Gates of which every other KV head streams."""
    return [
        [float(head % 2 == layer % 2) for head in range(config.num_key_value_heads)]
        for layer in range(config.num_hidden_layers)
    ]


METHODS = (
    Method("eager", ours=False, exact=True),
    Method("stock static", ours=False, arguments={"cache_implementation": "static"}, exact=True),
    Method("exact", exact=True),
    Method("duo 50 %", lambda config, length: sc.policies.duo_attention(_half(config))),
    Method("streaming", lambda config, length: sc.policies.streaming_llm()),
    Method("lserve", lambda config, length: sc.policies.lserve(_half(config))),
    Method("quest", lambda config, length: sc.policies.quest(4096)),
    Method("page_topk(4096)", lambda config, length: sc.Policy(prefill=causal, decode=causal & page_topk(4096))),
    Method(
        "page_topk(4096), int8",
        lambda config, length: sc.Policy(prefill=causal, decode=causal & page_topk(4096)),
        cache={"kv": "int8"},
    ),
    Method("exact, int8", cache={"kv": "int8"}),
)
LENGTHS = (8192, 32768, 131072, 1 << 20)  # the longest fits for few methods


def run_generate(out: Path, *, smoke: bool = False) -> None:
    """Measure all methods at all lengths, and write ``generate.csv`` to the folder ``out`` row by row."""
    config, lengths = (TINY, (256,)) if smoke else (LLAMA3_8B, LENGTHS)
    write_rows(out / "generate.csv", measure_all(config, lengths, METHODS))


def measure_all(config: Any, lengths: tuple[int, ...], methods: tuple[Method, ...]) -> Iterator[GenerateRow]:
    """Yield one row for each length and method that fits into memory. ``eager`` comes first, to compare tokens with it."""
    for length in lengths:
        expected: Tensor | None = None
        for method in methods:
            try:
                row, tokens = measure(config, length, method)
            except torch.OutOfMemoryError:
                print(f"{method.name}: {length:,} tokens do not fit into memory", flush=True)
                continue
            if method.name == "eager":
                expected = tokens
            yield row if expected is None else replace(row, equal=float((tokens == expected).float().mean()))


def measure(config: Any, length: int, method: Method) -> tuple[GenerateRow, Tensor]:
    """Generate twice, and return what the second call took, and the tokens that it produced."""
    forget()
    speed = bandwidth()
    model = build(config)
    model.generation_config.eos_token_id = None
    held = weights(model)
    torch.manual_seed(1)
    inputs = {"input_ids": torch.randint(config.vocab_size, (1, length), device=DEVICE)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if method.ours:
        policy = method.policy(config, length) if method.policy is not None else None
        model = sc.compile(model, policy, cache=method.cache)
    began = time.perf_counter()
    _generate(model, inputs, method)
    _wait()
    first_call = time.perf_counter() - began
    reset_peak()
    clock, tokens = _generate(model, inputs, method)
    most, cache = peak(), _cache_bytes(model, length + TOKENS - 1, method)
    first_token, *steps = clock.milliseconds()
    steps = steps[FIRST:]
    quantiles = statistics.quantiles(steps, n=5, method="inclusive")
    report = model.sparse_compile_report if method.ours else None
    sites = report.sites if report is not None else ()
    read = held - model.get_input_embeddings().weight.nbytes + _dense_bytes(config, length)
    row = GenerateRow(
        method=method.name,
        shape="Llama-3-8B" if config.hidden_size == 4096 else "tiny Llama",
        layers=config.num_hidden_layers,
        prompt=length,
        first_call_s=first_call,
        first_token_s=first_token / 1e3,
        p20_ms=quantiles[0],
        p50_ms=statistics.median(steps),
        p80_ms=quantiles[3],
        peak_gib=most / GIB,
        cache_gib=cache / GIB,
        beside_gib=(most - held - cache) / GIB,
        equal=float("nan"),
        share=read / speed * 1e3 / statistics.median(steps) if method.exact else float("nan"),
        kernels="; ".join(dict.fromkeys(f"{site.phase}: {site.model_mask}, {site.kernel}" for site in sites)),
        notes="; ".join(report.notes) if report is not None else "",
        **environment(),
    )
    return row, tokens


def _dense_bytes(config: Any, length: int) -> float:
    """The bytes of all keys and values of a text, in 16 bits."""
    dim = config.hidden_size // config.num_attention_heads
    return 2.0 * int(length * config.num_hidden_layers * config.num_key_value_heads * dim) * (2 if CUDA else 4)


def _cache_bytes(model: Any, length: int, method: Method) -> float:
    """The bytes of the cache that ``generate`` makes for ``length`` tokens."""
    if method.ours:
        return float(model.sparse_cache(max_length=rounded(length), device="meta").nbytes)
    return _dense_bytes(model.config, length)


def _generate(model: Any, inputs: dict[str, Tensor], method: Method) -> tuple[Clock, Tensor]:
    """Generate; returns a clock with marks at the beginning and at each token, and the new tokens."""
    clock = Clock()
    with torch.no_grad():
        clock.mark()
        out = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=TOKENS,
            stopping_criteria=StoppingCriteriaList([clock]),
            **(method.arguments or {}),
        )
    return clock, out[:, inputs["input_ids"].shape[1] :].cpu()


def _wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def write_rows(path: Path, rows: Iterable[GenerateRow]) -> None:
    """Write each row as soon as it is measured, and print its main numbers."""
    written: list[GenerateRow] = []
    for row in rows:
        written.append(row)
        write(written, path)
        print(
            f"{row.method:24} {row.layers} x {row.prompt}: first call {row.first_call_s:.1f} s, first token "
            f"{row.first_token_s:.2f} s, {row.p50_ms:.2f} ms a token, peak {row.peak_gib:.2f} GiB "
            f"({row.beside_gib:.2f} beside), equal {row.equal:.2f}, of bound {row.share:.2f}, {row.kernels} {row.notes}",
            flush=True,
        )
