"""Run a lowered attention call with FlexAttention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from sparse_compile.masks import Mask, ScoreMod
from sparse_compile.passes.ops.block_tables import bind, tensor_names, transpose_tables
from sparse_compile.passes.ops.materialize import Lookups, materialize
from sparse_compile.passes.ops.reference_attention import bind_scores, score_tensor_names, split_sink
from sparse_compile.passes.storage.graph_text import rides_in_graphs
from sparse_compile.passes.torch_private import flex_attention_op


@rides_in_graphs
@dataclass(frozen=True)
class Spec:
    """Everything that the kernel of a call is generated from, besides its operands.

    ``heads`` is the number of query heads if the mask differs between them, else 1. ``block`` holds the queries and keys of a
    table block. ``options`` are FlexAttention's kernel options. ``group`` query heads are folded into the rows of their KV
    head, so that a decode step supports any group size and needs tables only for KV heads. ``starts`` are the text positions
    of the first query and key; None means they are read from tensors. ``gradients`` prepares for a backward pass.
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
        """Return ``[B, Hq, Q, Dv]``. A query that sees no key gives zeros."""
        spec, (batch, heads, q_len, dim) = self.spec, q.shape
        pointwise, sink = split_sink(spec.score_mod)
        mods = _mods(spec, pointwise, prepared[0], prepared[1], mask_captures, captures, q_len)
        if spec.group > 1:
            q = q.reshape(batch, heads // spec.group, spec.group * q_len, dim)
        out, lse = _flex(q, k, v, spec, prepared[2:], mods, needs_lse=sink is not None)
        if spec.group > 1:
            out, lse = out.reshape(batch, heads, q_len, out.shape[3]), lse.reshape(batch, heads, q_len)
        if sink is None:
            return out
        # A sink is a key with this logit and a value of 0. It scales the output by exp(lse) / (exp(lse) + exp(logit)).
        logits = captures[-1].float().view(1, -1, 1)
        return (out * torch.sigmoid(lse - logits).unsqueeze(-1)).to(out.dtype)

    def extra_repr(self) -> str:
        return f"{self.spec.mask}, scale={self.spec.scale}, score_mod={self.spec.score_mod}"


class _Mods(NamedTuple):
    """The functions that FlexAttention calls for every pair of query and key, and the tensors that they capture."""

    mask_mod: Callable[..., Tensor]
    mask_captures: tuple[Tensor, ...]
    score_mod: Callable[..., Tensor]
    score_captures: tuple[Tensor, ...]


def _mods(
    spec: Spec,
    scores: ScoreMod | None,
    first_query: Tensor,
    first_key: Tensor,
    mask_captures: tuple[Tensor, ...],
    captures: tuple[Tensor, ...],
    q_len: int,
) -> _Mods:
    """Build the mods of ``spec`` for ``q_len`` queries, over the tensors of the running graph."""
    spread = spec.mask.for_heads(spec.heads) if spec.heads > 1 else spec.mask
    names = tensor_names(spec.mask)  # not of ``spread``, in which the captures may have another order
    of_mask, of_scores = Lookups(mask_captures), Lookups(captures[: len(score_tensor_names(scores))])
    group, starts = spec.group, spec.starts
    # Captured positions cost a load for every pair. Known positions are constants of the kernel.
    positions = () if starts is not None else (first_query, first_key)

    def place(h: Tensor, i: Tensor, j: Tensor, captured: tuple[Tensor, ...]) -> tuple[Any, Any, Any, Any, Any]:
        """Return the head and the text positions of a pair, and the positions of the first query and key."""
        if group > 1:  # row ``g * q_len + i`` of KV head ``h`` is query ``i`` of head ``h * group + g``
            h, i = h * group + i // q_len, i % q_len if q_len > 1 else i * 0
        if starts is not None:
            return h, i + starts[0], j + starts[1], first_query, first_key
        q_start, kv_start = captured
        return h, i + q_start[0], j + kv_start[0], q_start, kv_start

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor, *tensors: Tensor) -> Tensor:
        h, i, j, q_start, kv_start = place(h, i, j, tensors[: len(positions)])
        visible: Tensor = bind(spread, names, of_mask.read(tensors[len(positions) :]), q_start, kv_start)(b, h, i, j)
        return visible

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, *tensors: Tensor) -> Tensor:
        h, i, j, q_start, kv_start = place(h, i, j, tensors[: len(positions)])
        mod = bind_scores(scores, of_scores.read(tensors[len(positions) :]), q_start, kv_start)
        assert mod is not None
        changed: Tensor = mod(score, b, h, i, j)
        return changed

    if scores is None:
        return _Mods(mask_mod, (*positions, *of_mask.tensors), _identity, ())
    return _Mods(mask_mod, (*positions, *of_mask.tensors), score_mod, (*positions, *of_scores.tensors))


