"""Heads change places in the weights without changing the model, and each rank gets equally many heads of a kind."""

from __future__ import annotations

import pytest
import torch

import sparse_compile as sc
from sparse_compile.masks import causal, per_head, sink, sliding_window
from sparse_compile.vllm.balance import HeadOrders
from sparse_compile.vllm.plan import Shape, plan_model
from support.oracles.cache import HEAD_DIM, HEADS, KV_HEADS, llama, random_tokens

STREAMING = causal & (sink(4) | sliding_window(64))
SWAPPED = HeadOrders(((1, 0), (0, 1)), HEADS // KV_HEADS, HEAD_DIM)


def test_a_model_whose_heads_change_places_computes_the_same() -> None:
    model, moved = llama(attention_bias=True), llama(attention_bias=True)
    torch.manual_seed(3)
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(bias)
    ids, state = random_tokens(20), model.state_dict()
    moved.load_state_dict(dict(SWAPPED.moved(state.items())))
    projected = "model.layers.0.self_attn.k_proj.weight"
    assert not torch.equal(moved.state_dict()[projected], state[projected])
    with torch.no_grad():
        torch.testing.assert_close(moved(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


def test_ranks_get_equally_many_heads_of_a_kind() -> None:
    policy = sc.Policy(per_head([causal, causal, STREAMING, STREAMING]))
    balanced = plan_model(policy, Shape(8, 4, (None,)), max_length=512, block_size=32, ranks=2, balance=True)
    assert balanced.orders == ((0, 2, 1, 3),)
    for rank in range(2):
        assert sorted(part.kind.name for part in balanced.parts(0, rank)) == ["full", "sink4_recent64"]


def test_numbers_that_ranks_cannot_share_are_refused() -> None:
    policy = sc.Policy(per_head([causal, STREAMING, STREAMING, STREAMING]))
    with pytest.raises(ValueError, match="layer 0 has 1 heads of kind full for 2 ranks: change the policy of this layer"):
        plan_model(policy, Shape(8, 4, (None,)), max_length=512, block_size=32, ranks=2, balance=True)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["qkv_proj.weight"], r"does not read model\.layers\.0\.self_attn\.qkv_proj\.weight: leave"),
        (["q_proj.weight", "q_proj.weight_scale"], "does not read .*weight_scale: leave"),
        (["q_proj.weight", "k_proj.weight", "v_proj.weight"], "the weights have no o_proj.weight: leave"),
    ],
)
def test_weights_that_are_not_understood_are_refused(names: list[str], message: str) -> None:
    weights = [(f"model.layers.0.self_attn.{name}", torch.zeros(HEADS * HEAD_DIM, HEADS * HEAD_DIM)) for name in names]
    with pytest.raises(ValueError, match=message):
        list(SWAPPED.moved(weights))
