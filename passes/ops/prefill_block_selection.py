"""Select blocks of keys in a prefill, by the mean of each block of queries. The mean is an estimate, so this is lossy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_compile.masks import Mask, causal, sliding_window
from sparse_compile.masks.block_mask import query_blocks, split_tables
from sparse_compile.masks.patterns.per_head import unions_by_kv_head
from sparse_compile.masks.patterns.remapped import Remapped
from sparse_compile.masks.patterns.tensor import Explicit
from sparse_compile.masks.selection.page_scoring import (
    HIDDEN,
    KEPT,
    OFFERED,
    alive,
    choose,
    pool,
    score_keys,
    score_summaries,
    summarize,
)
from sparse_compile.masks.selection.page_topk import PageTopK, offered, selector_of, static_part
from sparse_compile.passes.ops.block_tables import BLOCK, bind, starts, tensor_names
from sparse_compile.passes.ops.structured import StructuredOp

T = TypeVar("T")

NUMBERS_AT_ONCE = 1 << 28  # estimated scores in memory at once


class SelectBlocks(NamedTuple, Generic[T]):
    """Queries ``q`` ``[B, Hq, Q, D]`` that select blocks of keys ``k`` ``[B, Hkv, KV, D]``, by the mean of each query block.

    Always selected are the blocks that the static part of the mask shows to any query of a block, and the blocks of the queries
    themselves. ``heads`` is the number of query heads if the mask differs between them, else 1. All query heads of a KV head
    share one selection. ``captures`` are the tensors that the mask reads. ``width`` and ``split`` are those of block tables.
    """

    q: T
    k: T
    mask: Mask
    heads: int
    q_start: int
    kv_start: int
    q_shift: T | None
    captures: list[T]
    width: int
    split: bool


def _select(operands: SelectBlocks[Tensor]) -> list[Tensor]:
    q, k, mask, heads, q_start, kv_start, q_shift, captures, width, split = operands
    first_query, first_key = starts(q_start, kv_start, q_shift, q.device)
    bound = bind(mask, tensor_names(mask), captures, first_query, first_key)
    group, kv_heads = q.shape[1] // k.shape[1], k.shape[1]
    if heads == 1:
        chosen = [_choose(q, k, bound, first_query, first_key, width, split)]
    else:
        chosen = []
        for kv_head, whole in enumerate(unions_by_kv_head(bound, heads, kv_heads)):
            own = q[:, kv_head * group : (kv_head + 1) * group], k[:, kv_head : kv_head + 1]
            chosen.append(_choose(*own, whole, first_query, first_key, width, split))
    tables = [torch.cat(parts, dim=1).repeat_interleave(group, dim=1) for parts in zip(*chosen, strict=True)]
    return [first_query.int(), first_key.int(), *tables]


def _shapes(operands: SelectBlocks[Tensor]) -> list[Tensor]:
    q, width, split = operands.q, operands.width, operands.split
    table = (q.shape[0], q.shape[1], -(-q.shape[2] // BLOCK))
    sizes: list[Any] = [(1,), (1,)] + [table, (*table, width)] * (2 if split else 1)
    return [torch.empty(size, dtype=torch.int32, device=q.device) for size in sizes]


# Returns the positions of the first query and key ``[1]``, then the tables of all query heads as ``block_tables_op``; int32.
select_blocks = StructuredOp("select_blocks", SelectBlocks, _select, fake=_shapes)


def _choose(
    q: Tensor, k: Tensor, mask: Mask, first_query: Tensor, first_key: Tensor, width: int, split: bool
) -> tuple[Tensor, ...]:
    """Return the block tables of some KV heads under one mask."""
    selector = selector_of(mask)
    batch, kv_heads, kv_len, _ = k.shape
    pages = -(-kv_len // BLOCK)
    lo, hi = query_blocks(q.shape[2], BLOCK, q.device)
    places = _Places.of(mask, q.shape[2], kv_len, first_query, first_key)
    valid = places.keys
    means = _means(q, kv_heads, lo.numel(), places.queries)  # [B, H, G, rows, D]
    described = None if selector is None else _described(k, valid, selector)
    compared = pages if described is None else described.shape[2]
    step = max(1, NUMBERS_AT_ONCE // (batch * kv_heads * means.shape[2] * compared))
    runs = []
    for at in range(0, lo.numel(), step):
        rows = slice(at, at + step)
        run = lo[rows] + first_query, hi[rows] + first_query
        may, must = (part.bounds(*run) for part in (offered(mask), static_part(mask)))
        maybe, kept, surely = (((x - first_key).clamp(0, kv_len)) for x in (may.maybe, must.maybe, may.surely))
        start = torch.arange(pages, device=q.device) * BLOCK
        classes = torch.where(maybe.overlap(start, start + BLOCK) > 0, OFFERED, HIDDEN)
        own = (places.own.bounds(*run).maybe - first_key).clamp(0, kv_len).overlap(start, start + BLOCK) > 0
        keeps = kept.overlap(start, start + BLOCK) > 0 if selector is not None else classes == OFFERED
        classes = torch.where(keeps | own, KEPT, classes)
        classes = classes.expand(batch, kv_heads, *classes.shape[-2:])
        scores = torch.zeros(classes.shape, device=q.device)
        if selector is not None and described is not None:
            scores = _scores(means[:, :, :, rows], described, valid, selector)
        budget = pages if selector is None else -(-selector.tokens // BLOCK)
        count, index = choose(scores, classes, budget, width)
        begin = index * BLOCK
        full = surely.overlap(begin, begin + BLOCK) == BLOCK
        runs.append(split_tables(index, count, full) if split else (count, index))
    return tuple(torch.cat(parts, dim=2) for parts in zip(*runs, strict=True))


def _means(q: Tensor, kv_heads: int, rows: int, valid: Tensor | None) -> Tensor:
    """Return the mean of the queries of each block, without those that are not ``valid``: fp32 ``[B, Hkv, G, rows, D]``."""
    q_len, room = q.shape[2], rows * BLOCK - q.shape[2]
    if valid is None:
        counts = (q_len - torch.arange(rows, device=q.device) * BLOCK).clamp(max=BLOCK).view(1, 1, rows, 1)
    else:
        q = q * valid[:, None, :, None]
        counts = pad(valid, (0, room)).unflatten(1, (rows, BLOCK)).sum(dim=2).clamp(min=1)[:, None, :, None]
    total = (pad(q, (0, 0, 0, room)) if room else q).unflatten(2, (rows, BLOCK)).sum(dim=3, dtype=torch.float32)
    means: Tensor = (total / counts).unflatten(1, (kv_heads, -1))
    return means


class _Places(NamedTuple):
    """Which keys ``[B|1, KV]`` and queries ``[B|1, Q]`` are not padding (None: all), and the mask of each query's own key."""

    keys: Tensor | None
    queries: Tensor | None
    own: Mask

    @classmethod
    def of(cls, mask: Mask, q_len: int, kv_len: int, first_query: Tensor, first_key: Tensor) -> _Places:
        """The places of the queries and keys of a call. What does not see itself is padding.

        An explicit mask does not say what is padding, and a mask without tensors has none. Where tables say which text
        positions queries and keys have, a query is not at the place of a key.
        """
        seen, device = offered(mask), first_key.device
        table = next((node for node in seen.walk() if isinstance(node, Remapped)), None)
        own = causal & sliding_window(1)
        if table is not None:
            own = replace(table, mask=own)
        if not seen.captures() or any(isinstance(node, Explicit) for node in seen.walk()):
            return cls(None, None, own)
        keys = _see_themselves(_at_one_table(seen, "keys"), torch.arange(kv_len, device=device) + first_key)
        at = torch.arange(q_len, device=device) + first_query
        if table is not None:
            return cls(keys, _see_themselves(_at_one_table(seen, "queries"), at), own)
        return cls(keys, keys.index_select(1, (at - first_key).clamp(max=kv_len - 1)), own)


