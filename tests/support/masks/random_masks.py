"""Hypothesis strategies for masks: random trees over random patterns, for up to 16 positions, 2 batches and 4 heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from sparse_compile.masks import (
    Mask,
    causal,
    chunked,
    coarse,
    dilated,
    document,
    documents,
    explicit,
    full,
    neighborhood,
    of_queries,
    padding,
    per_head,
    periodic,
    prefix,
    repeated,
    shifted,
    sink,
    sliding_window,
    strided,
    within,
)

POSITIONS, BATCH, HEADS = 16, 2, 4


@dataclass(frozen=True)
class Shape:
    """The shape of an attention that every random mask fits."""

    q_len: int
    kv_len: int
    q_offset: int

    def dense(self, mask: Mask) -> Tensor:
        return mask.dense(self.q_len, self.kv_len, q_offset=self.q_offset, batch=BATCH, heads=HEADS)


shapes = st.builds(Shape, q_len=st.integers(1, 12), kv_len=st.integers(1, POSITIONS), q_offset=st.integers(0, 4))
small = st.integers(1, 9)


@st.composite
def _tensors(draw: st.DrawFn, below: int, *sizes: SearchStrategy[int]) -> Tensor:
    """Draw integer tensors of random shape. Their entries come from a drawn seed, because drawing each entry is slow."""
    shape = [draw(size) for size in sizes]
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))


@st.composite
def _neighborhoods(draw: st.DrawFn) -> Mask:
    grid = draw(st.sampled_from([(16,), (11,), (4, 4), (2, 8), (8, 2), (3, 5), (2, 2, 4), (4, 2, 2), (2, 3, 3)]))
    dilation = tuple(draw(st.integers(1, min(size, 4))) for size in grid)
    kernel = tuple(draw(st.integers(1, size // step)) for size, step in zip(grid, dilation, strict=True))
    back = tuple(draw(st.booleans()) for _ in grid)
    stride = tuple(draw(st.integers(1, width)) for width in kernel)
    return neighborhood(grid, kernel, dilation, back, stride)


@st.composite
def trees(draw: st.DrawFn, depth: int, leaves: SearchStrategy[Mask]) -> Mask:
    """Draw trees of ``&``, ``|``, ``~`` over ``leaves``, up to ``depth`` operators deep."""
    # Draw the operator first. With a one_of over all patterns and operators, only one tree in five would have an operator.
    match draw(st.sampled_from("&|~&|.")) if depth else ".":
        case "&":
            return draw(trees(depth - 1, leaves)) & draw(trees(depth - 1, leaves))
        case "|":
            return draw(trees(depth - 1, leaves)) | draw(trees(depth - 1, leaves))
        case "~":
            return ~draw(trees(depth - 1, leaves))
        case _:
            return draw(leaves)


_batch, _one = st.sampled_from([1, BATCH]), st.just(1)
_positions = st.just(POSITIONS)
_runs = _tensors(4, _batch, _positions).map(lambda steps: steps.eq(0).cumsum(1))
_left = _tensors(POSITIONS + 1, _batch, _one).map(lambda first: torch.arange(POSITIONS) >= first)
_plain: SearchStrategy[Mask] = st.one_of(
    st.sampled_from([causal, full, ~full]),
    st.builds(sink, small),
    st.builds(sliding_window, small),
    st.builds(chunked, small),
    st.builds(strided, small, offset=st.integers(0, 3)),
    st.builds(dilated, st.integers(1, 4), st.integers(1, 4)),
    st.builds(prefix, st.one_of(st.integers(0, 9), _tensors(10, _batch))),
    st.builds(document, st.one_of(_runs, _tensors(3, _batch, _positions))),
    st.builds(padding, st.one_of(_left, _tensors(2, _batch, _positions).map(torch.Tensor.bool))),
    _neighborhoods(),
)
_inside = trees(1, _plain)
_starts = _runs.map(lambda ids: torch.searchsorted(ids, ids))
patterns: SearchStrategy[Mask] = st.one_of(
    *[_plain] * 3,
    st.builds(coarse, _inside, q=small, kv=small),
    st.builds(shifted, _inside, q=small, kv=small),
    st.builds(of_queries, _inside),
    st.builds(periodic, _inside, small),
    st.builds(repeated, _inside, small),
    st.builds(within, _inside, st.one_of(small, _starts)),
    st.builds(documents, _tensors(3, _batch, _positions), _tensors(3, _batch, _positions)),
)
_all_or = {size: st.sampled_from([1, size]) for size in (HEADS, POSITIONS)}
explicits: SearchStrategy[Mask] = st.builds(
    explicit, _tensors(2, _batch, _all_or[HEADS], _all_or[POSITIONS], _all_or[POSITIONS]).map(torch.Tensor.bool)
)


_lists = st.sampled_from([1, 2, HEADS]).flatmap(lambda n: st.lists(trees(2, patterns), min_size=n, max_size=n))
_shared = st.lists(trees(2, patterns), min_size=2, max_size=2).map(lambda two: [two[0], two[1], two[0], two[1]])
per_heads: SearchStrategy[Mask] = st.builds(per_head, st.one_of(_lists, _shared))
masks = trees(4, st.sampled_from([patterns, patterns, patterns, per_heads, explicits]).flatmap(lambda leaves: leaves))
