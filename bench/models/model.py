"""Benchmark prefill and decode of whole transformers models with random weights, against eager and stock compilation."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, StaticCache
from transformers.models.gemma3 import Gemma3TextConfig

import sparse_compile as sc
from bench.attention.prefill_decode import STOCK, relative_error
from bench.measure.shapes import WINDOW
from bench.measure.timing import CUDA, DEVICE, Row, Timing, bandwidth, measure, measured
from sparse_compile.masks import Mask, causal

LLAMA3_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, max_position_embeddings=1 << 18,
)  # fmt: skip
MISTRAL_7B = MistralConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_attention_heads=32, num_key_value_heads=8,
    sliding_window=4096, max_position_embeddings=1 << 16,
)  # fmt: skip
GEMMA3_4B = Gemma3TextConfig(
    hidden_size=2560, intermediate_size=10240, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
    head_dim=256, sliding_window=1024, vocab_size=32768, max_position_embeddings=1 << 16,
)  # fmt: skip
TINY = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=256
)

STEPS = 16  # decode steps of one measurement


def run_model(*, smoke: bool = False) -> list[Row]:
    """Time decode steps and prompts."""
    return run_decode_model(smoke=smoke) + run_prefill_model(smoke=smoke)


def run_decode_model(*, smoke: bool = False) -> list[Row]:
    """Time one decode step of Llama-3-8B's shape over a full static cache, under CUDA graphs."""
    if smoke:
        return _decode(build(TINY), "tiny Llama", 256, 1)
    model = build(LLAMA3_8B)
    rows = _decode(model, "Llama-3-8B", 131072, 1)
    for length, batch in ((8192, 1), (16384, 8)):
        rows += _decode(model, "Llama-3-8B", length, batch, policies=(None,))
    return rows


def run_prefill_model(*, smoke: bool = False) -> list[Row]:
    """Time prompts with all layers of Llama-3-8B's shape.

    Two layers of Mistral's shape and six of Gemma 3's are timed for their own sliding windows.
    """
    if smoke:
        return _prefill(build(TINY), "tiny Llama", 256)
    rows = _prefill(build(LLAMA3_8B), "Llama-3-8B", 32768)
    for name, config in (("Mistral-7B, 2 layers", MISTRAL_7B), ("Gemma-3-4B, 6 layers", GEMMA3_4B)):
        rows += _prefill(build(config), name, 32768, policies=(None,))
    return rows


def build(config: Any) -> Any:
    torch.manual_seed(0)
    saved = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if CUDA else torch.float32)
    try:
        with torch.device(DEVICE):
            factory: Any = AutoModelForCausalLM
            return factory.from_config(config).eval()
    finally:
        torch.set_default_dtype(saved)


def _timed(run: Callable[[], Any], *, share: int = 1, **options: Any) -> tuple[Timing, float]:
    """Return the timing of ``run``, or of one of its ``share`` equal parts, and the seconds of its first call."""
    began = time.perf_counter()
    run()
    if CUDA:
        torch.cuda.synchronize()
    first = time.perf_counter() - began
    return measure(run, warm_up=2, **options).per(share), first


def _prefill(model: Any, name: str, length: int, policies: tuple[Mask | None, ...] = (None, WINDOW)) -> list[Row]:
    ids = torch.randint(model.config.vocab_size, (1, length), device=DEVICE)

    def forward(model: Any) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(ids, use_cache=False, logits_to_keep=16).logits
        return logits

    torch._dynamo.reset()
    eager, _ = _timed(partial(forward, model), repeat=5)
    exact = forward(model)
    torch._dynamo.reset()
    stock: Any = torch.compile(model, dynamic=False)
    slow, first_stock = _timed(partial(forward, stock), repeat=5)
    error = relative_error(forward(stock), exact)
    rows = [_row("prefill, eager", name, causal, 1, length, "SDPA", eager, STOCK, slow, note="")]
    for policy in policies:
        torch._dynamo.reset()
        backend = sc.Backend(policy)
        fast: Any = torch.compile(model, backend=backend, dynamic=False)
        timing, first = _timed(partial(forward, fast), repeat=5)
        note = f"first call {first:.0f} s (stock {first_stock:.0f} s)"
        if CUDA:
            note += f", peak {timing.peak_gib / slow.peak_gib:.2f}x of stock"
        if policy is None:
            note += f", error against eager {relative_error(forward(fast), exact):.1e} (stock {error:.1e})"
        what = "prefill, exact" if policy is None else "prefill, all streaming"
        mask = policy if policy is not None else causal
        kernel = kernels_of(backend)
        rows.append(_row(what, name, mask, 1, length, kernel, timing, STOCK, slow, note=note))
        rows.append(_row(what, name, mask, 1, length, kernel, timing, "eager", eager))
    return rows


def _decode(model: Any, name: str, length: int, batch: int, policies: tuple[Mask | None, ...] = (None, WINDOW)) -> list[Row]:
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache: Any = StaticCache(config=config, max_cache_len=length)
    cache.early_initialization(batch, config.num_key_value_heads, head_dim, model.dtype, DEVICE)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    ids = torch.randint(config.vocab_size, (batch, 1), device=DEVICE)

    def steps(model: Any) -> Tensor:
        """Run the last steps that fit one after the other, as a generation loop does."""
        for layer in cache.layers:
            layer.cumulative_length.fill_(length - STEPS)
        for _ in range(STEPS):
            torch.compiler.cudagraph_mark_step_begin()
            with torch.no_grad():
                logits: Tensor = model(ids, past_key_values=cache).logits
        return logits

    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding = model.get_input_embeddings().weight
    weights -= embedding.numel() * embedding.element_size()  # a step reads one row of it
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    mode = "reduce-overhead" if CUDA else None
    torch._dynamo.reset()
    stock: Any = torch.compile(model, mode=mode, dynamic=False)
    slow, first_stock = _timed(partial(steps, stock), repeat=5, share=STEPS)
    wanted = steps(stock).clone()
    rows = []
    for policy in policies:
        torch._dynamo.reset()
        if CUDA:
            torch.cuda.empty_cache()
        backend = sc.Backend(policy)
        fast: Any = torch.compile(model, backend=backend, mode=mode, dynamic=False)
        timing, first = _timed(partial(steps, fast), repeat=10, share=STEPS)
        note = f"first call {first:.0f} s (stock {first_stock:.0f} s)"
        if policy is None:
            note += f", difference from stock {relative_error(steps(fast), wanted):.1e}"
        mask = policy if policy is not None else causal
        density = mask.density(1, length, q_offset=length - 1)
        bound = (weights + density * size) / bandwidth() * 1e3
        what = f"decode step, {'exact' if policy is None else 'all streaming'}, batch {batch}"
        rows.append(_row(what, name, mask, density, length, kernels_of(backend), timing, f"{STOCK}, {mode}", slow, bound, note))
    return rows


def kernels_of(backend: sc.Backend) -> str:
    return " + ".join(dict.fromkeys(site.kernel for site in backend.report.sites))


def _row(
    what: str, name: str, mask: Mask, density: float, length: int, kernel: str,
    timing: Timing, baseline: str, slow: Timing, bound: float = float("nan"), note: str = "",
) -> Row:  # fmt: skip
    return measured(
        timing,
        baseline=baseline,
        slow=slow,
        bound=bound,
        bench="model",
        what=what,
        shape=name,
        mask=str(mask),
        density=density,
        q_len=1 if what.startswith("decode") else length,
        kv_len=length,
        dtype="bfloat16" if CUDA else "float32",
        kernel=kernel,
        note=note,
    )
