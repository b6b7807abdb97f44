"""A SparseCache in its surroundings: the report, explain, copies and gradients."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_compile as sc
from sparse_compile.masks import causal, per_head, sink, sliding_window
from support.oracles.cache import llama, random_tokens

STREAMING = causal & (sink(2) | sliding_window(6))
POLICY = sc.Policy(STREAMING, layers={0: per_head([causal, STREAMING])})


def test_the_bytes_of_layers_and_heads_are_in_the_report() -> None:
    torch._dynamo.reset()
    model, token = llama(), 2 * 16 * 4  # bytes of the keys and values of one head and token
    cache = sc.SparseCache(model.config, POLICY, max_length=64, page_size=8, dtype=torch.float32)
    model = sc.compile(model, POLICY, inner="eager")
    with torch.no_grad():
        model(random_tokens(20), past_key_values=cache)
    first, second = model.sparse_compile_report.sites
    assert first.kv_head_nbytes == cache.cached_layers[0].head_nbytes == (64 * token, 8 * token)
    assert second.kv_head_nbytes == cache.cached_layers[1].head_nbytes == (8 * token, 8 * token)
    assert first.kv_nbytes == cache.cached_layers[0].nbytes == 72 * token
    assert first.kv_dense_nbytes == second.kv_dense_nbytes == 128 * token == cache.dense_nbytes // 2
    assert "SparseCache: 0.0 MiB of keys and values, dense 0.0 MiB" in str(model.sparse_compile_report)
    assert '"kv_head_nbytes": [' in model.sparse_compile_report.to_json()


def test_a_cache_that_was_explained_holds_the_tokens() -> None:
    torch._dynamo.reset()
    model, ids = llama(), random_tokens(30)
    cache = sc.SparseCache(model.config, POLICY, max_length=64, page_size=8, dtype=torch.float32)
    report = sc.explain(model, ids[:, :20], policy=POLICY, past_key_values=cache)
    assert [site.action for site in report.sites] == ["sparse", "sparse"]
    assert cache.get_seq_length() == 20
    fast = sc.compile(model, POLICY, inner="eager")
    with torch.no_grad():
        fast(ids[:, 20:], past_key_values=cache)
    assert cache.get_seq_length() == 30


def test_a_copy_goes_on_by_itself() -> None:
    torch._dynamo.reset()
    model, ids = llama(), random_tokens(30)
    cache = sc.SparseCache(model.config, POLICY, max_length=64, page_size=8, dtype=torch.float32)
    fast = sc.compile(model, POLICY, inner="eager")
    with torch.no_grad():
        fast(ids[:, :20], past_key_values=cache)
        other = copy.deepcopy(cache)
        first, second = (fast(ids[:, 20:], past_key_values=each).logits for each in (cache, other))
    assert torch.equal(first, second)
    assert (cache.get_seq_length(), other.get_seq_length()) == (30, 30)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_there_are_no_gradients_through_a_cache(inner: str) -> None:
    torch._dynamo.reset()
    model, ids = llama(num_hidden_layers=1), random_tokens(12)
    cache = sc.SparseCache(model.config, STREAMING, max_length=64, page_size=8, dtype=torch.float32)
    fast = sc.compile(model, STREAMING, inner=inner)
    for token in ids.split(4, dim=1):
        logits = fast(token, past_key_values=cache).logits
    assert not any(buffer.requires_grad for layer in cache.cached_layers for buffer in layer.buffers)
    with pytest.raises(sc.SparseCacheError, match=r"no gradients.*train the model without the cache"):
        logits.sum().backward()
    assert all(weight.grad is None for weight in model.parameters())


def test_a_loss_in_the_graph_has_no_gradients_either() -> None:
    torch._dynamo.reset()
    model, ids = llama(num_hidden_layers=1).train(), random_tokens(12)
    cache = sc.SparseCache(model.config, STREAMING, max_length=64, page_size=8, dtype=torch.float32)
    loss = sc.compile(model, STREAMING, inner="eager")(ids, labels=ids, past_key_values=cache).loss
    with pytest.raises(sc.SparseCacheError, match=r"use_cache=False.*torch\.no_grad"):
        loss.backward()


class HeadInAGraphOfItsOwn(nn.Module):
    """A language model whose last product is behind a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.whole: Any = llama(num_hidden_layers=1)

    def forward(self, ids: Tensor, cache: Any) -> Tensor:
        hidden = self.whole.model(ids, past_key_values=cache).last_hidden_state
        torch._dynamo.graph_break()
        logits: Tensor = self.whole.lm_head(hidden)
        return logits


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at it for every tensor between two graphs
def test_a_gradient_that_would_lack_the_graph_of_the_cache_is_refused() -> None:
    """Without an error, the weights of the last product alone would train."""
    torch._dynamo.reset()
    model, backend = HeadInAGraphOfItsOwn(), sc.Backend(STREAMING, inner="eager")
    cache = sc.SparseCache(model.whole.config, STREAMING, max_length=64, page_size=8, dtype=torch.float32)
    logits = torch.compile(model, backend=backend)(random_tokens(12), cache)
    assert backend.report.compiles == 2
    with pytest.raises(sc.SparseCacheError, match="this backward pass reaches the output of one"):
        logits.sum().backward()


def test_inference_over_a_cache_may_forget_no_grad() -> None:
    """The mark of a missing gradient neither copies results nor forbids what people do with logits."""
    torch._dynamo.reset()
    model, ids = llama(), random_tokens(12)
    caches = [sc.SparseCache(model.config, STREAMING, max_length=64, page_size=8, dtype=torch.float32) for _ in range(2)]
    fast = sc.compile(model, STREAMING, inner="eager")
    with torch.no_grad():
        wanted = fast(ids, past_key_values=caches[0]).logits
    assert not wanted.requires_grad
    logits = fast(ids, past_key_values=caches[1]).logits
    assert torch.equal(logits, wanted)
    logits[..., 0] = -torch.inf
    logits /= 0.7
    fast(logits[:, -1:].argmax(-1), past_key_values=caches[1])
    assert caches[1].get_seq_length() == 13


def test_a_cache_prints_on_one_line() -> None:
    cache = sc.SparseCache(llama().config, POLICY, max_length=64, page_size=8, dtype=torch.float32)
    assert repr(cache) == f"SparseCache(0 of 64 tokens, 0.0 MiB, dense {cache.dense_nbytes / 2**20:.1f} MiB, 2 layers)"
    assert repr(cache.cached_layers[1]) == "SparseCacheLayer(2 heads x 8 slots (sink 2, recent 6))"
