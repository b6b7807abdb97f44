"""The oracle for model tests: attention with every score written out, under the model's mask and an extra mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from sparse_compile.masks import Mask, full

extra: dict[str, Mask] = {"mask": full}
starts: dict[str, list[int]] = {"columns": []}  # the column of the first token of each row; no entry for 0


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention for whole sequences without a cache; models call this with ``attn_implementation="oracle"``."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask is not None:
        scores = scores + attention_mask
    if position_bias is not None:
        scores = scores + position_bias
    q_len, kv_len = scores.shape[-2:]
    if attention_mask is None and q_len == kv_len and getattr(module, "is_causal", False):
        scores = scores.masked_fill(torch.ones(q_len, kv_len).triu(1).bool(), -torch.inf)
    scores = hide(scores)
    sinks = getattr(module, "sinks", s_aux)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(dim=-1)
    if sinks is not None:
        weights = weights[..., :-1]
    return (weights @ value).transpose(1, 2).contiguous(), None


def hide(scores: Tensor) -> Tensor:
    """Hide scores by the extra mask, one pair at a time. It counts tokens, not the padding before them."""
    rows, heads, q_len, kv_len = scores.shape
    mask = extra["mask"].for_heads(heads)

    def sees(h: int, i: int, j: int) -> bool:
        return min(i, j) >= 0 and bool(mask(0, h, i, j))

    visible = torch.tensor(
        [
            [[[sees(h, i - first, j - first) for j in range(kv_len)] for i in range(q_len)] for h in range(heads)]
            for first in starts["columns"] or [0] * rows
        ]
    )
    return scores.masked_fill(~visible, torch.finfo(scores.dtype).min)


AttentionInterface.register("oracle", attend)
AttentionMaskInterface.register("oracle", eager_mask)
