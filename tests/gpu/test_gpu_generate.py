"""Check ``generate`` on CUDA as users call it: kernels, CUDA graphs, padding, chunks, and the memory that it needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, page_topk, per_head, sink, sliding_window
from support.on_gpu import ON_GPU

pytestmark = ON_GPU
STREAMING = causal & (sink(4) | sliding_window(60))
POLICIES: dict[str, sc.Policy | Mask | None] = {
    "exact": None,
    "streaming": STREAMING,
    "by KV head": per_head([causal, STREAMING]),
    "pages": sc.Policy(prefill=causal, decode=causal & (sink(4) | page_topk(128, page=16))),
}
PAD = 37


def model(dtype: torch.dtype = torch.float32, layers: int = 2) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, vocab_size=99, pad_token_id=0, eos_token_id=None, max_position_embeddings=1 << 18,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to("cuda", dtype)


def padded(length: int = 300) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(3, 99, (2, length), device="cuda")
    mask = torch.ones_like(ids)
    ids[0, :PAD], mask[0, :PAD] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def new_tokens(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False, **options)
    tokens: Tensor = out[:, inputs["input_ids"].shape[1] :]
    return tokens


@pytest.mark.parametrize(("kv", "chunk"), [(None, 8192), ("int8", 256)])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_tokens_equal_the_reference(policy: sc.Policy | Mask | None, kv: str | None, chunk: int) -> None:
    inputs = padded()
    options: dict[str, Any] = {"cache": {"kv": kv}, "prefill_chunk_size": chunk}
    wanted = new_tokens(sc.compile(model(), policy, inner="eager", **options), inputs)
    torch._dynamo.reset()
    fast = sc.compile(model(), policy, **options)
    got = new_tokens(fast, inputs)
    assert torch.equal(got, wanted)
    assert torch.equal(new_tokens(fast, inputs), wanted)  # the same cache again
    if policy is None and kv is None:
        assert torch.equal(wanted, new_tokens(model(), inputs))


def test_a_padded_step_runs_the_same_kernels() -> None:
    for policy in POLICIES.values():
        torch._dynamo.reset()
        kernels = []
        for inputs in (padded(), {"input_ids": padded()["input_ids"]}):
            fast = sc.compile(model(torch.bfloat16), policy, cache={"kv": "int8"})
            new_tokens(fast, inputs)
            kernels.append({site.kernel for site in fast.sparse_compile_report.sites if site.phase == "decode"})
        assert kernels[0] == kernels[1] == {"page attention"}


def test_no_mask_of_queries_times_keys_is_allocated() -> None:
    length = 40_000
    for pad in (0, PAD):
        ids = torch.randint(3, 99, (1, length), device="cuda")
        mask = torch.ones_like(ids)
        mask[:, :pad] = 0
        fast = sc.compile(model(torch.bfloat16), None)
        fast.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fast.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4)
        assert torch.cuda.max_memory_allocated() - before < 8192 * length  # bytes: a mask of one chunk, one byte a pair


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_steps_in_pieces_equal_the_reference(policy: sc.Policy | Mask | None) -> None:
    """Six layers are cut into pieces, which are recorded as one CUDA graph."""
    inputs = padded()
    wanted = new_tokens(sc.compile(model(layers=6), policy, inner="eager"), inputs)
    torch._dynamo.reset()
    fast = sc.compile(model(layers=6), policy)
    for _ in range(2):
        assert torch.equal(new_tokens(fast, inputs), wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_caches_of_transformers_work_under_cuda_graphs(cache: str) -> None:
    inputs = padded()
    wanted = new_tokens(model(), inputs)
    fast = sc.compile(model(), mode="reduce-overhead")
    for _ in range(3):
        assert torch.equal(new_tokens(fast, inputs, cache_implementation=cache), wanted)


def test_results_of_steps_stay_valid() -> None:
    fast = sc.compile(model())
    inputs = padded()
    out = fast.generate(
        **inputs, max_new_tokens=8, do_sample=False, output_hidden_states=True, output_logits=True, return_dict_in_generate=True
    )
    torch._dynamo.reset()
    wanted = model().generate(
        **inputs, max_new_tokens=8, do_sample=False, output_hidden_states=True, output_logits=True, return_dict_in_generate=True
    )
    for got, expected in zip(out.hidden_states[1:], wanted.hidden_states[1:], strict=True):
        assert (got[-1] - expected[-1]).abs().max() < 1e-3


def test_steps_over_a_longer_cache_are_recorded_too() -> None:
    """The second prompt needs a longer cache, so the sizes of its buffers become inputs of the graph of the step."""
    fast, stock = sc.compile(model(layers=6)), model(layers=6)
    compiles = []
    for length in (100, 700, 1500, 700):
        inputs = {"input_ids": padded(length)["input_ids"][:1]}
        assert torch.equal(new_tokens(fast, inputs), new_tokens(stock, inputs))
        compiles.append(fast.sparse_compile_report.compiles)
    assert compiles[-1] - compiles[-2] <= 1  # at most a prompt is compiled again, and no step
