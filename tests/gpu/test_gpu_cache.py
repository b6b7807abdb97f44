"""Check ``SparseCache`` on CUDA: Triton kernels against the dense reference, and one CUDA graph for all steps without syncs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, per_head, sink, sliding_window
from support.models import DECODERS, tokens
from support.on_gpu import ON_GPU, logits_of_chunks, logits_of_padded
from support.one_graph import assert_steps_are_one_graph

pytestmark = ON_GPU
STREAMING = causal & (sink(4) | sliding_window(20))
POLICIES: dict[str, sc.Policy | Mask | None] = {
    "dense": None,
    "streaming": STREAMING,
    "by KV head": sc.Policy(STREAMING, layers={0: per_head([causal, STREAMING])}),
    "two rings": per_head([STREAMING, causal & sliding_window(30)]),
}


def decoder(name: str) -> Any:
    return next(d for d in DECODERS if d.name == name).build().cuda()


def run(name: str, policy: sc.Policy | Mask | None, chunks: list[int], ids: Tensor, inner: str, **options: Any) -> Tensor:
    """Return the logits of a text in chunks, with a cache that has more rows than are used."""
    torch._dynamo.reset()
    model = decoder(name)
    sizes = {"max_length": 256, "max_batch": 3, "page_size": 8, "dtype": torch.float32, "device": "cuda"}
    cache = sc.SparseCache(model.config, policy, **{**sizes, **options})
    mode = "reduce-overhead" if inner == "inductor" else None
    model = sc.compile(model, policy, inner=inner, mode=mode)
    return logits_of_chunks(model, cache, ids, chunks)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_kernels_equal_the_reference(name: str, policy: sc.Policy | Mask | None) -> None:
    ids, chunks = tokens(length=150).cuda(), [100, 40, *[1] * 10]
    got, wanted = (run(name, policy, chunks, ids, inner) for inner in ("inductor", "eager"))
    assert (got - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("options", [{"mode": "chunk_relaxed"}, {"cache_positions": True}], ids=["relaxed", "positions"])
def test_modes_equal_the_reference(options: dict[str, Any]) -> None:
    ids, chunks = tokens(batch=1, length=120).cuda(), [70, 40, *[1] * 10]
    got, wanted = (run("llama", STREAMING, chunks, ids, inner, **options) for inner in ("inductor", "eager"))
    assert (got - wanted).abs().max() < 1e-4  # sink scores come from separate matrix products


def test_generate_over_padded_rows_equals_the_reference() -> None:
    results = []
    for inner in ("inductor", "eager"):
        torch._dynamo.reset()
        model = decoder("llama")
        cache = sc.SparseCache(
            model.config, POLICIES["by KV head"], max_length=128, max_batch=2, page_size=8, dtype=torch.float32, device="cuda"
        )
        model = sc.compile(model, POLICIES["by KV head"], inner=inner)
        results.append(logits_of_padded(model, cache, 60, 13))
    assert (results[0] - results[1]).abs().max() < 1e-5


@pytest.mark.slow
def test_a_thousand_steps_are_one_graph_without_syncs() -> None:
    model = decoder("llama").bfloat16()
    assert_steps_are_one_graph(model, POLICIES["by KV head"], prompt=200, steps=1000, page_size=8)


def test_a_decode_step_reads_the_heads_it_was_given() -> None:
    """FlexAttention's decode template ignores the storage offset of a view of the queries (torch 2.11)."""
    torch.manual_seed(0)
    q = torch.randn(1, 8, 1, 64, device="cuda")
    k, v = torch.randn(2, 1, 2, 300, 64, device="cuda").unbind()

    def attend(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
        seen = torch.arange(300, device=q.device)[None] <= position
        return F.scaled_dot_product_attention(q[:, 4:], k, v, attn_mask=seen[None, None], enable_gqa=True)

    position = torch.tensor(250, device="cuda")
    with torch.no_grad():
        got = torch.compile(attend, backend=sc.Backend())(q, k, v, position)
    assert (got - attend(q, k, v, position)).abs().max() < 2e-3
