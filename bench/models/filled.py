"""Cases for decoding over full caches: models, caches that pretend to hold a text, memory, and rows of results."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, StaticCache

import sparse_compile as sc
from bench.measure.shapes import DTYPE
from bench.measure.timing import CUDA, DEVICE, Row, Timing, measured
from bench.models.model import LLAMA3_8B, TINY
from sparse_compile.masks import Mask, causal, per_head, sink, sliding_window
from sparse_compile.masks.patterns.per_head import PerHead
from sparse_compile.masks.selection.page_scoring import summarize
from sparse_compile.passes.storage.codec import QuantizedTensor, dequantize
from sparse_compile.passes.storage.layer_plan import quantized_of

LLAMA2_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
    vocab_size=32000, max_position_embeddings=1 << 18,
)  # fmt: skip
NARROW = causal & (sink(128) | sliding_window(256))  # DuoAttention's protocol
DENSE = "SparseCache, dense"
MODE = "reduce-overhead" if CUDA else None
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A model, the masks of its KV heads, and the contexts at which it decodes.

    Every ``every``-th KV head sees ``seeing``; the others see ``NARROW``. ``dense`` is the longest context whose dense cache
    fits into memory. ``stock`` are the contexts at which stock transformers is measured.
    """

    name: str
    config: Any
    every: int
    contexts: tuple[int, ...]
    dense: int
    stock: tuple[int, ...] = ()
    batch: int = 1
    seeing: Mask = causal

    @property
    def mask(self) -> Mask:
        """The mask, with one part for each KV head."""
        return per_head([NARROW if head % self.every else self.seeing for head in range(self.config.num_key_value_heads)])

    def cache(self, mask: Mask | None, length: int, device: torch.device | str = DEVICE) -> Any:
        """Make a SparseCache. On device ``meta`` it has sizes but no memory."""
        return sc.SparseCache(self.config, mask, max_length=length, max_batch=self.batch, dtype=DTYPE, device=device)

    def read(self, cache: Any, density: float) -> float:
        """Return the bytes of keys and values that a step reads."""
        return float(density * cache.dense_nbytes)

    def what(self, mask: Mask | None) -> str:
        """Describe the mask for the ``what`` column of a row."""
        if mask is None:
            return "dense"
        seen = "full heads" if self.seeing == causal else f"heads under {self.seeing}, the others streaming"
        return f"{100 // self.every} % {seen}"


def contexts(step: int) -> tuple[int, ...]:
    return tuple(range(step, 10 * step + 1, step))


TINY_HALF = Case("tiny Llama", TINY, 2, (1024,), dense=1024, stock=(1024,))
GQA = Case("Llama-3-8B", LLAMA3_8B, 2, contexts(100_000), dense=900_000, stock=(100_000, 300_000))
MHA = Case("Llama-2-7B", LLAMA2_7B, 4, contexts(20_000), dense=200_000, stock=(20_000, 100_000))


def fill(cache: Any, tokens: int) -> None:
    """Pretend that every row of ``cache`` holds ``tokens`` tokens. Their content is whatever the buffers hold."""
    at, column = cache.positions, torch.arange(cache.cached_layers[0].plan.columns, device=DEVICE)
    cache.host_state.columns, cache.host_state.batch = tokens, cache.max_batch
    at.columns.fill_(tokens)
    at.texts.fill_(tokens)
    at.choose_anew()
    if at.page_texts is not None:
        at.page_texts.copy_(torch.where(column < tokens, column, -1))
    for number, (sunk, slots) in enumerate(cache.layers[0].plan.rings):
        assert tokens >= slots
        slot = torch.arange(slots, device=DEVICE)
        latest = tokens - 1 - (tokens - 1 - slot) % (slots - sunk)
        for table in at.rings[2 * number : 2 * number + 2]:
            table.copy_(torch.where(slot < sunk, slot, latest))


