"""Attention under a dense mask: the oracle of the fused kernels, and the fallback where they cannot run."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparse_compile.masks import Mask, ScoreMod
from sparse_compile.masks.captured import Captured
from sparse_compile.masks.score_mods import Bias, SinkLogits, in_order
from sparse_compile.passes.ops.block_tables import KV_START, Q_START, batch_of, bind, starts, tensor_names


class DenseMask(nn.Module):
    """A mask as a bool tensor ``[B|1, H|1, Q, KV]``, computed once for all layers that share it."""

    def __init__(self, mask: Mask, heads: int) -> None:
        super().__init__()
        self.mask, self.heads = mask, heads

    def forward(
        self,
        q_len: int,
        kv_len: int,
        q_start: int,
        kv_start: int,
        q_shift: Tensor | None,
        device: torch.device,
        *captures: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the positions of the first query and key ``[1]``, and the mask."""
        first_query, first_key = starts(q_start, kv_start, q_shift, device)
        mask = bind(self.mask, tensor_names(self.mask), captures, first_query, first_key)
        if self.heads > 1:
            mask = mask.for_heads(self.heads)
        batch = batch_of(captures)
        b = torch.arange(batch, device=device).view(-1, 1, 1, 1)
        h = torch.arange(self.heads, device=device).view(1, -1, 1, 1)
        i = (torch.arange(q_len, device=device) + first_query).view(1, 1, -1, 1)
        j = (torch.arange(kv_len, device=device) + first_key).view(1, 1, 1, -1)
        visible: Tensor = mask(b, h, i, j)
        return first_query, first_key, visible.expand(batch, self.heads, q_len, kv_len)

    def extra_repr(self) -> str:
        return str(self.mask)


class ListedPairs(nn.Module):
    """A dense mask without the pairs of blocks that tables do not list."""

    def __init__(self, block: tuple[int, int]) -> None:
        super().__init__()
        self.block = block

    def forward(self, visible: Tensor, count: Tensor, index: Tensor, heads: int) -> Tensor:
        """Return ``visible`` ``[B | 1, H | 1, Q, KV]`` without pairs of unlisted blocks: ``[B, heads, Q, KV]``.

        ``index`` ``[B, T, rows, n]`` lists ``count`` ``[B, T, rows]`` blocks of keys for each block of queries.
        """
        (q_block, kv_block), (q_len, kv_len) = self.block, visible.shape[2:]
        blocks = (kv_len + kv_block - 1) // kv_block
        listed = torch.arange(index.shape[-1], device=index.device) < count.unsqueeze(-1)
        at = torch.where(listed, index.long(), blocks)
        chosen = torch.zeros(*index.shape[:-1], blocks + 1, dtype=torch.bool, device=index.device).scatter(-1, at, True)
        pairs = chosen[..., :blocks].repeat_interleave(q_block, dim=2)[:, :, :q_len]
        pairs = pairs.repeat_interleave(kv_block, dim=3)[..., :kv_len]
        return visible & pairs.repeat_interleave(heads // index.shape[1], dim=1)

    def extra_repr(self) -> str:
        return f"{self.block}"


class ReferenceAttention(nn.Module):
    """Attention under a dense mask: slow and simple, with gradients for every operand. The oracle of the fused kernels."""

    def __init__(self, scale: float, score_mod: ScoreMod | None) -> None:
        super().__init__()
        self.scale, self.score_mod = scale, score_mod

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: tuple[Tensor, ...], *captures: Tensor) -> Tensor:
        """Return ``[B, Hq, Q, Dv]``. A query that sees no key gives zeros."""
        first_query, first_key, visible = prepared
        mod = bind_scores(self.score_mod, captures, first_query, first_key)
        return reference_attention(q, k, v, visible, scale=self.scale, score_mod=mod, q_start=first_query, kv_start=first_key)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, score_mod={self.score_mod}"


