"""Masks over keys that are not in text order: keys in a ring, behind padding, or in a chunk that attends to itself."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparse_compile.masks import Mask, causal, chunked, padding, per_head, prefix, sink, sliding_window, strided
from sparse_compile.masks.analysis import visible_past
from sparse_compile.masks.patterns.remapped import relaxed, remapped

INNER = [
    causal,
    causal & (sink(2) | sliding_window(3)),
    causal & chunked(4),
    causal & ~sliding_window(2),
    causal & strided(3),
    causal & padding([[i % 4 != 1 for i in range(40)]]),
    per_head([causal, causal & sliding_window(2)]),
]


def positions(draw: st.DrawFn, length: int, *, ordered: bool) -> list[int]:
    """Draw distinct positions below 40, some of them missing (-1)."""
    distinct: list[int] = draw(st.lists(st.integers(0, 39), min_size=length, max_size=length, unique=True))
    distinct = sorted(distinct) if ordered else distinct
    present = draw(st.lists(st.booleans(), min_size=length, max_size=length))
    return [at if is_present else -1 for at, is_present in zip(distinct, present, strict=True)]


@st.composite
def placements(draw: st.DrawFn) -> tuple[Mask, list[list[int]], list[list[int]], bool]:
    ordered = draw(st.booleans())
    q_len, kv_len = draw(st.integers(1, 9)), draw(st.integers(1, 17))
    rows = range(draw(st.integers(1, 2)))
    queries = [positions(draw, q_len, ordered=True) for _ in rows]
    keys = [positions(draw, kv_len, ordered=ordered) for _ in rows]
    return draw(st.sampled_from(INNER)), queries, keys, ordered


def pair_by_pair(mask: Mask, queries: list[list[int]], keys: list[list[int]], heads: int) -> Tensor:
    """Look up every pair by itself in the dense mask of the whole text."""
    dense = mask.dense(40, 40, heads=heads)[0]
    rows = [
        [[[i >= 0 and j >= 0 and bool(dense[h, i, j]) for j in js] for i in qs] for h in range(heads)]
        for qs, js in zip(queries, keys, strict=True)
    ]
    return torch.tensor(rows)


@given(placements())
def test_pairs_are_those_of_the_text(case: tuple[Mask, list[list[int]], list[list[int]], bool]) -> None:
    mask, queries, keys, ordered = case
    heads = mask.sizes()[1]
    stored = remapped(mask, queries, keys, ordered=ordered)
    got = stored.dense(len(queries[0]), len(keys[0]), batch=len(queries), heads=heads)
    assert torch.equal(got, pair_by_pair(mask, queries, keys, heads))


@given(placements(), st.integers(1, 4), st.integers(1, 4))
def test_blocks_lose_nothing_and_full_blocks_are_full(
    case: tuple[Mask, list[list[int]], list[list[int]], bool], q_block: int, kv_block: int
) -> None:
    mask, queries, keys, ordered = case
    heads = mask.sizes()[1]
    stored = remapped(mask, queries, keys, ordered=ordered)
    shape = (len(queries[0]), len(keys[0]))
    dense = stored.dense(*shape, batch=len(queries), heads=heads)
    table = stored.block_mask(*shape, batch=len(queries), heads=heads, block_size=(q_block, kv_block))
    assert table.full_kv_num_blocks is not None and table.full_kv_indices is not None
    for b, h, i, j in dense.nonzero().tolist():
        row, column = i // q_block, j // kv_block
        partial = table.kv_indices[b, h, row, : table.kv_num_blocks[b, h, row]].tolist()
        whole = table.full_kv_indices[b, h, row, : table.full_kv_num_blocks[b, h, row]].tolist()
        assert column in partial + whole
    for b in range(len(queries)):
        for h in range(heads):
            for row in range(table.kv_num_blocks.shape[2]):
                for column in table.full_kv_indices[b, h, row, : table.full_kv_num_blocks[b, h, row]].tolist():
                    block = dense[b, h, row * q_block : (row + 1) * q_block, column * kv_block : (column + 1) * kv_block]
                    assert bool(block.all())


def test_ordered_tables_are_tight() -> None:
    at = [list(range(4096, 4096 + 512))]
    stored = remapped(causal & sliding_window(64), at, [[*range(64), *range(4000, 4608)]], ordered=True)
    table = stored.block_mask(512, 672, block_size=32)
    assert table.full_kv_num_blocks is not None
    assert int(table.kv_num_blocks.max() + table.full_kv_num_blocks.max()) <= 5


@pytest.mark.parametrize("start", [0, 1, 5])
def test_a_relaxed_chunk_sees_itself_and_what_the_position_before_it_saw(start: int) -> None:
    mask = causal & relaxed(sink(1) | sliding_window(2), [start])
    got = mask.dense(9, 9)[0, 0]
    for i in range(9):
        for j in range(9):
            assert bool(got[i, j]) == (j <= i and (j >= start or j < 1 or start - 1 - 2 < j))


def test_relaxed_blocks_lose_nothing() -> None:
    mask = causal & relaxed(sink(1) | sliding_window(5), [37, 11])
    dense = mask.dense(64, 64, batch=2)
    table = mask.block_mask(64, 64, batch=2, block_size=8).to_dense()
    assert bool((table.repeat_interleave(8, 2).repeat_interleave(8, 3) >= dense).all())


def test_masks_out_of_order_are_values() -> None:
    mask = remapped(causal & relaxed(sink(1), [3]), [[1, 2]], [[2, -1, 0]])
    assert Mask.from_json(mask.to_json()) == mask
    assert eval(repr(mask), {"causal": causal, "sink": sink, "remapped": remapped, "relaxed": relaxed}) == mask


@pytest.mark.parametrize(
    ("mask", "past"),
    [
        (sink(4) | sliding_window(16), (4, 16)),
        (sliding_window(8), (0, 8)),
        (sink(3), (3, 0)),
        (chunked(10), (0, 10)),
        (prefix(5) | sliding_window(2), (5, 2)),
        (sliding_window(7) & padding([[True] * 9]), (0, 7)),
        ((sink(2) | sliding_window(3)) & strided(1), (2, 3)),
        (sink(4) | sliding_window(16) | sliding_window(3), (4, 16)),
        (causal, None),
        (strided(3), None),
        (sink(600) | sliding_window(600), None),
    ],
    ids=str,
)
def test_a_mask_is_asked_what_it_needs_of_the_past(mask: Mask, past: tuple[int, int] | None) -> None:
    assert visible_past(mask, 1000) == past


@pytest.mark.parametrize("mask", [sink(4) | sliding_window(16), chunked(12), prefix(9) | sliding_window(5), sliding_window(3)])
def test_what_is_kept_is_all_that_is_seen(mask: Mask) -> None:
    past = visible_past(mask, 200)
    assert past is not None
    kept = causal & (sink(past.sink) | sliding_window(past.recent)) if past.sink else causal & sliding_window(past.recent)
    assert not bool(((causal & mask).dense(200, 200) & ~kept.dense(200, 200)).any())
