"""What a lowered attention call runs. The only file that touches FlexAttention's private surface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.flex_attention import flex_attention as flex_attention_hop
from torch.nn.attention.flex_attention import BlockMask

from sparse_compile.masks import Mask, ScoreMod
from sparse_compile.masks.captured import Captured
from sparse_compile.masks.scores import Bias, SinkLogits, in_order
from sparse_compile.passes.lookups import Lookups
from sparse_compile.passes.tables import KV_START, Q_START, batch_of, bind, given, starts, transpose_tables


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
        """The positions of the first query and key ``[1]``, and the mask."""
        first_query, first_key = starts(q_start, kv_start, q_shift, device)
        mask = bind(self.mask, given(self.mask), captures, first_query, first_key)
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


class ReferenceAttention(nn.Module):
    """Attention under a dense mask: slow, plain, with gradients everywhere. The oracle of the fused kernels."""

    def __init__(self, scale: float, score_mod: ScoreMod | None) -> None:
        super().__init__()
        self.scale, self.score_mod = scale, score_mod

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: tuple[Tensor, ...], *captures: Tensor) -> Tensor:
        """``[B, Hq, Q, Dv]``; a query that sees no key gives zeros."""
        first_query, first_key, visible = prepared
        mod = _bind_scores(self.score_mod, captures, first_query, first_key)
        return reference_attention(q, k, v, visible, scale=self.scale, score_mod=mod, q_start=first_query, kv_start=first_key)

    def extra_repr(self) -> str:
        return f"scale={self.scale}, score_mod={self.score_mod}"


class FlexAttention(nn.Module):
    """Attention by a FlexAttention kernel over prepared block tables."""

    def __init__(self, mask: Mask, heads: int, scale: float, score_mod: ScoreMod | None, block: int) -> None:
        """``heads`` is the number of query heads if the mask differs between heads, else 1."""
        super().__init__()
        self.mask, self.heads, self.scale, self.score_mod, self.block = mask, heads, scale, score_mod, block

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prepared: tuple[Tensor, ...],
        mask_captures: tuple[Tensor, ...],
        *captures: Tensor,
    ) -> Tensor:
        """``[B, Hq, Q, Dv]``; a query that sees no key gives zeros."""
        first_query, first_key, *tables = prepared
        spread = self.mask.for_heads(self.heads) if self.heads > 1 else self.mask
        names = given(spread)
        mods, sink = _split_sink(self.score_mod)
        of_mask, of_scores = Lookups(mask_captures), Lookups(captures[: len(_given_scores(mods))])

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor, q_start: Tensor, kv_start: Tensor, *tensors: Tensor) -> Tensor:
            mask = bind(spread, names, of_mask.read(tensors), q_start, kv_start)
            visible: Tensor = mask(b, h, i + q_start[0], j + kv_start[0])
            return visible

        def score_mod(
            score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, q_start: Tensor, kv_start: Tensor, *tensors: Tensor
        ) -> Tensor:
            mod = _bind_scores(mods, of_scores.read(tensors), q_start, kv_start)
            assert mod is not None
            changed: Tensor = mod(score, b, h, i + q_start[0], j + kv_start[0])
            return changed

        out, lse = _flex(
            q,
            k,
            v,
            scale=self.scale,
            tables=tables,
            block=self.block,
            mask_mod=mask_mod,
            mask_captures=(first_query, first_key, *of_mask.tensors),
            score_mod=score_mod if mods is not None else None,
            score_captures=(first_query, first_key, *of_scores.tensors) if mods is not None else (),
            needs_lse=sink is not None,
        )
        if sink is None:
            return out
        # A key with this logit and no value takes its share of the softmax: out * exp(lse) / (exp(lse) + exp(logit)).
        logits = captures[-1].float().view(1, -1, 1)
        return (out * torch.sigmoid(lse - logits).unsqueeze(-1)).to(out.dtype)

    def extra_repr(self) -> str:
        return f"{self.mask}, scale={self.scale}, score_mod={self.score_mod}"


def _identity(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return score


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    tables: list[Tensor],
    block: int,
    mask_mod: Any,
    mask_captures: tuple[Tensor, ...],
    score_mod: Any,
    score_captures: tuple[Tensor, ...],
    needs_lse: bool,
) -> tuple[Tensor, Tensor]:
    """The call of the higher-order op; the public wrapper specialises dynamic lengths up to torch 2.13 (pytorch#189952)."""
    gradients = torch.is_grad_enabled() and q.device.type != "cpu"
    num, index, full_num, full_index = tables
    block_mask = BlockMask.from_kv_blocks(
        num,
        index,
        full_num,
        full_index,
        BLOCK_SIZE=block,
        mask_mod=mask_mod,
        seq_lengths=(q.shape[2], k.shape[2]),
        compute_q_blocks=False,
    )
    if gradients:
        # ``compute_q_blocks`` cannot be traced by AOTAutograd in torch 2.11: our own op lists the blocks the other way round.
        columns = (k.shape[2] + block - 1) // block
        names = ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")
        for name, table in zip(names, transpose_tables(tables, columns), strict=True):
            setattr(block_mask, name, table)
    if q.device.type == "cpu":
        # The C++ template unpacks the layout of a 4-D buffer and fails on view(linear(x)); a product makes a buffer, and
        # Inductor fuses it into whatever computed q.
        q, scale = q * scale, 1.0
    options = {
        # The decode kernel fails with NoValidChoices for 1 < q_len < 128 where queries times group exceed its tile.
        "BACKEND": "AUTO" if isinstance(q.shape[2], int) and q.shape[2] == 1 else "TRITON",
        "PRESCALE_QK": False,
        "ROWS_GUARANTEED_SAFE": False,
        "BLOCKS_ARE_CONTIGUOUS": False,
        "WRITE_DQ": True,
        "OUTPUT_LOGSUMEXP": needs_lse or gradients,
        "OUTPUT_MAX": False,
    }
    out, lse, _ = flex_attention_hop(
        q, k, v, score_mod or _identity, block_mask.as_tuple(), scale, options, score_captures, mask_captures
    )
    # The raw op gives the log-sum-exp to the base 2.
    return out, lse * 0.6931471805599453 if needs_lse else lse


@torch.library.custom_op("sparse_compile::realise", mutates_args=())
def realise(x: Tensor) -> Tensor:
    """A copy that Inductor cannot see through."""
    return x.clone(memory_format=torch.contiguous_format)


@realise.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _pass_on(ctx: Any, gradient: Tensor) -> Tensor:
    return gradient


realise.register_autograd(_pass_on)


def _given_scores(mod: ScoreMod | None) -> tuple[Captured, ...]:
    return tuple(c for c in mod.captures() if c not in (Q_START, KV_START)) if mod is not None else ()


def _split_sink(mod: ScoreMod | None) -> tuple[ScoreMod | None, SinkLogits | None]:
    """What changes scores, and the learned sink that joins the softmax afterwards."""
    parts = mod.parts() if mod is not None else ()
    sink = parts[-1] if parts and isinstance(parts[-1], SinkLogits) else None
    pointwise = parts[:-1] if sink is not None else parts
    return in_order(pointwise) if pointwise else None, sink


def _bind_scores(mod: ScoreMod | None, tensors: tuple[Tensor, ...], q_start: Tensor, kv_start: Tensor) -> ScoreMod | None:
    if mod is None:
        return None
    values = {name: name.filled(tensor) for name, tensor in zip(_given_scores(mod), tensors, strict=True)}
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
    """Attention with every score written out.

    ``q`` is ``[B, Hq, Q, D]``, ``k`` and ``v`` are ``[B, Hkv, KV, D]`` with ``Hq`` a multiple of ``Hkv``, ``visible`` is
    bool and broadcasts to ``[B, Hq, Q, KV]``. ``q_start`` and ``kv_start`` are the positions of the first query and
    key that score mods see. Returns ``[B, Hq, Q, Dv]`` in the dtype of ``q``; a query that sees no key gives zeros.
    """
    group = q.shape[1] // k.shape[1]
    if group > 1:
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    if score_mod is None:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
    q_len, kv_len = q.shape[2], k.shape[2]
    i = (torch.arange(q_len, device=q.device) + q_start).view(1, 1, -1, 1)
    j = (torch.arange(kv_len, device=q.device) + kv_start).view(1, 1, 1, -1)
    b = torch.arange(q.shape[0], device=q.device).view(-1, 1, 1, 1)
    h = torch.arange(q.shape[1], device=q.device).view(1, -1, 1, 1)
    pointwise, sink = _split_sink(score_mod)
    if isinstance(pointwise, Bias) and sink is None:
        # One additive term: SDPA takes it as a float mask and never holds the scores.
        added = pointwise(torch.zeros((), dtype=q.dtype, device=q.device), b, h, i, j)
        hidden = torch.full((), -torch.inf, dtype=q.dtype, device=q.device)
        return nn.functional.scaled_dot_product_attention(q, k, v, torch.where(visible, added.to(q.dtype), hidden), scale=scale)
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if pointwise is not None:
        scores = pointwise(scores, b, h, i, j)
    # A row of -inf only has no softmax: give it any scores, and no weights.
    scores = scores.masked_fill(~visible, -torch.inf).masked_fill(~visible.any(dim=-1, keepdim=True), 0)
    if sink is not None:
        logits = Captured.of(sink.logits).tensor.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, logits], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return weights.masked_fill(~visible, 0).to(v.dtype) @ v