def _at_one_table(mask: Mask, side: str) -> Mask:
    """``mask`` between queries and keys that all are at the places of one table: that of the ``keys`` or of the ``queries``."""
    children = [_at_one_table(child, side) for child in mask.children()]
    rebuilt = mask.rebuild(children) if children else mask
    if isinstance(rebuilt, Remapped):
        return replace(rebuilt, queries=getattr(rebuilt, side), keys=getattr(rebuilt, side))
    return rebuilt


def _see_themselves(mask: Mask, at: Tensor) -> Tensor:
    """Whether each place of ``at`` ``[n]`` sees itself under ``mask``: bool ``[B|1, n]``."""
    b = torch.arange(mask.sizes()[0], device=at.device).view(-1, 1)
    seen: Tensor = mask(b, b * 0, at, at).expand(b.shape[0], at.numel())
    return seen


def _described(k: Tensor, valid: Tensor | None, selector: PageTopK) -> Tensor:
    """Return what queries are scored against: summaries of logical pages or the keys themselves, padded to whole blocks."""
    room = -k.shape[2] % BLOCK
    if room:
        valid = torch.ones(1, k.shape[2], dtype=torch.bool, device=k.device) if valid is None else valid
        k, valid = pad(k, (0, 0, 0, room)), pad(valid, (0, room))
    return k if selector.score == "keys" else summarize(k, valid, selector.page, selector.score)


def _scores(means: Tensor, described: Tensor, valid: Tensor | None, selector: PageTopK) -> Tensor:
    """Return the scores ``[B, Hkv, rows, blocks]`` of mean queries ``[B, Hkv, G, rows, D]``."""
    group, rows = means.shape[2:4]
    queries = means.transpose(2, 3).flatten(2, 3)
    if selector.score == "keys":
        room = described.shape[2]
        seen = None if valid is None else pad(valid, (0, room - valid.shape[1]))
        scores = score_keys(queries, described, seen, selector.page)
    else:
        scores = score_summaries(queries, described, selector.score)
    has_token = None
    if valid is not None:
        has_token = alive(pad(valid, (0, -valid.shape[1] % BLOCK)), selector.page)[:, None, None]
    return pool(scores.unflatten(2, (rows, group)), selector.group, BLOCK // selector.page, has_token)
