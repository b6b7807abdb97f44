"""Benchmark a quantized cache: attention alone, a step against transformers' QuantizedCache, and millions of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from transformers import QuantizedCache

import sparse_compile as sc
from bench.measure.shapes import DTYPE, LLAMA3, SMALL, Shape
from bench.measure.timing import DEVICE, Row, Timing, bandwidth, measure
from bench.models.cache import decode_steps, last_steps, run_steps
from bench.models.filled import GIB, GQA, TINY_HALF, Case, forget, graphs, row, summary_bytes, weights
from bench.models.model import LLAMA3_8B, STEPS, TINY, build, kernels_of
from sparse_compile.masks import Mask, causal, page_topk

LAYERS = 8  # layers of attention alone, so many that their data do not fit into the GPU's caches
COMPACT = sc.KVFormat("int4", "int4", key_group=64, value_group=64)


def run_quantized_attention(*, smoke: bool = False) -> list[Row]:
    """Time attention of a decode step over quantized pages, appending included, against the same in bfloat16."""
    cases: list[tuple[Mask | None, tuple[Any, ...]]] = [
        (None, ("int8", "fp8", sc.KVFormat("int8", "int4"), "int4", COMPACT)),
        (causal & page_topk(256 if smoke else 4096), ("int8", "int4", COMPACT)),
    ]
    rows: list[Row] = []
    for mask, formats in cases:
        shape, length = (SMALL, 2048) if smoke else (LLAMA3, 131072)
        for kv in formats:
            # bfloat16 is timed again beside each format, because the first page selection of a process was 2 % faster than all
            # later ones.
            plain, first = _attention(shape, length, mask, None)
            _, made = _attention(shape, length, mask, kv)
            rows += [first(), made(plain)]
    return rows


def _attention(shape: Shape, length: int, mask: Mask | None, kv: Any) -> tuple[Timing, Any]:
    """Return the time of one layer, and a function that makes a row of it."""
    timing, cache, backend = last_steps(shape, mask, length, layers=LAYERS, steps=STEPS, room=64, kv=kv)
    density = 1.0 if mask is None else 4096 / length
    kept, share = cache.nbytes - summary_bytes(cache), cache.nbytes / cache.dense_nbytes
    read = (density * kept + summary_bytes(cache)) / LAYERS * length / cache.max_length

    def made(plain: Timing | None = None) -> Row:
        return row(
            timing,
            "" if plain is None else "bfloat16",
            plain,
            bound=read / bandwidth() * 1e3,
            what=f"decode attention, {_name(kv)}, {'all keys' if mask is None else mask}, per layer",
            shape=str(shape),
            mask=causal if mask is None else mask,
            density=density,
            lengths=(1, length),
            kernel=kernels_of(backend),
            kv_gib=cache.nbytes / LAYERS / GIB,
            note=f"{LAYERS} layers and {STEPS} steps in a CUDA graph, appending included; {share:.3f} of the bytes of a dense "
            f"cache, graphs {graphs(backend)}",
        )

    return timing, made


def _name(kv: Any) -> str:
    if not isinstance(kv, sc.KVFormat):
        return kv or str(DTYPE).removeprefix("torch.")
    groups = f" ({kv.key_group} tokens, {kv.value_group} channels)" if kv.key_group else ""
    return f"{kv.key} keys, {kv.value} values{groups}"


# -- whole models ---


@dataclass(frozen=True)
class Encoded(Case):
    """A case whose cache is quantized to the format ``kv``."""

    kv: Any = None

    def cache(self, mask: Mask | None, length: int, device: torch.device | str = DEVICE) -> Any:
        """Make a quantized SparseCache."""
        sizes: dict[str, Any] = {"max_length": length, "max_batch": self.batch, "dtype": DTYPE, "device": device}
        return sc.SparseCache(self.config, mask, **sizes, kv=self.kv)

    def read(self, cache: Any, density: float) -> float:
        """Return the bytes of the whole cache without page summaries: a step without page selection reads all of it."""
        return float(cache.nbytes - summary_bytes(cache))

    def what(self, mask: Mask | None) -> str:
        """Describe the mask and the format for the ``what`` column of a row."""
        return f"{super().what(mask)}, {_name(self.kv)}"


def _encoded(case: Case, kv: Any, contexts: tuple[int, ...]) -> Encoded:
    fields = {name: getattr(case, name) for name in ("name", "config", "every", "batch", "seeing")}
    return Encoded(**fields, contexts=contexts, dense=contexts[0], kv=kv)


def run_quantized_model(*, smoke: bool = False) -> list[Row]:
    """Time a decode step at one and at six million tokens.

    Half of the KV heads stream, the others are cached in int4, and the weights are int8.
    """
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    case = _encoded(TINY_HALF, "int4", (1024,)) if smoke else _encoded(GQA, COMPACT, (1_000_000, 6_000_000))
    case = replace(case, name=f"{case.name}, weights in int8")
    bandwidth()  # measured first, while the memory is free
    model = build(case.config)
    quantize_(model, Int8WeightOnlyConfig())
    sparse = decode_steps(model, case, case.mask, case.contexts)
    rows = []
    for length in case.contexts:
        size = case.cache(case.mask, length, "meta").nbytes / length
        rows.append(sparse.row(model, length, note=f"{size:,.0f} bytes a token, all included"))
    return rows


def run_quantized_cache(*, smoke: bool = False) -> list[Row]:
    """Time a decode step over an int8 cache, against transformers' QuantizedCache, which runs without compilation."""
    case, length = (_encoded(TINY_HALF, "int8", (512,)), 512) if smoke else (_encoded(GQA, "int8", (32768,)), 32768)
    case = replace(case, config=TINY if smoke else LLAMA3_8B)
    model = build(case.config)
    ours = decode_steps(model, case, None, (length,))
    forget()
    torch.manual_seed(0)
    ids = torch.randint(case.config.vocab_size, (1, length), device=DEVICE)
    name, options = ("hqq", {"nbits": 8, "axis_key": 1, "axis_value": 1}) if find_spec("hqq") else ("fp8", {})
    theirs = QuantizedCache(name, case.config, **options)
    with torch.no_grad():
        model(ids, past_key_values=theirs, logits_to_keep=1)
    slow = measure(partial(run_steps, model, ids[:, :1], theirs), repeat=3, warm_up=1).per(STEPS)
    size = f"weights {weights(model) / GIB:.1f} GiB"
    return [ours.row(model, length, f"QuantizedCache, {name} {options}, eager", slow, size)]
