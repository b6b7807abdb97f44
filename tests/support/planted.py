"""A Llama with handmade weights, so that tests know exactly which heads retrieve.

The residual stream holds the code vector of a token, the code vector of the token before it (which layer 0 finds), and the
code vectors that heads have found. RoPE rotates the first pairs of channels fast, and heads use these to find a distance. Its
base is huge, so the last half of the pairs does not rotate within a text, and heads use these to compare contents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 3, 8, 4, 64
VOCABULARY, CODE, BOS = 256, 32, 0
TOKEN, BEFORE, FOUND, REST = slice(0, 32), slice(32, 64), slice(64, 96), slice(96, 128)  # slices of the hidden channels
ONE, IS_BOS, HIDDEN = 128, 129, 136
STILL = [*range(16, 32), *range(48, 64)]  # channels of a head that RoPE does not rotate

INDUCTION = {(1, 1), (1, 3), (2, 0)}


def planted(roles: Mapping[tuple[int, int], str] | None = None) -> Any:
    """Build the model. ``roles`` maps KV heads ``(layer, head)`` to a role; others attend to themselves, to BOS or to nothing.

    | role        | attends to                                                   |
    |-------------|--------------------------------------------------------------|
    | `previous`  | the token before the current token                           |
    | `induction` | the tokens that followed earlier copies of the current token |
    | `echo`      | earlier copies of the current token                          |

    Only the second of the two query heads of a KV head has the role. The first attends to the current token.
    """
    roles = {(0, 2): "previous"} | dict.fromkeys(INDUCTION, "induction") if roles is None else roles
    sizes: dict[str, Any] = {"hidden_size": HIDDEN, "intermediate_size": 8, "head_dim": HEAD_DIM, "vocab_size": VOCABULARY}
    heads: dict[str, Any] = {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS}
    rope: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e12}, "max_position_embeddings": 4096}
    factory: Any = AutoModelForCausalLM
    model = factory.from_config(LlamaConfig(**sizes, **heads, **rope, tie_word_embeddings=False, bos_token_id=None)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        for name, module in model.named_modules():
            if "norm" in name:
                module.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(_embeddings())
        model.lm_head.weight[:, FOUND] = model.model.embed_tokens.weight[:, TOKEN]
        for layer, block in enumerate(model.model.layers):
            for head in range(KV_HEADS):
                _plant(block.self_attn, 2 * head, "itself", 0.0)
                _plant(
                    block.self_attn, 2 * head + 1, roles.get((layer, head), ("itself", "bos", "nowhere")[(layer + head) % 3])
                )
    return model


def _embeddings() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(VOCABULARY, HIDDEN)
    signs = torch.rand(VOCABULARY, CODE, generator=generator) < 0.5
    found[:, TOKEN] = torch.where(signs, 1.0, -1.0) / CODE**0.5
    found[:, ONE], found[BOS, IS_BOS] = 1.0, 1.0
    return found


def _plant(attention: Any, head: int, role: str, weight: float | None = None) -> None:
    """Give a query head its role. The channels of the residual stream are about 5 to 8 in size after the norm."""
    kv = head // 2
    q = attention.q_proj.weight.view(HEADS, HEAD_DIM, HIDDEN)[head]
    k = attention.k_proj.weight.view(KV_HEADS, HEAD_DIM, HIDDEN)[kv]
    v = attention.v_proj.weight.view(KV_HEADS, HEAD_DIM, HIDDEN)[kv]
    out = attention.o_proj.weight.view(HIDDEN, HEADS, HEAD_DIM)[:, head]
    moving = range(4)  # 1, 0.42, 0.18 and 0.075 radians per token: only one distance aligns all four
    eye = torch.eye(CODE)
    k[moving, ONE] = 2.0
    v[:CODE, TOKEN] = eye
    if role in ("itself", "previous"):
        # The score is the sum of cos(turn * (i - j - distance)).
        distance = 1 if role == "previous" else 0
        turns = 1e12 ** (-torch.arange(4) * 2 / HEAD_DIM)
        q[moving, ONE] = 4 * torch.cos(turns * distance)
        q[[at + HEAD_DIM // 2 for at in moving], ONE] = -4 * torch.sin(turns * distance)
    elif role == "bos":
        k[15, IS_BOS], q[15, ONE] = 4.0, 4.0
    elif role == "induction":
        q[STILL, TOKEN], k[STILL, BEFORE] = 4 * eye, 4 * eye
    elif role == "echo":
        q[STILL, TOKEN], k[STILL, TOKEN] = 4 * eye, 4 * eye
    to = {"previous": BEFORE, "induction": FOUND, "echo": FOUND}.get(role, REST)
    # A head that attends to nothing returns the mean of all values, which is almost zero.
    size = {"itself": 0.2, "previous": 1.0, "bos": 0.2, "nowhere": 0.02, "induction": 0.5, "echo": 0.5}[role]
    out[to, :CODE] = (size if weight is None else weight) * eye