def _identity(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
    return score


def _flex(
    q: Tensor, k: Tensor, v: Tensor, spec: Spec, tables: list[Tensor], mods: _Mods, *, needs_lse: bool
) -> tuple[Tensor, Tensor]:
    """Call the higher-order op. The public wrapper specializes on dynamic lengths up to torch 2.13 (pytorch#189952)."""
    block_mask = _block_mask(q.shape[2], k.shape[2], spec, tables, mods.mask_mod)
    q, scale = _as_buffer(q, spec)
    settings = {
        "PRESCALE_QK": False,
        "ROWS_GUARANTEED_SAFE": False,
        "BLOCKS_ARE_CONTIGUOUS": False,
        "WRITE_DQ": True,
        "OUTPUT_LOGSUMEXP": needs_lse or spec.gradients,
        "OUTPUT_MAX": False,
    }
    options = settings | dict(spec.options)
    captures = (mods.score_captures, mods.mask_captures)
    out, lse, _ = flex_attention_op()(q, k, v, mods.score_mod, block_mask.as_tuple(), scale, options, *captures)
    # The higher-order op returns the log-sum-exp to the base 2.
    return out, lse * 0.6931471805599453 if needs_lse else lse


def _block_mask(q_len: int, kv_len: int, spec: Spec, tables: list[Tensor], mask_mod: Callable[..., Tensor]) -> BlockMask:
    """Return the prepared tables as a ``BlockMask``."""
    num, index, *full = tables
    full_num, full_index = full or (None, None)
    block_mask = BlockMask.from_kv_blocks(
        num,
        index,
        full_num,
        full_index,
        BLOCK_SIZE=spec.block,
        mask_mod=mask_mod,
        seq_lengths=(q_len, kv_len),
        compute_q_blocks=False,
    )
    if spec.gradients:
        # AOTAutograd in torch 2.11 cannot trace ``compute_q_blocks``, so our own op lists the blocks by key block.
        columns = (kv_len + spec.block[1] - 1) // spec.block[1]
        names = ("q_num_blocks", "q_indices", "full_q_num_blocks", "full_q_indices")
        for name, table in zip(names, transpose_tables(tables, columns), strict=True):
            setattr(block_mask, name, table)
    return block_mask


def _as_buffer(q: Tensor, spec: Spec) -> tuple[Tensor, float]:
    """Return the queries, in a buffer of their own where a template needs one, and the scale that is still to be applied."""
    if q.device.type == "cpu":
        # The C++ template unpacks the layout of a 4-D buffer and fails on view(linear(x)). A product makes a buffer, and
        # Inductor fuses it into the kernel that computes q. The template also takes the channels of a query to be neighbors in
        # memory, and silently reads other numbers if they are not (torch 2.13).
        return (q if q.stride(-1) == 1 else materialize(q)) * spec.scale, 1.0
    if dict(spec.options).get("BACKEND") == "TRITON_DECODE":
        # The decode template creates a new view of q and ignores its storage offset: for ``q[:, 2:4]`` it silently reads
        # ``q[:, :2]`` (torch 2.11). A product makes a buffer. The factor 0.5 rounds nothing. With several queries, Inductor
        # may still change the order of the strides of that buffer after the template has read them, so an op makes it.
        return (q * 0.5, spec.scale * 2) if q.shape[2] == spec.group else (materialize(q), spec.scale)
    return q, spec.scale
