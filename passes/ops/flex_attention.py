"""FlexAttention as a lowered call runs it. The only file that touches its private surface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from sparse_compile.masks import Mask, ScoreMod
from sparse_compile.passes.ops.block_tables import bind, tensor_names, transpose_tables
from sparse_compile.passes.ops.materialize import Lookups
from sparse_compile.passes.ops.reference_attention import bind_scores, score_tensor_names, split_sink
from sparse_compile.passes.storage.graph_text import rides_in_graphs
from sparse_compile.passes.torch_private import flex_attention_op


@rides_in_graphs
@dataclass(frozen=True)
class Spec:
    """All that the kernel of a call is generated from, besides its operands.

    ``heads`` is the number of query heads if the mask tells heads apart, else 1. ``block`` holds the queries and keys of a
    table block. ``options`` are FlexAttention's kernel options. ``group`` query heads are folded into the rows of their KV
    head, so that a decode step takes any group size and tables for each KV head. ``starts`` are the text positions of the
    first query and key where they are known; None takes them from tensors. ``gradients`` prepares for a backward pass.
    """

    mask: Mask
    heads: int
    scale: float
    score_mod: ScoreMod | None
    block: tuple[int, int]
    options: tuple[tuple[str, Any], ...] = ()
    group: int = 1
    starts: tuple[int, int] | None = None
    gradients: bool = False


class FlexAttention(nn.Module):
    """Attention by a FlexAttention kernel over prepared block tables."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        prepared: list[Tensor],
        mask_captures: tuple[Tensor, ...],
        *captures: Tensor,
    ) -> Tensor:
        """``[B, Hq, Q, Dv]``; a query that sees no key gives zeros."""
        spec = self.spec
        first_query, first_key, *tables = prepared
        spread = spec.mask.for_heads(spec.heads) if spec.heads > 1 else spec.mask
        names = tensor_names(spec.mask)  # in the order of the captures: spreading a mask over heads may change it
        mods, sink = split_sink(spec.score_mod)
        of_mask, of_scores = Lookups(mask_captures), Lookups(captures[: len(score_tensor_names(mods))])
        batch, heads, q_len, _ = q.shape
        group, starts = spec.group, spec.starts
        # Captured positions cost a load for every pair; known ones are part of the kernel.
        positions = () if starts is not None else (first_query, first_key)

        def place(h: Tensor, i: Tensor, j: Tensor, given_positions: tuple[Tensor, ...]) -> tuple[Any, Any, Any, Any, Any]:
            """Head and text positions of a pair, and the positions of the first query and key."""
            if group > 1:  # row ``g * q_len + i`` of KV head ``h`` is query ``i`` of head ``h * group + g``
                h, i = h * group + i // q_len, i % q_len if q_len > 1 else i * 0
            if starts is not None:
                return h, i + starts[0], j + starts[1], first_query, first_key
            q_start, kv_start = given_positions
            return h, i + q_start[0], j + kv_start[0], q_start, kv_start

        def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor, *tensors: Tensor) -> Tensor:
            h, i, j, q_start, kv_start = place(h, i, j, tensors[: len(positions)])
            visible: Tensor = bind(spread, names, of_mask.read(tensors[len(positions) :]), q_start, kv_start)(b, h, i, j)
            return visible

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *tensors: Tensor) -> Tensor:
            h, i, j, q_start, kv_start = place(h, i, j, tensors[: len(positions)])
            mod = bind_scores(mods, of_scores.read(tensors[len(positions) :]), q_start, kv_start)
            assert mod is not None
            changed: Tensor = mod(score, b, h, i, j)
            return changed

        if group > 1:
            q = q.reshape(batch, heads // group, group * q_len, q.shape[3])
        out, lse = _flex(
            q,
            k,
            v,
            scale=spec.scale,
            tables=tables,
            block=spec.block,
            options=dict(spec.options),
            mask_mod=mask_mod,
            mask_captures=(*positions, *of_mask.tensors),
            score_mod=score_mod if mods is not None else None,
            score_captures=(*positions, *of_scores.tensors) if mods is not None else (),
            needs_lse=sink is not None,
            gradients=spec.gradients,
        )
        if group > 1:
            out, lse = out.reshape(batch, heads, q_len, out.shape[3]), lse.reshape(batch, heads, q_len)
        if sink is None:
            return out
        # A key with this logit and no value takes its share of the softmax: out * exp(lse) / (exp(lse) + exp(logit)).
        logits = captures[-1].float().view(1, -1, 1)
        return (out * torch.sigmoid(lse - logits).unsqueeze(-1)).to(out.dtype)

    def extra_repr(self) -> str:
        return f"{self.spec.mask}, scale={self.spec.scale}, score_mod={self.spec.score_mod}"


def _identity(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return score


def _flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    tables: list[Tensor],
    block: tuple[int, int],
    options: dict[str, Any],
    mask_mod: Any,
    mask_captures: tuple[Tensor, ...],
    score_mod: Any,
    score_captures: tuple[Tensor, ...],
    needs_lse: bool,
    gradients: bool,
) -> tuple[Tensor, Tensor]:
    """The call of the higher-order op; the public wrapper specialises dynamic lengths up to torch 2.13 (pytorch#189952)."""
    num, index, *full = tables
    full_num, full_index = full or (None, None)
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
        columns = (k.shape[2] + block[1] - 1) // block[1]
        names = ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")
        for name, table in zip(names, transpose_tables(tables, columns), strict=True):
            setattr(block_mask, name, table)
    if q.device.type == "cpu":
        # The C++ template unpacks the layout of a 4-D buffer and fails on view(linear(x)); a product makes a buffer, and
        # Inductor fuses it into whatever computed q.
        q, scale = q * scale, 1.0
    elif options.get("BACKEND") == "TRITON_DECODE":
        # The decode template views q anew and forgets where a view began: of ``q[:, 2:4]`` it silently reads ``q[:, :2]``
        # (torch 2.11). A product makes a buffer; by a half, which rounds nothing.
        q, scale = q * 0.5, scale * 2
    settings = {
        "PRESCALE_QK": False,
        "ROWS_GUARANTEED_SAFE": False,
        "BLOCKS_ARE_CONTIGUOUS": False,
        "WRITE_DQ": True,
        "OUTPUT_LOGSUMEXP": needs_lse or gradients,
        "OUTPUT_MAX": False,
    }
    out, lse, _ = flex_attention_op()(
        q, k, v, score_mod or _identity, block_mask.as_tuple(), scale, settings | options, score_captures, mask_captures
    )
    # The raw op gives the log-sum-exp to the base 2.
    return out, lse * 0.6931471805599453 if needs_lse else lse