def score_tensor_names(mod: ScoreMod | None) -> tuple[Captured, ...]:
    return tuple(c for c in mod.captures() if c not in (Q_START, KV_START)) if mod is not None else ()


def split_sink(mod: ScoreMod | None) -> tuple[ScoreMod | None, SinkLogits | None]:
    """Split a score mod into the part that changes scores, and the learned sink that joins the softmax afterwards."""
    parts = mod.parts() if mod is not None else ()
    sink = parts[-1] if parts and isinstance(parts[-1], SinkLogits) else None
    pointwise = parts[:-1] if sink is not None else parts
    return in_order(pointwise) if pointwise else None, sink


def bind_scores(mod: ScoreMod | None, tensors: tuple[Tensor, ...], q_start: Tensor, kv_start: Tensor) -> ScoreMod | None:
    if mod is None:
        return None
    values = {name: name.filled(tensor) for name, tensor in zip(score_tensor_names(mod), tensors, strict=True)}
    return mod.bind(values | {Q_START: Q_START.filled(q_start), KV_START: KV_START.filled(kv_start)})


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    scale: float,
    score_mod: ScoreMod | None = None,
    q_start: Tensor | int = 0,
    kv_start: Tensor | int = 0,
) -> Tensor:
    """Compute attention by SDPA under a dense mask, or with all scores in memory where SDPA cannot apply the score mod.

    ``q`` is ``[B, Hq, Q, D]``, ``k`` and ``v`` are ``[B, Hkv, KV, D]`` with ``Hq`` a multiple of ``Hkv``, ``visible`` is
    bool and broadcasts to ``[B, Hq, Q, KV]``. ``q_start`` and ``kv_start`` are the positions of the first query and
    key that score mods see. Returns ``[B, Hq, Q, Dv]`` in the dtype of ``q``; a query that sees no key gives zeros.
    """
    group = q.shape[1] // k.shape[1]
    if group > 1 and score_mod is None and isinstance(q.shape[2], int) and q.shape[2] == 1:
        # With one query, the heads of a group become rows that share their keys, so keys need not be repeated.
        rows = q.unflatten(1, (k.shape[1], group)).squeeze(3)
        seen = visible.unflatten(1, (k.shape[1], group)).squeeze(3) if visible.shape[1] > 1 else visible
        out = nn.functional.scaled_dot_product_attention(rows, k, v, attn_mask=seen, scale=scale)
        return out.flatten(1, 2).unsqueeze(2)
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if score_mod is None:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    q_len, kv_len = q.shape[2], k.shape[2]
    i = (torch.arange(q_len, device=q.device) + q_start).view(1, 1, -1, 1)
    j = (torch.arange(kv_len, device=q.device) + kv_start).view(1, 1, 1, -1)
    b = torch.arange(q.shape[0], device=q.device).view(-1, 1, 1, 1)
    h = torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1)
    pointwise, sink = split_sink(score_mod)
    if isinstance(pointwise, Bias) and sink is None:
        # SDPA takes one additive term as a float mask, and never holds the scores in memory.
        added = pointwise(torch.zeros((), dtype=q.dtype, device=q.device), b, h, i, j)
        hidden = torch.full((), -torch.inf, dtype=q.dtype, device=q.device)
        return nn.functional.scaled_dot_product_attention(q, k, v, torch.where(visible, added.to(q.dtype), hidden), scale=scale)
    # The softmax needs single precision at least.
    scores = (q @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32)) * scale
    if pointwise is not None:
        scores = pointwise(scores, b, h, i, j)
    # A row of only -inf has no softmax. Its scores become 0 here, and its weights become 0 below.
    scores = scores.masked_fill(~visible, -torch.inf).masked_fill(~visible.any(dim=-1, keepdim=True), 0)
    if sink is not None:
        logits = Captured.of(sink.logits).tensor.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, logits], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return weights.masked_fill(~visible, 0).to(v.dtype) @ v
