"""Page selection combined with masks that read tensors of the policy: documents, padding and prefixes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, DynamicCache

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, document, full, padding, page_topk, per_head, prefix
from support.oracles.cache import error, llama, random_tokens

LENGTH, PROMPT, PAGE = 48, 30, 4
DOCUMENTS = document([[position // 12 for position in range(LENGTH)]])
HOLES = padding([[position % 7 != 3 for position in range(LENGTH)]])
chosen = page_topk(16, page=2)
policy = sc.Policy()

pytestmark = pytest.mark.usefixtures("fresh")


def attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """Dense attention under the mask that ``Mask.selected`` returns."""
    at = k.shape[2] - q.shape[2]
    layer = module.layer_idx
    assert isinstance(layer, int)
    given = policy.mask_for("", layer, "decode" if q.shape[2] == 1 else "prefill")
    seen = (causal & (full if given is None else given)).selected(q, k, q_offset=at, page_size=PAGE)
    dense = seen.dense(q.shape[2], k.shape[2], q_offset=at, heads=q.shape[1])
    out = scaled_dot_product_attention(q, k, v, attn_mask=dense, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("selected", attend)


@pytest.mark.parametrize(
    "step",
    [
        DOCUMENTS & chosen,
        DOCUMENTS | chosen,
        HOLES & chosen,
        prefix([5]) | chosen,
        per_head([DOCUMENTS & chosen, causal]),
        page_topk(16, page=2, every=3) & HOLES,
    ],
    ids=["within documents", "documents and more", "padding", "prefix", "in one head", "used again"],
)
def test_steps_equal_the_selected_mask(step: Mask) -> None:
    global policy
    policy = sc.Policy(prefill=causal, decode=causal & step)
    ids, oracle = random_tokens(LENGTH), llama("selected")
    model = sc.compile(llama(), policy, inner="eager")
    cache = sc.SparseCache(model.config, policy, max_length=LENGTH, page_size=PAGE)
    dense = DynamicCache()
    for piece in ids.split([PROMPT, *[1] * (LENGTH - PROMPT)], dim=1):
        with torch.no_grad():
            got = model(piece.clone(), past_key_values=cache).logits
            wanted = oracle(piece, past_key_values=dense).logits
        if "every" not in str(step) or cache.get_seq_length() <= PROMPT + 1:
            assert error(got, wanted) < 1e-5


def test_tensors_that_are_too_short_are_named() -> None:
    short = document([[0] * 20])
    with pytest.raises(ValueError, match="document covers 20 positions, but the attention reaches position 47"):
        sc.SparseCache(llama().config, causal & (short | chosen), max_length=LENGTH, page_size=PAGE)
