"""Check ``inner="tensorrt"`` on CUDA with real engines. These tests run where torch-tensorrt can be imported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, sink, sliding_window
from support.on_gpu import ON_GPU
from support.oracles.cache import error, llama, random_tokens
from support.tensorrt import real

STREAMING = causal & (sink(4) | sliding_window(64))
LENGTH, STEPS = 300, 3

# torch-tensorrt and its engines warn.
pytestmark = [*ON_GPU, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("cache", ["no cache", "static", "sparse"])
@pytest.mark.parametrize("policy", [None, STREAMING], ids=["exact", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_engines_are_as_close_as_the_dense_reference(
    dtype: torch.dtype, policy: Mask | None, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision, a policy was silently wrong: engines lost inputs that are not contiguous."""
    real(monkeypatch)
    ids = random_tokens(LENGTH + STEPS).cuda()
    logits: dict[str, Any] = {}
    for inner, precision in (("tensorrt", dtype), ("eager", dtype), ("eager", torch.float32)):
        torch._dynamo.reset()
        model = llama(hidden_size=256, max_position_embeddings=1024).requires_grad_(False).to(dtype).to(precision).cuda()
        backend = sc.Backend(policy, inner=inner)
        run: Any = torch.compile(model, backend=backend)
        past: Any = StaticCache(model.config, 512) if cache == "static" else None
        past = sc.SparseCache(model.config, policy, max_length=512) if cache == "sparse" else past
        with torch.no_grad():
            outputs = [run(ids[:, :LENGTH], past_key_values=past, use_cache=past is not None).logits]
            if past is not None:
                outputs += [run(ids[:, at : at + 1], past_key_values=past).logits for at in range(LENGTH, LENGTH + STEPS)]
        logits[f"{inner} {precision}"] = torch.cat(outputs, dim=1).float()
        if inner == "tensorrt":
            assert all(row.count for row in backend.report.engines)
    exact = logits["eager torch.float32"]
    noise = error(logits[f"eager {dtype}"], exact)
    assert error(logits[f"tensorrt {dtype}"], exact) < 3 * noise + 1e-2
