"""Benchmark one layer's attention in prefill and decode, against the fastest dense kernel, stock compilation and the bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.measure.shapes import (
    DTYPE,
    GEMMA3,
    LLAMA2,
    LLAMA3,
    MISTRAL,
    SMALL,
    WINDOW,
    Shape,
    compiled,
    decode,
    operands,
    prefill,
)
from bench.measure.timing import CUDA, DEVICE, Row, Timing, bandwidth, in_graph, matmul_rate, measure, measured
from sparse_compile.masks import Mask, causal, per_head, sink, sliding_window
from sparse_compile.passes.choose import kernel_choice

NARROW = causal & (sink(64) | sliding_window(256))
LAYERS = 8  # layers of a timed decode step, because a model builds its tables once for all layers
SDPA = "SDPA, dense causal"
STOCK = "stock torch.compile"


def half_streaming(shape: Shape) -> Mask:
    """Return a mask under which every other KV head sees only a sink of 64 and a window of 256."""
    return per_head([causal if head % 2 else NARROW for head in range(shape.kv_heads)])


def run_prefill(*, smoke: bool = False) -> list[Row]:
    """Time causal prefill attention: exact, with half of the heads streaming, and with all heads streaming.

    Further rows time the sliding windows of Mistral and Gemma 3.
    """
    rows: list[Row] = []
    shape = SMALL if smoke else LLAMA3
    for length in (512,) if smoke else (131072, 32768, 8192):
        rows += _prefill_rows(shape, length)
    windows = [(SMALL, 256, 2048)] if smoke else [(MISTRAL, 4096, 32768), (GEMMA3, 1024, 32768)]
    return rows + [row for case in windows for row in _window_rows(*case)]


def _prefill_rows(shape: Shape, length: int) -> Iterator[Row]:
    q, k, v = operands(shape, length, length)
    dense = _back_to_back(partial(prefill, q, k, v), length)
    for what, policy in (("exact", None), ("half streaming", half_streaming(shape)), ("all streaming", WINDOW)):
        mask = causal if policy is None else policy
        density = mask.density(length, length, heads=shape.heads)
        bound = 4 * shape.head_dim * shape.heads * density * length**2 / matmul_rate() * 1e3
        for flash in (True, False) if CUDA and kernel_choice.flash_installed() else (False,):
            with _flash(flash):
                run, backend = compiled(prefill, policy)
                run(q, k, v)
            yield _row(
                "prefill", f"{what}, {'with' if flash else 'without'} FLASH", shape, mask, density, (length, length), backend,
                _back_to_back(partial(run, q, k, v), length), SDPA, dense, bound,
            )  # fmt: skip


def _window_rows(shape: Shape, window: int, length: int) -> Iterator[Row]:
    """Time a model's own sliding window, which is exact and needs no policy."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(length, device=q.device)
        seen = (at[None] <= at[:, None]) & (at[None] > at[:, None] - window)
        group = q.shape[1] // k.shape[1]
        k, v = (x[:, :, None].expand(-1, -1, group, -1, -1).reshape(q.shape) for x in (k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=seen[None, None])

    q, k, v = operands(shape, length, length)
    mask = causal & sliding_window(window)
    density = mask.density(length, length)
    bound = 4 * shape.head_dim * shape.heads * density * length**2 / matmul_rate() * 1e3
    torch._dynamo.reset()
    stock: Any = torch.compile(attend, dynamic=False)
    wanted = stock(q, k, v)
    slow = measure(lambda: stock(q, k, v))
    run, backend = compiled(attend, None)
    error = relative_error(run(q, k, v), wanted)
    timing = measure(lambda: run(q, k, v))
    note = f"difference from stock {error:.1e}"
    case = ("prefill", "own window, exact", shape, mask, density, (length, length), backend, timing)
    yield _row(*case, STOCK, slow, bound, note)
    if not CUDA:  # on CPU, the speedup is promised over SDPA with the same dense mask
        seen = mask.dense(length, length)
        dense = measure(lambda: scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True))
        yield _row(*case, "SDPA, dense mask", dense)


def run_decode(*, smoke: bool = False) -> list[Row]:
    """Time one query token over a full static cache: exact, with half of the KV heads streaming, and with all streaming."""
    rows: list[Row] = []
    if smoke:
        return list(_decode_rows(SMALL, 32768, 1))
    for shape, length, batch in (
        *((LLAMA3, length, 1) for length in (131072, 32768, 8192)),
        (LLAMA3, 16384, 8),
        (LLAMA2, 32768, 1),
    ):
        rows += _decode_rows(shape, length, batch)
    return rows


def _decode_rows(shape: Shape, length: int, batch: int) -> Iterator[Row]:
    layers = [operands(shape, 1, length, batch=batch) for _ in range(LAYERS)]
    position = torch.tensor(length - 1, device=DEVICE)
    seen = torch.ones(1, 1, 1, length, dtype=torch.bool, device=DEVICE)
    grouped = shape.heads != shape.kv_heads

    def step(position: Tensor) -> list[Tensor]:
        return [decode(q, k, v, position) for q, k, v in layers]

    def dense() -> None:
        for q, k, v in layers:
            mask = None if CUDA else seen  # on CPU the comparison is with the same dense mask
            scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)

    baseline = _per_layer(dense)
    for what, policy in (("exact", None), ("half streaming", half_streaming(shape)), ("all streaming", WINDOW)):
        mask = causal if policy is None else policy
        density = mask.density(1, length, q_offset=length - 1, heads=shape.heads)
        bytes_read = 2 * density * batch * shape.kv_heads * length * shape.head_dim * DTYPE.itemsize
        run, backend = compiled(step, policy)
        run(position)
        timing = _per_layer(partial(run, position))
        bound = bytes_read / bandwidth() * 1e3
        name = "SDPA, no mask" if CUDA else "SDPA, dense mask"
        where = ("decode", f"{what}, batch {batch}", shape, mask, density, (1, length))
        yield _row(*where, backend, timing, name, baseline, bound)


def _back_to_back(run: Callable[[], Any], length: int) -> Timing:
    """Time one of several calls in a row: in a model, the launch of a kernel hides behind the kernel before it."""
    times = max(1, 65536 // length) if CUDA else 1

    def several() -> None:
        for _ in range(times):
            run()

    return measure(several).per(times)


def _per_layer(step: Callable[[], Any]) -> Timing:
    times = 5
    return measure(in_graph(step, times=times)).per(LAYERS * times) if CUDA else measure(step).per(LAYERS)


@contextmanager
def _flash(wanted: bool) -> Iterator[None]:
    """Leave FLASH as it is if ``wanted``, and otherwise hide it as if it were not installed."""
    if wanted:
        yield
        return
    with mock.patch.object(kernel_choice, "flash_installed", return_value=False):
        yield


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference divided by the norm of ``wanted``."""
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


def _row(
    bench: str, what: str, shape: Shape, mask: Mask, density: float, lengths: tuple[int, int], backend: Any,
    timing: Timing, baseline: str, dense: Timing, bound: float = float("nan"), note: str = "",
) -> Row:  # fmt: skip
    return measured(
        timing,
        baseline=baseline,
        slow=dense,
        bound=bound,
        bench=bench,
        what=what,
        shape=str(shape),
        mask=str(mask) if len(str(mask)) < 60 else "per_head: " + what.split(",")[0],
        density=density,
        q_len=lengths[0],
        kv_len=lengths[1],
        dtype=str(DTYPE).removeprefix("torch."),
        kernel=backend.report.sites[0].kernel,
        note=note,
    )
