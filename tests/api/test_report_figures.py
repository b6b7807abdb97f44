"""The figures of a report, counted pair by pair."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, full, per_head, sink, sliding_window
from support.models import VOCABULARY, tokens
from support.oracles.cache import llama, random_tokens

STREAMING = causal & (sink(2) | sliding_window(6))
POLICIES = [None, STREAMING, per_head([causal, STREAMING])]

pytestmark = pytest.mark.usefixtures("fresh")


def counted(policy: Mask | None, q_len: int, kv_len: int, start: int) -> float:
    """The share of pairs that causal attention shows under a policy, one pair after the other, for four heads."""
    mask, pairs = causal & (full if policy is None else policy), 0
    for head in range(4):
        one = mask.for_head(head, 4)
        pairs += sum(bool(one(0, 0, torch.tensor(start + i), torch.tensor(j))) for i in range(q_len) for j in range(kv_len))
    return pairs / (4 * q_len * kv_len)


@pytest.mark.parametrize("policy", POLICIES, ids=["exact", "streaming", "by head"])
def test_the_density_of_a_prefill_counts_from_the_tokens_in_the_cache(policy: Mask | None) -> None:
    """A mask over the whole cache is what transformers passes for a second piece of a text."""
    model: Any = sc.compile(llama(), policy, inner="eager", dynamic=False)
    cache = sc.SparseCache(model.config, None, max_length=32, page_size=1)
    with torch.no_grad():
        for length in (9, 5):
            model(random_tokens(length), past_key_values=cache)
    sites = [site for site in model.sparse_compile_report.sites if site.layer == 0]
    starts = {site.traced[0]: site.traced[2] for site in sites}
    assert starts == {9: 0, 5: 9}
    for site in sites:
        q_len, kv_len, start = site.traced
        assert (site.q_len, site.kv_len) == (str(q_len), str(kv_len))
        assert site.density == pytest.approx(counted(policy, q_len, kv_len, start))


@pytest.mark.parametrize("policy", POLICIES, ids=["exact", "streaming", "by head"])
def test_the_bytes_of_a_cache_are_those_of_its_tensors(policy: Mask | None) -> None:
    model: Any = sc.compile(llama(), policy, inner="eager")
    cache = sc.SparseCache(model.config, policy, max_length=32, page_size=1)
    with torch.no_grad():
        model(random_tokens(9), past_key_values=cache)
    for site in model.sparse_compile_report.sites:
        assert site.layer is not None
        layer = cache.cached_layers[site.layer]
        held = [x for x in layer.tensors() if x.dim() == 4 and x.is_floating_point()]
        assert site.kv_nbytes == sum(site.kv_head_nbytes) == sum(x.numel() * x.itemsize for x in held)
        assert site.kv_dense_nbytes == 2 * 2 * 32 * model.config.head_dim * 4  # keys and values of two heads, float32
        assert site.kv_tokens == 32


def test_calls_of_all_pieces_of_a_graph_are_in_the_report() -> None:
    """DistributedDataParallel cuts a graph where a bucket of gradients is full. Recompiles still replace nothing."""
    store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not list it in __all__
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "vocab_size": VOCABULARY}
        config = LlamaConfig(**sizes, num_hidden_layers=4, num_attention_heads=4)
        wrapped = DistributedDataParallel(LlamaForCausalLM(config), bucket_cap_mb=1)
        backend = sc.Backend(STREAMING, inner="eager")
        run = torch.compile(wrapped, backend=backend, dynamic=False)
        run(tokens(), use_cache=False).logits.sum().backward()
        assert [site.layer for site in backend.report.sites] == [0, 1, 2, 3]
        assert (backend.report.compiles, backend.report.recompiles) == (1, 0)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_compiled_model_warns_and_has_no_report(duplicate: Any) -> None:
    model: Any = sc.compile(nn.Sequential(llama()), STREAMING, inner="eager")
    ids = random_tokens(24)
    with torch.no_grad():
        wanted = model(ids).logits
        with pytest.warns(sc.SparseCompileWarning, match="a copy of a compiled Sequential runs un-compiled"):
            twin = duplicate(model)
        assert not hasattr(twin, "sparse_compile_report")
        assert model.sparse_compile_report.compiles == 1
        assert not torch.allclose(twin(ids).logits, wanted)
        assert torch.allclose(sc.compile(twin, STREAMING, inner="eager")(ids).logits, wanted)
        assert model.sparse_compile_report.compiles == 1
