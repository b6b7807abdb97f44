"""Measure the cost of compiling: the first call of a 32-layer model in a new process, with empty and with warm caches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench.measure.stopping import end_with
from bench.measure.timing import CUDA, DEVICE, Row, Timing, measured

LAYERS = 32


def run_compile(*, smoke: bool = False) -> list[Row]:
    """Time stock Inductor and this library, each with empty caches and again in a second process with warm caches."""
    layers, length = (2, 128) if smoke else (LAYERS, 4096 if CUDA else 512)
    results: dict[str, dict[str, Any]] = {}
    for name in ("stock", "ours"):
        with tempfile.TemporaryDirectory() as caches:
            for run in ("cold", "warm"):
                results[f"{name} {run}"] = _in_a_process(name, layers, length, caches)
    rows = []
    for run in ("cold", "warm"):
        ours, stock = results[f"ours {run}"], results[f"stock {run}"]
        rows.append(
            measured(
                _once(ours),
                baseline="stock torch.compile",
                slow=_once(stock),
                bench="compile",
                what=f"first call, {run} caches",
                shape=f"Llama, {layers} layers",
                mask="causal",
                density=float("nan"),
                q_len=length,
                kv_len=length,
                dtype="bfloat16" if CUDA else "float32",
                kernel=ours["kernel"],
                note=f"Inductor cache hits: {ours['hits']} (stock {stock['hits']})",
            )
        )
    return rows


def _once(result: dict[str, Any]) -> Timing:
    """Return the timing of a first call, which has no spread because it happens once per process."""
    ms = result["seconds"] * 1e3
    return Timing(ms, ms, ms, 0.0)


def _in_a_process(name: str, layers: int, length: int, caches: str) -> dict[str, Any]:
    """Time the first call of a model in its own process."""
    settings = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": caches, "TRITON_CACHE_DIR": f"{caches}/triton"}
    command = [sys.executable, "-m", "bench.models.compiling", name, str(layers), str(length), str(os.getpid())]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=settings, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"compiling {name} failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _first_call(name: str, layers: int, length: int) -> dict[str, Any]:
    from torch._dynamo.utils import counters
    from transformers import LlamaConfig, LlamaForCausalLM

    import sparse_compile as sc

    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=layers, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=8192,
    )  # fmt: skip
    model = LlamaForCausalLM(config).train(False).to(DEVICE, torch.bfloat16 if CUDA else torch.float32)
    backend = sc.Backend()
    run: Any = torch.compile(model, dynamic=False) if name == "stock" else torch.compile(model, backend=backend, dynamic=False)
    ids = torch.zeros(1, length, dtype=torch.int64, device=DEVICE)
    began = time.perf_counter()
    with torch.no_grad():
        run(ids, use_cache=False)
    if CUDA:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    kernel = backend.report.sites[0].kernel if backend.report.sites else "SDPA"
    hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
    return {"seconds": seconds, "kernel": kernel, "hits": hits}


if __name__ == "__main__":
    end_with(int(sys.argv[4]))
    print(json.dumps(_first_call(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
