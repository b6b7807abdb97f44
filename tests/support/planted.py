"""A Llama whose weights are set by hand, so that it is known which heads retrieve, and that no other does.

The residual stream holds the code of a token, the code of the token before it (what layer 0 finds), and what heads found. RoPE
turns the first pairs of channels fast, by which heads find a distance, and the last half of them not at all in a text (its base
is huge), by which heads compare contents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 3, 8, 4, 64
VOCABULARY, CODE, BOS = 256, 32, 0
TOKEN, BEFORE, FOUND, REST = slice(0, 32), slice(32, 64), slice(64, 96), slice(96, 128)  # of the hidden channels
ONE, IS_BOS, HIDDEN = 128, 129, 136
STILL = [*range(16, 32), *range(48, 64)]  # channels of a head that RoPE leaves alone

INDUCTION = {(1, 1), (1, 3), (2, 0)}


def planted(roles: Mapping[tuple[int, int], str] | None = None) -> Any:
    """``roles`` are those of KV heads ``(layer, head)``; all others look at themselves, at the first token, or nowhere.

    ``previous`` finds the token before, ``induction`` what followed the current token earlier, ``echo`` its earlier copies. Of
    the two query heads of a KV head the second alone has the role; the first looks at itself.
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
    moving = range(4)  # 1, 0.42, 0.18 and 0.075 radians a token: no distance but one pleases all four
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
    # What a head that looks nowhere brings is the mean of everything: next to nothing.
    size = {"itself": 0.2, "previous": 1.0, "bos": 0.2, "nowhere": 0.02, "induction": 0.5, "echo": 0.5}[role]
    out[to, :CODE] = (size if weight is None else weight) * eye