def randomize(cache: Any) -> None:
    """Fill a cache with random keys and values, quantized if the cache is, and with the page summaries of these keys."""
    for layer in cache.layers:
        for buffer in layer.buffers:
            buffer.normal_()
        for part in layer.quantized:
            _draw_codes(part)
        leading = [at for at, storage in enumerate(layer.plan.storages) if storage.selection is not None]
        for at, (summary, page) in zip(leading, layer.summaries(), strict=True):
            for head in range(summary.shape[1]):
                score = layer.plan.storages[at].selection.selector.score
                summary[:, head : head + 1] = summarize(_keys_of(layer, at, head), None, page, score)


def _draw_codes(part: Any) -> None:
    """Fill quantized data, scales or offsets so that dequantized numbers are about as large as normal numbers."""
    if part.dtype == torch.uint8:
        part.random_(0, 64)  # 0 to 1.9 if read as fp8
    else:
        part.uniform_(0.01, 0.02)


def _keys_of(layer: Any, at: int, head: int) -> Any:
    """Return the keys ``[B, 1, N, D]`` of one head of storage group ``at``."""
    forms = layer.plan.storages[at].forms
    if forms is None:
        return layer.buffers[2 * at][:, head : head + 1]
    quantized = quantized_of(layer.plan, layer.quantized, at)[0]
    return dequantize(QuantizedTensor(*(part[:, head : head + 1] for part in quantized.used())), forms[0], layer.dtype)


def summary_bytes(cache: Any) -> int:
    """Return the bytes of page summaries that a decode step reads to select pages, as a mean over steps.

    A step that reuses earlier scores (``every`` > 1) reads none.
    """
    total = 0.0
    for layer in cache.layers:
        chosen = [s.selection.selector.every for s in layer.plan.storages if s.selection is not None]
        total += sum(summary.nbytes / every for (summary, _), every in zip(layer.summaries(), chosen, strict=True))
    return int(total)


def static_cache(model: Any, length: int) -> Any:
    config = model.config
    cache: Any = StaticCache(config=config, max_cache_len=length)
    cache.early_initialization(1, config.num_key_value_heads, config.hidden_size // config.num_attention_heads, DTYPE, DEVICE)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    return cache


def fill_static(cache: Any, tokens: int) -> None:
    for layer in cache.layers:
        layer.cumulative_length.fill_(tokens)


def weights(model: Any) -> int:
    """Return the bytes of the parameters. A tensor that torchao quantized counts as the tensors that it consists of."""
    return sum(_bytes(parameter.data) for parameter in model.parameters())


def _bytes(tensor: Any) -> int:
    if not hasattr(tensor, "__tensor_flatten__"):
        return int(tensor.nbytes)
    return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


def forget() -> None:
    """Free what was compiled and recorded for the previous variant."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def first_call(run: Callable[[], Any]) -> tuple[int, float]:
    """Return how many bytes the first call of ``run`` added at its peak, warm-up and recording included, and its seconds."""
    held = reset_peak()
    seconds = seconds_of(run)
    return peak() - held, seconds


def seconds_of(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def reset_peak() -> int:
    if not CUDA:
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def peak() -> int:
    return torch.cuda.max_memory_allocated() if CUDA else 0


def graphs(backend: sc.Backend) -> str:
    """Say how many graphs were compiled, with recompiles, graph breaks and calls without a CUDA graph."""
    counters = torch._dynamo.utils.counters
    breaks, skips = sum(counters["graph_break"].values()), counters["inductor"]["cudagraph_skips"]
    return f"{backend.report.compiles} (recompiles {backend.report.recompiles}, breaks {breaks}, without CUDA graph {skips})"


def row(
    timing: Timing, baseline: str, slow: Timing | None, *, mask: Mask, lengths: tuple[int, int], what: str, **rest: Any
) -> Row:
    return measured(
        timing,
        baseline=baseline,
        slow=slow,
        bench="cache",
        what=what,
        mask=_written(mask),
        q_len=lengths[0],
        kv_len=lengths[1],
        dtype=str(DTYPE).removeprefix("torch."),
        **rest,
    )


def _written(mask: Mask) -> str:
    """Write a mask as a table cell. A long per-head mask is written as its distinct masks."""
    text = str(mask)
    if len(text) < 60 or not isinstance(mask, PerHead):
        return text
    return "per_head: " + ", ".join(map(str, dict.fromkeys(mask.masks)))
