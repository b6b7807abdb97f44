"""Benchmark page selection: attention of a decode step, steps of a whole model by context, and prompts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch.nn.functional import scaled_dot_product_attention

from bench.attention.prefill_decode import SDPA, STOCK, relative_error
from bench.measure.shapes import DTYPE, LLAMA2, LLAMA3, SMALL, Shape, compiled, operands, prefill
from bench.measure.timing import CUDA, Row, bandwidth, in_graph, matmul_rate, measure, measured
from bench.models.cache import decode_steps, last_steps, stock_steps
from bench.models.filled import DENSE, GIB, GQA, MODE, TINY_HALF, forget, graphs, row, summary_bytes
from bench.models.model import build, kernels_of
from sparse_compile.masks import causal, page_topk
from sparse_compile.masks.selection.page_topk import PageTopK

LAYERS = 32  # layers of a decode step, as in a model, which computes positions and page classes once for all of them
STEPS = 8  # steps in a CUDA graph, a multiple of every=4


def run_select_attention(*, smoke: bool = False) -> list[Row]:
    """Time page selection and attention of a decode step, appending included, against SDPA over all keys."""
    if smoke:
        return [_attention(SMALL, 2048, page_topk(256), layers=2)]
    return [
        _attention(LLAMA3, 131072, page_topk(4096)),
        _attention(LLAMA3, 131072, page_topk(4096, every=4)),
        _attention(LLAMA2, 32768, page_topk(2048)),
        _attention(LLAMA3, 524288, page_topk(4096)),
    ]


def _attention(shape: Shape, length: int, selector: PageTopK, *, layers: int = LAYERS) -> Row:
    mask = causal & selector
    forget()
    dense = [operands(shape, 1, length) for _ in range(min(layers, 8))]
    grouped = shape.heads != shape.kv_heads

    def all_keys() -> None:
        for q, k, v in dense:
            scaled_dot_product_attention(q, k, v, enable_gqa=grouped)

    slow = measure(in_graph(all_keys, times=STEPS) if CUDA else all_keys).per(len(dense) * (STEPS if CUDA else 1))
    dense.clear()
    timing, cache, backend = last_steps(shape, mask, length, layers=layers, steps=STEPS, room=4096)
    described = summary_bytes(cache) / layers * length / cache.max_length
    read = 2 * shape.kv_heads * selector.tokens * shape.head_dim * DTYPE.itemsize + described
    return row(
        timing,
        "SDPA, no mask",
        slow,
        bound=read / bandwidth() * 1e3,
        what=f"decode attention, {selector}, per layer",
        shape=str(shape),
        mask=mask,
        density=selector.tokens / length,
        lengths=(1, length),
        kernel=kernels_of(backend),
        kv_gib=cache.nbytes / layers / GIB,
        note=f"{layers} layers and {STEPS} steps in a CUDA graph, appending included, graphs {graphs(backend)}",
    )


# -- whole models ---

CONTEXTS = (65536, 262144, 1048576)
LSERVE = replace(GQA, contexts=CONTEXTS, dense=131072, stock=(), seeing=causal & page_topk(4096, every=4))


def run_select_model(*, smoke: bool = False) -> list[Row]:
    """Time LServe's setting: half of the KV heads stream, and the others select 4096 keys every four steps.

    Rows at one context compare with a dense cache and with stock transformers. Further rows show the growth with the context.
    """
    case = replace(TINY_HALF, seeing=causal & page_topk(256, every=4)) if smoke else LSERVE
    bandwidth()  # measured first, while the memory is free
    model = build(case.config)
    sparse = decode_steps(model, case, case.mask, (case.dense,))
    dense = decode_steps(model, case, None, (case.dense,))
    rows = [sparse.row(model, case.dense, DENSE, dense.timings[case.dense])]
    grown = decode_steps(model, case, case.mask, case.contexts)
    for length in case.contexts:
        growth = f"{grown.timings[length].p50 / grown.timings[case.contexts[0]].p50:.2f}x of the shortest context"
        rows.append(grown.row(model, length, note=growth))
    slow, note = stock_steps(model, case, case.dense)
    return [*rows, *(x.row(model, case.dense, f"{STOCK}, StaticCache, {MODE}", slow, note) for x in (sparse, dense))]


# -- prompts ---


def run_select_prefill(*, smoke: bool = False) -> list[Row]:
    """Time prompts in which blocks of queries select blocks of keys, selection included, against SDPA over all keys."""
    if smoke:
        return list(_prompt(SMALL, 1024, (256,)))
    return list(_prompt(LLAMA3, 131072, (8192, 16384, 24576)))


def _prompt(shape: Shape, length: int, budgets: tuple[int, ...]) -> Iterator[Row]:
    q, k, v = operands(shape, length, length)
    dense = measure(partial(prefill, q, k, v))
    wanted = prefill(q, k, v)
    for budget in budgets:
        mask = causal & page_topk(budget)
        run, backend = compiled(prefill, mask)
        error = relative_error(run(q, k, v), wanted)
        density = backend.report.sites[0].density
        assert density is not None
        yield measured(
            measure(partial(run, q, k, v)),
            baseline=SDPA,
            slow=dense,
            bound=4 * shape.head_dim * shape.heads * density * length**2 / matmul_rate() * 1e3,
            bench="select-prefill",
            what=f"prefill attention, {budget} keys for each query",
            shape=str(shape),
            mask=str(mask),
            density=density,
            q_len=length,
            kv_len=length,
            dtype=str(DTYPE).removeprefix("torch."),
            kernel=kernels_of(backend),
            note=f"the choice included; lossy: relative error {error:.2f} on random numbers",
        )
