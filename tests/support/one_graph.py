"""Assert that decode steps over a ``SparseCache`` on CUDA are one graph without synchronization or changed addresses."""

from __future__ import annotations

from typing import Any

import torch

import sparse_compile as sc
from support.models import tokens


def assert_steps_are_one_graph(model: Any, policy: Any, *, prompt: int, steps: int, page_size: int, kv: Any = None) -> None:
    """Run ``steps`` after a prompt under sync debug mode "error"."""
    sizes: dict[str, Any] = {"max_length": 2048, "page_size": page_size, "dtype": torch.bfloat16, "device": "cuda"}
    cache = sc.SparseCache(model.config, policy, **sizes, kv=kv)
    addresses = [tensor.data_ptr() for layer in cache.cached_layers for tensor in layer.tensors()]
    model = sc.compile(model, policy, mode="reduce-overhead", dynamic=False)
    ids = tokens(batch=1, length=1).cuda()
    with torch.no_grad():
        model(tokens(batch=1, length=prompt).cuda(), past_key_values=cache)
        compiles = model.sparse_compile_report.compiles
        for step in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            torch.cuda.set_sync_debug_mode("error" if step > 4 else "default")
            try:
                model(ids, past_key_values=cache)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert model.sparse_compile_report.compiles == compiles + 1
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    assert [tensor.data_ptr() for layer in cache.cached_layers for tensor in layer.tensors()] == addresses
    assert cache.get_seq_length() == prompt + steps
