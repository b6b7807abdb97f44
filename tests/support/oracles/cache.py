"""The oracle for cache tests: a whole text in one pass without a cache, each layer under a dense mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig

import sparse_compile as sc
from sparse_compile.masks import Mask, causal
from support.models import SMALL, VOCABULARY

HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 16, 2
visible: list[Tensor] = []  # one per layer: bool [1, heads, q_len, kv_len]


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention; transformers models call this with ``attn_implementation="cache_oracle"``."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    layer = module.layer_idx
    assert isinstance(layer, int)
    weights = scores.masked_fill(~visible[layer], -torch.inf).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("cache_oracle", attend)


def llama(attention: str = "sdpa", **changes: Any) -> Any:
    """Build a tiny Llama with larger initial weights than usual; with small ones, every key would count alike."""
    torch.manual_seed(0)
    sizes = {**SMALL, "num_key_value_heads": KV_HEADS, "initializer_range": 0.2, **changes}
    factory: Any = AutoModelForCausalLM
    return factory.from_config(LlamaConfig(**sizes), attn_implementation=attention).eval()


def random_tokens(length: int, batch: int = 1, seed: int = 1) -> Tensor:
    """Return random token ids ``[batch, length]``."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def under(ids: Tensor, masks: list[Tensor]) -> Tensor:
    """Return the logits ``[batch, length, vocabulary]`` of the model from ``llama()``, with one mask per layer."""
    model = llama("cache_oracle")
    visible[:] = masks
    with torch.no_grad():
        result: Tensor = model(ids, use_cache=False).logits
    return result


def whole(
    ids: Tensor, policy: sc.Policy | Mask | None, *, decoded: range = range(0), relaxed: list[int] | None = None
) -> Tensor:
    """Return the logits of a text under a policy, in one pass.

    The policy's decode mask applies to the tokens in ``decoded``. ``relaxed`` lists the lengths of prefill chunks. The
    queries of a chunk see the chunk itself, and the keys that the mask shows to the position before the chunk.
    """
    policy, length = sc.Policy(policy), ids.shape[1]
    masks = []
    for layer in range(LAYERS):
        rows = {phase: _dense(policy.mask_for("", layer, phase), length) for phase in ("prefill", "decode")}
        seen = rows["prefill"].clone()
        seen[:, :, decoded.start : decoded.stop] = rows["decode"][:, :, decoded.start : decoded.stop]
        masks.append((_relax(seen, relaxed) if relaxed else seen) & _dense(causal, length))
    return under(ids, masks)


def _dense(mask: Mask | None, length: int) -> Tensor:
    return (causal if mask is None else causal & mask).dense(length, length, heads=HEADS)


def _relax(seen: Tensor, chunks: list[int]) -> Tensor:
    relaxed, start = torch.zeros_like(seen), 0
    for size in chunks:
        for query in range(start, start + size):
            relaxed[:, :, query, start : query + 1] = True
            if start:
                relaxed[:, :, query, :start] = seen[:, :, start - 1, :start]
        start += size
    return relaxed


def error(got: Tensor, wanted: Tensor) -> float:
    """Return the largest difference relative to the largest value. NaN stays NaN, so that it fails every comparison."""
    return float((got - wanted).abs().max() / wanted.abs().max())
