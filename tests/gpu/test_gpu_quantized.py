"""Check a quantized ``SparseCache`` on CUDA: the kernels against the reference, and one CUDA graph without syncs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, page_topk, per_head, sink, sliding_window
from support.models import DECODERS, left_padding, tokens
from support.on_gpu import ON_GPU, logits_of_chunks
from support.one_graph import assert_steps_are_one_graph

pytestmark = ON_GPU
STREAMING = causal & (sink(4) | sliding_window(20))
CHOSEN = sc.Policy(prefill=causal, decode=per_head([causal & page_topk(64), STREAMING]))
POLICIES: dict[str, sc.Policy | Mask | None] = {
    "dense": None,
    "by KV head": per_head([causal, STREAMING]),
    "chosen pages": sc.Policy(prefill=causal, decode=causal & page_topk(64)),
    "chosen pages by KV head": CHOSEN,
}
FORMATS: dict[str, Any] = {
    "int8": "int8",
    "int4": "int4",
    "fp8": "fp8",
    "mixed": sc.KVFormat("int8", "int4"),
    "by KV head": [["int8", None], ["int4", "fp8"]],
}


def decoder() -> Any:
    return next(d for d in DECODERS if d.name == "llama").build().cuda()


def run(policy: sc.Policy | Mask | None, kv: Any, ids: Tensor, inner: str) -> tuple[Tensor, sc.Report]:
    """Return the logits of a text in chunks and the report, with a cache that has more rows than are used."""
    torch._dynamo.reset()
    model = decoder()
    sizes: dict[str, Any] = {"max_length": 512, "max_batch": 3, "page_size": 32, "dtype": torch.float32, "device": "cuda"}
    cache = sc.SparseCache(model.config, policy, **sizes, kv=kv)
    model = sc.compile(model, policy, inner=inner, mode="reduce-overhead" if inner == "inductor" else None)
    logits = []
    with torch.no_grad():
        for part in ids.split([250, 50, *[1] * 20], dim=1):
            torch.compiler.cudagraph_mark_step_begin()
            logits.append(model(part.clone(), past_key_values=cache).logits.clone())
    return torch.cat(logits, dim=1), model.sparse_compile_report


@pytest.mark.parametrize(
    ("policy", "kv"),
    [("dense", kv) for kv in FORMATS] + [(policy, kv) for policy in list(POLICIES)[1:] for kv in ("int8", "int4")],
)
def test_kernels_equal_the_reference(policy: str, kv: str) -> None:
    ids = tokens(length=320).cuda()
    (got, report), (wanted, _) = (run(POLICIES[policy], FORMATS[kv], ids, inner) for inner in ("inductor", "eager"))
    # A number that is rounded the other way differs by a whole step of its format.
    assert (got - wanted).norm() < 1e-3 * wanted.norm()
    assert any("page attention" in site.kernel for site in report.sites if site.phase == "decode")


def test_padded_rows_are_decoded_for_each_step() -> None:
    results = []
    for inner in ("inductor", "eager"):
        torch._dynamo.reset()
        model = decoder()
        sizes: dict[str, Any] = {"max_length": 250, "max_batch": 2, "page_size": 32, "dtype": torch.float32, "device": "cuda"}
        cache = sc.SparseCache(model.config, None, **sizes, kv="int8")
        model = sc.compile(model, inner=inner)
        inputs = {"attention_mask": left_padding(length=200, pad=45).cuda(), "past_key_values": cache}
        out = model.generate(
            tokens(length=200).cuda(), **inputs, max_new_tokens=20, min_new_tokens=20, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        results.append(torch.stack(out.logits))
    assert (results[0] - results[1]).norm() < 1e-3 * results[1].norm()


@pytest.mark.parametrize("kv", ["int8", "int4"])
def test_steps_are_one_graph_without_syncs(kv: str) -> None:
    assert_steps_are_one_graph(decoder().bfloat16(), CHOSEN, prompt=700, steps=200, page_size=64, kv=kv)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("inner", ["inductor", "eager"])
@pytest.mark.parametrize("policy", ["dense", "chosen pages by KV head"])
def test_a_model_may_lie_on_another_device_than_the_current_one(policy: str, inner: str) -> None:
    ids = tokens(length=300)
    results = []
    for device in ("cuda:0", "cuda:1"):
        torch._dynamo.reset()
        model = decoder().to(device)
        sizes: dict[str, Any] = {"max_length": 320, "max_batch": 2, "page_size": 32, "dtype": torch.float32, "device": device}
        cache = sc.SparseCache(model.config, POLICIES[policy], **sizes, kv="int8")
        model = sc.compile(model, POLICIES[policy], inner=inner)
        results.append(logits_of_chunks(model, cache, ids.to(device), [280, *[1] * 20]).cpu())
    assert torch.cuda.current_device() == 0
    assert float((results[0] - results[1]).abs().max()) < 1e-4
