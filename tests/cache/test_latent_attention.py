"""A SparseCache holds the latent vectors of DeepSeek's attention, and a policy applies to the keys that come from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, page_topk, per_head, sink, sliding_window
from support.generating import new_tokens
from support.models import SMALL
from support.oracles.cache import HEADS, LAYERS, error, llama, random_tokens, visible
from support.sessions.cache import ones

pytestmark = pytest.mark.usefixtures("fresh")

STREAMING = causal & (sink(2) | sliding_window(6))
BY_HEAD = per_head([causal, STREAMING, causal & sliding_window(3), STREAMING])
POLICIES: dict[str, Mask | None] = {"exact": None, "streaming": STREAMING, "by head": BY_HEAD}
SIZES: dict[str, Any] = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "initializer_range": 0.2, "eos_token_id": None,
}  # fmt: skip
KINDS = ["deepseek_v2", "deepseek_v3"]


def deepseek(kind: str, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    factory: Any = AutoModelForCausalLM
    return factory.from_config(AutoConfig.for_model(kind, **{**SMALL, **SIZES}), attn_implementation=attention).eval()


def wanted(kind: str, ids: Tensor, policy: Mask | None) -> Tensor:
    """The logits of a text in one pass without a cache, under a dense mask."""
    dense = (causal if policy is None else causal & policy).dense(ids.shape[1], ids.shape[1], heads=HEADS)
    visible[:] = [dense] * LAYERS
    with torch.no_grad():
        logits: Tensor = deepseek(kind, "cache_oracle")(ids, use_cache=False).logits
        return logits


def feed(model: Any, cache: sc.SparseCache, ids: Tensor, lengths: list[int]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(lengths, dim=1)], dim=1)


def padded(length: int = 20, pad: int = 5) -> dict[str, Tensor]:
    ids = random_tokens(length, batch=2)
    mask = torch.ones_like(ids)
    ids[0, :pad] = mask[0, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", POLICIES)
def test_prompts_chunks_and_steps_equal_one_pass(kind: str, name: str) -> None:
    ids, policy = random_tokens(30), POLICIES[name]
    model = sc.compile(deepseek(kind), policy, inner="eager", strict=True)
    cache = model.sparse_cache(max_length=40, page_size=8)
    assert error(feed(model, cache, ids, [11, 7, *ones(12)]), wanted(kind, ids, policy)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_generate_equals_that_of_a_dynamic_cache(kind: str) -> None:
    inputs = padded()
    with torch.no_grad():
        dense = new_tokens(deepseek(kind), inputs, past_key_values=DynamicCache(config=deepseek(kind).config))
    model = sc.compile(deepseek(kind), inner="eager", cache={"page_size": 16})
    assert torch.equal(new_tokens(model, inputs), dense)
    assert torch.equal(new_tokens(model, inputs, num_beams=2), new_tokens(deepseek(kind), inputs, num_beams=2))


def test_a_policy_counts_text_positions_under_padding() -> None:
    inputs, model = padded(), sc.compile(deepseek("deepseek_v3"), STREAMING, inner="eager", cache={"page_size": 16})
    both = new_tokens(model, inputs)
    for row, pad in enumerate((5, 0)):
        alone = {name: value[row : row + 1, pad:] for name, value in inputs.items()}
        assert torch.equal(both[row], new_tokens(model, alone)[0])


def test_inductor_computes_the_same() -> None:
    ids = random_tokens(20)
    model = sc.compile(deepseek("deepseek_v3"), STREAMING)
    cache = model.sparse_cache(max_length=32, page_size=16)
    assert error(feed(model, cache, ids, [15, *ones(5)]), wanted("deepseek_v3", ids, STREAMING)) < 1e-4


def test_the_cache_holds_one_latent_vector_for_each_token(tmp_path: Path) -> None:
    ids, model = random_tokens(30), sc.compile(deepseek("deepseek_v3"), STREAMING, inner="eager")
    cache = model.sparse_cache(max_length=24, page_size=8)
    assert cache.dense_nbytes == LAYERS * 24 * (16 + 8) * 4
    feed(model, cache, ids[:, :20], [12, *ones(8)])
    cache.save(tmp_path / "prompt")
    longer = model.sparse_cache(max_length=64, page_size=8)
    longer.load(tmp_path / "prompt")
    longer.crop(-4)
    assert error(feed(model, longer, ids[:, 16:], ones(14)), wanted("deepseek_v3", ids, STREAMING)[:, 16:]) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": sc.Policy(decode=causal & page_topk(16))}, "caches latent vectors: use a policy without page_topk"),
        ({"kv": "int8"}, "caches latent vectors: leave kv out"),
        ({"policy": STREAMING, "cache_positions": True}, "caches latent vectors of every token: leave it out"),
    ],
    ids=["page_topk", "kv", "cache_positions"],
)
def test_what_latent_vectors_cannot_do_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sc.SparseCache(deepseek("deepseek_v3").config, max_length=64, **options)


# -- other models that compute keys from a cache ------------------------------------------------------------------------------


def doubled(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
    """Attention that changes its keys after the cache."""
    return sdpa_attention_forward(module, query, key * 2, value, attention_mask, **options)


AttentionInterface.register("doubled", doubled)
AttentionMaskInterface.register("doubled", sdpa_mask)


def test_keys_that_a_model_changes_after_the_cache_are_read_from_pages() -> None:
    ids, double = random_tokens(20), llama("doubled")
    with torch.no_grad():
        whole = double(ids, use_cache=False).logits
    model = sc.compile(double, inner="eager")
    cache = sc.SparseCache(model.config, max_length=24, page_size=8, max_batch=2)
    assert error(feed(model, cache, ids, [9, 3, *ones(8)]), whole) < 1e-5


def test_a_ring_is_refused_where_a_model_changes_its_keys_after_the_cache() -> None:
    model = sc.compile(llama("doubled"), STREAMING, inner="eager")
    cache = sc.SparseCache(model.config, STREAMING, max_length=24, page_size=1)
    with pytest.raises(
        sc.SparseCacheError, match=r"layer 0 .* computes its keys from the contents .*: build the cache without kv"
    ):
        feed(model, cache, random_tokens(9), [9])
    assert cache.get_seq_length() == 0
