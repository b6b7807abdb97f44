"""The oracle for gates: full attention and streaming attention (a sink and a window), written out and mixed per head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask


@dataclass
class Gated:
    """The gates ``[Hkv]`` of each layer, and the sizes of the sink and the window that streaming heads see."""

    gates: Tensor | Sequence[Tensor] = field(default_factory=list)
    sink: int = 0
    recent: int = 0


now = Gated()


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute gated attention; transformers models call this with ``attn_implementation="gated_oracle"``."""
    group, length = query.shape[1] // key.shape[1], query.shape[2]
    layer = module.layer_idx
    assert isinstance(layer, int)
    seen = torch.tensor([[j <= i for j in range(length)] for i in range(length)])
    near = torch.tensor([[j < now.sink or i - j < now.recent for j in range(length)] for i in range(length)])
    outs = []
    for head in range(query.shape[1]):
        gate = now.gates[layer][head // group]
        scores = query[:, head] @ key[:, head // group].transpose(1, 2)
        scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if attention_mask is not None:
            scores = scores + attention_mask[:, 0]
        extra = None if s_aux is None else s_aux[head]
        everything, streaming = (_weights(scores, mask, extra) @ value[:, head // group] for mask in (seen, seen & near))
        outs.append(gate * everything + (1 - gate) * streaming)
    return torch.stack(outs, dim=2), None


def _weights(scores: Tensor, visible: Tensor, sink: Tensor | None) -> Tensor:
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    if sink is None:
        return scores.softmax(dim=-1)
    return torch.cat([scores, sink.expand(*scores.shape[:2], 1)], dim=-1).softmax(dim=-1)[..., :-1]


AttentionInterface.register("gated_oracle", attend)
AttentionMaskInterface.register("gated_oracle", eager_mask)


def gated_hidden(model: Any, tokens: Tensor, gates: Tensor | Sequence[Tensor], sink: int, recent: int) -> Tensor:
    """Return the last hidden states of an uncompiled model, whose attention goes through transformers' attention interface."""
    now.gates, now.sink, now.recent = gates, sink, recent
    before = model.config._attn_implementation
    model.set_attn_implementation("gated_oracle")
    try:
        hidden: Tensor = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden
    finally:
        model.set_attn_implementation(before)


def factor(step: int, steps: int) -> float:
    """Return the published learning-rate factor: up for a fifth of the steps, flat for three fifths, down to a tenth."""
    up, down = (step + 1) / (steps / 5), (steps - step) / (steps / 5)
    return min(1.0, max(up, 0.1), max(down, 0.1))


def trained(
    model: Any,
    batches: Callable[[int], tuple[Tensor, Tensor]],
    kv_heads: int,
    *,
    layers: int,
    steps: int,
    sink: int,
    recent: int,
    rate: float = 0.02,
    penalty: float = 0.05,
) -> Tensor:
    """Return the gates ``[layers, Hkv]`` after ``steps`` steps of the published training loop, with Adam written out."""
    gates = torch.ones(layers, kv_heads)
    first, second = torch.zeros_like(gates), torch.zeros_like(gates)
    model.requires_grad_(False)
    for step in range(steps):
        tokens, is_answer = batches(step)
        leaf = gates.clone().requires_grad_()
        teacher = gated_hidden(model, tokens, torch.ones_like(gates), sink, recent)
        student = gated_hidden(model, tokens, leaf, sink, recent)
        squares = (student - teacher).square().mean(dim=2)
        distillation = sum(squares[b, i] for b, i in is_answer.nonzero().tolist()) / int(is_answer.sum())
        loss = distillation + penalty * leaf.abs().mean()
        (slope,) = torch.autograd.grad(loss, leaf)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        gates = gates - rate * factor(step, steps) * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
        gates = gates.clamp(0, 1)
    return gates
