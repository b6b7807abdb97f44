"""Benchmark decode over a SparseCache: whole models by context, and attention alone, against dense caches and stock."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig

import sparse_compile as sc
from bench.attention.prefill_decode import LAYERS, STOCK
from bench.measure.shapes import DTYPE, LLAMA2, LLAMA3, SMALL, Shape, compiled, operands
from bench.measure.timing import CUDA, DEVICE, Row, Timing, bandwidth, in_graph, measure
from bench.models.filled import (
    DENSE,
    GIB,
    GQA,
    MHA,
    MODE,
    TINY_HALF,
    Case,
    fill,
    fill_static,
    first_call,
    forget,
    graphs,
    randomize,
    row,
    static_cache,
    summary_bytes,
    weights,
)
from bench.models.model import STEPS, build, kernels_of
from sparse_compile.masks import Mask, causal
from sparse_compile.masks.density import largest_density

GQA_BATCH = replace(GQA, contexts=(32768,), dense=32768, stock=(), batch=8)


def run_cache(*, smoke: bool = False) -> list[Row]:
    """Measure a decode step and the bytes of the cache by context, as DuoAttention does.

    One more case decodes eight sequences of 32K.
    """
    bandwidth()  # measured first, while the memory is free
    if smoke:
        return _protocol(TINY_HALF)
    return _protocol(GQA, GQA_BATCH) + _protocol(MHA)


def _protocol(*cases: Case) -> list[Row]:
    """Measure all cases of one model. Stock transformers comes last, because it takes longest to compile."""
    model = build(cases[0].config)
    rows, variants = [], []
    for case in cases:
        sparse = decode_steps(model, case, case.mask, case.contexts)
        dense = decode_steps(model, case, None, tuple(n for n in case.contexts if n <= case.dense))
        variants.append((case, (sparse, dense)))
        for length in case.contexts:
            rows.append(sparse.row(model, length, DENSE, dense.timings.get(length)))
            if length in dense.timings and length not in case.stock:
                rows.append(dense.row(model, length))
    for case, both in variants:
        for length in case.stock:
            slow, note = stock_steps(model, case, length)
            rows += [variant.row(model, length, f"{STOCK}, StaticCache, {MODE}", slow, note) for variant in both]
    return rows


@dataclass(frozen=True)
class Variant:
    """Timings of decode steps of a case under one mask, by context.

    ``beside`` is how many bytes the peak of memory holds besides weights and cache.
    """

    case: Case
    mask: Mask | None
    timings: dict[int, Timing]
    beside: int
    kernel: str
    note: str

    def row(self, model: Any, length: int, baseline: str = "", slow: Timing | None = None, note: str = "") -> Row:
        """Make a row whose bound is the time to read a step's bytes.

        A step reads the weights without the embedding, the visible keys and values, and the page summaries.
        """
        case, timing, mask = self.case, self.timings[length], causal if self.mask is None else self.mask
        cache = case.cache(self.mask, length, "meta")
        density = largest_density(mask, 1, length, length - 1, case.config.num_attention_heads, (1, 64))
        embedding = model.get_input_embeddings().weight.nbytes  # a step reads one row of it
        read = weights(model) - embedding + case.read(cache, density) + summary_bytes(cache)
        sizes = [size / GIB for size in (weights(model), cache.nbytes, self.beside)]
        parts = "{:.2f} weights + {:.2f} KV of this length + {:.2f} beside them".format(*sizes)
        notes = [f"{case.batch * 1e3 / timing.p50:.1f} tokens/s", f"peak {parts}", self.note, note]
        return row(
            replace(timing, peak_gib=sum(sizes)),
            baseline,
            slow,
            bound=read / bandwidth() * 1e3,
            what=f"decode step, {case.what(self.mask)}, batch {case.batch}",
            shape=case.name,
            mask=mask,
            density=density,
            lengths=(1, length),
            kernel=self.kernel,
            kv_gib=sizes[1],
            note="; ".join(filter(None, notes)),
        )


def decode_steps(model: Any, case: Case, mask: Mask | None, contexts: tuple[int, ...]) -> Variant:
    """Time decode steps at all ``contexts``, with one graph and one cache of the longest. Contexts differ in how full it is."""
    forget()
    cache = case.cache(mask, max(contexts))
    randomize(cache)
    backend = sc.Backend(mask)
    fast: Any = torch.compile(model, backend=backend, mode=MODE, dynamic=False)
    ids = torch.randint(model.config.vocab_size, (case.batch, 1), device=DEVICE)

    def steps(length: int) -> None:
        """Run the last steps of a context one after the other, as a generation loop does."""
        fill(cache, length - STEPS)
        run_steps(fast, ids, cache)

    beside, first = first_call(partial(steps, max(contexts)))
    timings = {length: measure(partial(steps, length), repeat=5, warm_up=1).per(STEPS) for length in contexts}
    note = f"one cache for {max(contexts):,} tokens, first call {first:.0f} s, graphs {graphs(backend)}"
    return Variant(case, mask, timings, beside, kernels_of(backend), note)


def stock_steps(model: Any, case: Case, length: int) -> tuple[Timing, str]:
    """Time the same steps with stock transformers and stock compilation, and return a note as well."""
    forget()
    cache = static_cache(model, length)
    stock: Any = torch.compile(model, mode=MODE, dynamic=False)
    ids = torch.randint(model.config.vocab_size, (1, 1), device=DEVICE)

    def steps() -> None:
        fill_static(cache, length - STEPS)
        run_steps(stock, ids, cache)

    beside, first = first_call(steps)
    timing = measure(steps, repeat=3, warm_up=1).per(STEPS)
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    peak = (weights(model) + size + beside) / GIB
    return timing, f"stock: peak {peak:.2f}, {beside / GIB:.2f} of it beside weights and cache; first call {first:.0f} s"


def run_steps(model: Any, ids: Tensor, cache: Any) -> None:
    """Run the next ``STEPS`` steps without waiting between them."""
    for _ in range(STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        with torch.no_grad():
            model(ids, past_key_values=cache)


# -- attention alone ---


def run_cache_attention(*, smoke: bool = False) -> list[Row]:
    """Time the attention of a decode step through the cache, against SDPA over dense keys that are already in memory."""
    if smoke:
        return [_attention(SMALL, 2, 2048)]
    return [_attention(LLAMA3, 2, 1_000_000), _attention(LLAMA2, 4, 200_000)]


def _attention(shape: Shape, every: int, length: int) -> Row:
    case = Case(str(shape), _config(shape, LAYERS), every, (length,), dense=length)
    forget()
    layers = [operands(shape, 1, length) for _ in range(LAYERS)]

    def dense() -> None:
        for q, k, v in layers:
            scaled_dot_product_attention(q, k, v, enable_gqa=shape.heads != shape.kv_heads)

    slow = _per_layer(dense)
    new = [(q, k[:, :, :1].contiguous(), v[:, :, :1].contiguous()) for q, k, v in layers]
    layers.clear()
    forget()
    cache = case.cache(case.mask, length + 1024)  # each call appends a token
    randomize(cache)
    fill(cache, length)
    run, backend = compiled(attend_layers, case.mask)
    timing = _per_layer(lambda: run(new, cache))
    density = case.mask.density(1, length, q_offset=length - 1, heads=shape.heads)
    read = density * 2 * shape.kv_heads * length * shape.head_dim * DTYPE.itemsize
    return row(
        timing,
        "SDPA, no mask",
        slow,
        bound=read / bandwidth() * 1e3,
        what=f"decode attention, {case.what(case.mask)}, per layer",
        shape=str(shape),
        mask=case.mask,
        density=density,
        lengths=(1, length),
        kernel=kernels_of(backend),
        kv_gib=case.cache(case.mask, length, "meta").nbytes / LAYERS / GIB,
        note=f"{LAYERS} layers in a CUDA graph, appending included, graphs {graphs(backend)}",
    )


def last_steps(
    shape: Shape, mask: Mask | None, length: int, *, layers: int, steps: int, room: int, kv: Any = None
) -> tuple[Timing, Any, sc.Backend]:
    """Time the attention alone of the last ``steps`` of a context, appending included.

    Returns the time of one layer in one step, the cache and the backend. The cache is full of random numbers and has room for
    ``room`` more tokens.
    """
    forget()
    new = [operands(shape, 1, 2) for _ in range(layers)]
    new = [(q, k[:, :, :1].contiguous(), v[:, :, :1].contiguous()) for q, k, v in new]
    cache = sc.SparseCache(_config(shape, layers), mask, max_length=length + room, dtype=DTYPE, device=DEVICE, kv=kv)
    randomize(cache)
    run, backend = compiled(attend_layers, mask)

    def attend() -> None:
        fill(cache, length - steps)
        for _ in range(steps):
            run(new, cache)

    with torch.no_grad():
        timing = measure(in_graph(attend, times=1) if CUDA else attend).per(layers * steps)
    return timing, cache, backend


def _config(shape: Shape, layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=shape.heads * shape.head_dim, num_hidden_layers=layers, num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
    )  # fmt: skip


def attend_layers(layers: list[tuple[Tensor, Tensor, Tensor]], cache: Any) -> list[Tensor]:
    """Do what transformers does between the projections of each layer."""
    device = layers[0][0].device
    at = torch.arange(1, device=device) + cache.get_seq_length()
    seen = torch.arange(cache.max_length, device=device) <= at[:, None]
    outs = []
    for number, (q, k, v) in enumerate(layers):
        k, v = cache.update(k, v, number)
        group = q.shape[1] // k.shape[1]
        k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).reshape(x.shape[0], -1, *x.shape[2:]) for x in (k, v))
        outs.append(scaled_dot_product_attention(q, k, v, attn_mask=seen[None, None]))
    return outs


def _per_layer(step: Callable[[], Any]) -> Timing:
    times = 5
    with torch.no_grad():
        return measure(in_graph(step, times=times)).per(LAYERS * times) if CUDA else measure(step).per(LAYERS)
