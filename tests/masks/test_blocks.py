"""Block tables miss no visible pair, show no hidden pair, and list no unnecessary blocks."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from sparse_compile.masks import (
    Captured,
    Mask,
    causal,
    chunked,
    coarse,
    dilated,
    document,
    explicit,
    full,
    neighborhood,
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
from sparse_compile.masks.block_mask import block_tables, live_width, query_blocks
from support.masks.catalog import ROWS as SHORT
from support.masks.catalog import RUNS, STREAMING, TIGHT
from support.masks.row import Row
from support.oracles.masks import Block, as_a_kernel_sees, blocks_where, full_blocks, pairs, partial_blocks

BLOCK_SIZES = [(1, 1), (4, 4), (3, 5), (5, 3), (4, 1), (64, 128)]
every_row = pytest.mark.parametrize("row", SHORT, ids=lambda row: row.name)
every_tight_row = pytest.mark.parametrize("row", TIGHT, ids=lambda row: row.name)
both_offsets = pytest.mark.parametrize("q_offset", [0, 3])

IDS = torch.arange(700).div(130, rounding_mode="floor").view(1, -1)
LONG: dict[str, tuple[Mask, bool]] = {  # a mask for 500 queries and keys, and whether its tables are tight
    "causal": (causal, True),
    "full": (full, True),
    "sink": (causal & sink(130), True),
    "sliding_window": (causal & sliding_window(100), True),
    "streaming": (causal & (sink(4) | sliding_window(128)), True),
    "chunked": (causal & chunked(96), True),
    "prefix": (causal | prefix([200, 300]), True),
    "document": (causal & document(IDS), True),
    "document per batch": (document(torch.cat([IDS, IDS.flip(1)])), True),
    "padding left": (causal & padding([[j >= 150 for j in range(500)], [True] * 500]), True),
    "padding right": (padding([[j < 300 for j in range(500)]]), True),
    "window of both sides": (dilated(100, 1), True),
    "neighborhood": (neighborhood(500, 101), True),
    "neighborhood, causal": (neighborhood(500, 100, causal=True), True),
    "per_head": (per_head([causal, causal & sliding_window(64), causal, full]), True),
    "strided": (causal & strided(7), True),
    "dilated": (dilated(9, 30), True),
    "neighborhood, 2-D": (neighborhood((25, 20), (5, 7)), True),
    "neighborhood, 2-D, dilated and causal": (neighborhood((25, 20), (5, 3), (3, 4), (True, False)), True),
    "neighborhood, 3-D": (neighborhood((6, 9, 9), (3, 5, 3), (2, 1, 3), (False, True, False)), True),
    "explicit": (explicit(torch.rand(1, 2, 500, 500, generator=torch.Generator().manual_seed(0)) < 0.001), True),
    "strided far apart": (causal & strided(300, offset=40), True),
    "explicit rows": (explicit(torch.arange(500).view(1, 1, -1, 1) % 200 == 7), True),
    "padding with holes": (padding(torch.arange(500).view(1, -1) % 300 == 299), True),
    "coarse": (coarse(dilated(2, 2), q=70, kv=90), True),
    "periodic": (periodic(dilated(20, 1), 180), True),
    "repeated": (repeated(dilated(20, 1), 180), True),
    "within": (within(causal & sliding_window(30), 200), True),
    "shifted neighborhood": (shifted(neighborhood((19, 20), (5, 7), stride=(2, 3)), q=60, kv=60), True),
    "not document": (causal & ~document(IDS), False),
}
every_long_mask = pytest.mark.parametrize("name", LONG)


def block_mask(row: Row, block_size: tuple[int, int], q_offset: int = 0) -> BlockMask:
    return row.mask.block_mask(
        row.q_len, row.kv_len, q_offset=q_offset, batch=row.batch, heads=row.heads, block_size=block_size
    )


def tables_of(found: BlockMask) -> list[Tensor]:
    tables = (found.kv_num_blocks, found.kv_indices, found.full_kv_num_blocks, found.full_kv_indices)
    return [table for table in tables if table is not None]


def listed(found: BlockMask) -> set[Block]:
    return {*partial_blocks(found), *full_blocks(found)}


# -- soundness ------------------------------------------------------------------------------------------------------


@every_row
@both_offsets
def test_a_kernel_sees_what_the_oracle_says(row: Row, q_offset: int) -> None:
    expected = pairs(row, q_offset=q_offset)
    for block_size in BLOCK_SIZES:
        found = as_a_kernel_sees(block_mask(row, block_size, q_offset))
        torch.testing.assert_close(found, expected, msg=f"wrong with block size {block_size}")


@every_row
@both_offsets
def test_blocks_lose_nothing(row: Row, q_offset: int) -> None:
    dense = pairs(row, q_offset=q_offset)
    for block_size in BLOCK_SIZES:
        assert blocks_where(dense, block_size, torch.any) <= listed(block_mask(row, block_size, q_offset))


@every_row
@both_offsets
def test_full_blocks_are_wholly_visible(row: Row, q_offset: int) -> None:
    dense = pairs(row, q_offset=q_offset)
    for block_size in BLOCK_SIZES:
        assert blocks_where(dense, block_size, torch.all) >= set(full_blocks(block_mask(row, block_size, q_offset)))


@every_row
def test_no_block_is_listed_twice(row: Row) -> None:
    for block_size in BLOCK_SIZES:
        found = block_mask(row, block_size)
        assert len(partial_blocks(found)) + len(full_blocks(found)) == len(listed(found))


@every_row
def test_blocks_are_visited_in_order(row: Row) -> None:
    for block_size in BLOCK_SIZES:
        found = block_mask(row, block_size)
        assert (partial_blocks(found), full_blocks(found)) == (sorted(partial_blocks(found)), sorted(full_blocks(found)))


@every_row
def test_a_cut_off_key_block_is_never_full(row: Row) -> None:
    assert not [block for block in full_blocks(block_mask(row, (4, 4))) if (block[3] + 1) * 4 > row.kv_len]


@every_long_mask
@pytest.mark.parametrize("block_size", [128, (64, 128)], ids=str)
def test_a_kernel_sees_long_masks_as_they_are(name: str, block_size: int | tuple[int, int]) -> None:
    mask, _ = LONG[name]
    batch, heads = mask.sizes()
    found = mask.block_mask(480, 500, q_offset=7, block_size=block_size)
    torch.testing.assert_close(as_a_kernel_sees(found), mask.dense(480, 500, q_offset=7, batch=batch, heads=heads))


# -- tightness ------------------------------------------------------------------------------------------------------


@every_tight_row
@both_offsets
def test_tight_tables_list_only_blocks_with_a_visible_pair(row: Row, q_offset: int) -> None:
    dense = pairs(row, q_offset=q_offset)
    for block_size in BLOCK_SIZES:
        assert blocks_where(dense, block_size, torch.any) >= listed(block_mask(row, block_size, q_offset))


@every_tight_row
@both_offsets
def test_tight_tables_take_every_wholly_visible_block_as_full(row: Row, q_offset: int) -> None:
    dense = pairs(row, q_offset=q_offset)
    for block_size in BLOCK_SIZES:
        visible = blocks_where(dense, block_size, torch.all)
        whole = {block for block in visible if (block[3] + 1) * block_size[1] <= row.kv_len}
        assert whole <= set(full_blocks(block_mask(row, block_size, q_offset)))


@every_long_mask
@pytest.mark.parametrize("block_size", [128, (64, 128)], ids=str)
def test_long_tables_list_the_blocks_that_create_block_mask_lists(name: str, block_size: int | tuple[int, int]) -> None:
    mask, tight = LONG[name]
    found = mask.block_mask(500, 500, block_size=block_size)
    batch, heads = mask.sizes()
    slow = create_block_mask(found.mask_mod, batch, heads, 500, 500, device="cpu", BLOCK_SIZE=block_size)
    assert listed(found) == listed(slow) if tight else listed(found) >= listed(slow)


@pytest.mark.parametrize("name", [name for name, (_, tight) in LONG.items() if tight])
def test_tight_long_tables_take_as_full_what_create_block_mask_does(name: str) -> None:
    mask, _ = LONG[name]
    found = mask.block_mask(500, 500)
    batch, heads = mask.sizes()
    slow = create_block_mask(found.mask_mod, batch, heads, 500, 500, device="cpu")
    assert set(full_blocks(found)) >= set(full_blocks(slow))


def test_a_neighborhood_on_a_grid_skips_most_blocks() -> None:
    found = neighborhood((64, 64), (7, 7)).block_mask(4096, 4096)
    assert len(listed(found)) < 0.2 * (4096 / 128) ** 2


def test_a_window_of_video_lists_few_blocks() -> None:
    mask = neighborhood((16, 24, 32), (4, 8, 8), stride=(2, 4, 4))
    found = mask.block_mask(12_288, 12_288)
    assert len(listed(found)) < 0.13 * 96**2  # runs of whole lines are 27 % of all blocks


# -- the tables themselves ------------------------------------------------------------------------------------------


@every_row
def test_tables_are_int32(row: Row) -> None:
    assert {table.dtype for table in tables_of(block_mask(row, (4, 4)))} == {torch.int32}


@every_row
def test_index_tables_have_one_shape_and_stride(row: Row) -> None:
    _, indices, _, full_indices = tables_of(block_mask(row, (4, 4)))
    assert (indices.shape, indices.stride()) == (full_indices.shape, full_indices.stride())


@every_row
def test_tables_have_an_entry_per_batch_head_and_block(row: Row) -> None:
    shape = (row.batch, row.heads, 3, 4)
    assert [tuple(table.shape) for table in tables_of(block_mask(row, (4, 4)))] == [shape[:3], shape, shape[:3], shape]


@every_row
def test_indices_past_the_count_are_in_range(row: Row) -> None:
    _, indices, _, full_indices = tables_of(block_mask(row, (4, 4)))
    assert all(int(x.min()) >= 0 and int(x.max()) < 4 for x in (indices, full_indices))


def test_sizes_default_to_what_the_mask_is_written_for() -> None:
    mask = per_head([causal, full]) & document(RUNS)
    assert mask.block_mask(16, 16, block_size=4).kv_num_blocks.shape == (2, 2, 4)


def test_sizes_can_be_asked_for() -> None:
    assert causal.block_mask(16, 16, batch=3, heads=5, block_size=4).kv_num_blocks.shape == (3, 5, 4)


def test_a_list_per_kv_head_is_spread_over_query_heads() -> None:
    found = per_head([causal, full]).block_mask(16, 16, heads=4, block_size=4)
    assert found.kv_num_blocks[0, :, 0].tolist() == [1, 1, 0, 0]


def test_block_sizes_are_kept() -> None:
    assert causal.block_mask(300, 300, block_size=(64, 128)).BLOCK_SIZE == (64, 128)


def test_lengths_are_kept() -> None:
    assert causal.block_mask(300, 200).seq_lengths == (300, 200)


def test_short_masks_have_tables_for_the_backward_pass() -> None:
    assert causal.block_mask(300, 300).q_indices is not None


def test_blocks_of_keys_that_start_later_are_numbered_from_their_start() -> None:
    lo, hi = (x + 100 for x in query_blocks(4, 1, None))
    tables = block_tables(causal & sliding_window(2), lo, hi, 8, kv_block=2, kv_start=96)
    assert [row[:n] for row, n in zip(tables.kv_indices[0, 0].tolist(), tables.kv_num_blocks[0, 0].tolist(), strict=True)] == [
        [1, 2],
        [],
        [2, 3],
        [],
    ]


def test_full_blocks_of_keys_that_start_later_are_numbered_from_their_start() -> None:
    lo, hi = (x + 100 for x in query_blocks(4, 1, None))
    tables = block_tables(causal & sliding_window(2), lo, hi, 8, kv_block=2, kv_start=torch.tensor([96]))
    assert tables.full_kv_indices[0, 0, [1, 3], 0].tolist() == [2, 3]


def test_live_width_is_the_longest_row() -> None:
    lo, hi = query_blocks(512, 128, None)
    assert live_width(causal & (sink(1) | sliding_window(2)), lo, hi, 512, 128) == 3


def test_a_narrow_table_holds_what_a_wide_one_does() -> None:
    lo, hi = query_blocks(512, 64, None)
    wide, narrow = (block_tables(STREAMING, lo, hi, 512, kv_block=64, width=width) for width in (None, 3))
    assert torch.equal(wide.kv_indices[..., :3], narrow.kv_indices)


# -- the mask_mod ---------------------------------------------------------------------------------------------------


@every_row
def test_the_mask_mod_counts_queries_from_the_offset(row: Row) -> None:
    found = block_mask(row, (4, 4), q_offset=3).mask_mod
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (row.batch, row.heads, row.q_len, row.kv_len)), indexing="ij")
    torch.testing.assert_close(found(b, h, i, j), pairs(row, q_offset=3))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@every_row
def test_flex_attention_agrees_with_sdpa_and_the_dense_mask(row: Row) -> None:
    random = torch.Generator().manual_seed(0)
    q = torch.randn(row.batch, row.heads, row.q_len, 8, generator=random)
    k, v = (torch.randn(row.batch, row.heads, row.kv_len, 8, generator=random) for _ in range(2))
    result = flex_attention(q, k, v, block_mask=block_mask(row, (4, 4), q_offset=3))
    visible = pairs(row, q_offset=3)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    sees = visible.any(-1, keepdim=True)  # SDPA may return NaN or 0 where a query sees nothing
    assert isinstance(result, Tensor)
    torch.testing.assert_close(result.where(sees, 0.0), expected.where(sees, 0.0))


# -- a million by a million -----------------------------------------------------------------------------------------

MILLION = 1_000_000
DUO = per_head([causal] * 16 + [causal & (sink(64) | sliding_window(1024))] * 16)


def test_head_groups_split_a_million_by_a_million() -> None:
    assert [(mask == causal, heads) for mask, heads in DUO.head_groups(32).items()] == [
        (True, tuple(range(16))),
        (False, tuple(range(16, 32))),
    ]


def test_a_streaming_group_of_a_million_takes_under_50_ms() -> None:
    streaming = list(DUO.head_groups(32))[1]
    streaming.block_mask(MILLION, MILLION, heads=16)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        streaming.block_mask(MILLION, MILLION, heads=16)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05


def test_a_streaming_group_of_a_million_takes_under_64_mb() -> None:
    found = list(DUO.head_groups(32))[1].block_mask(MILLION, MILLION, heads=16)
    every = (*tables_of(found), found.q_indices, found.full_q_indices)
    assert sum(table.nbytes for table in every if table is not None) < 64e6


def test_a_streaming_group_of_a_million_is_right() -> None:
    found = list(DUO.head_groups(32))[1].block_mask(MILLION, MILLION)
    row = 5000  # queries 640,000 to 640,127 see the sink and keys from 638,977 on
    visited = {block for *_, r, block in partial_blocks(found) if r == row} | {b for *_, r, b in full_blocks(found) if r == row}
    assert visited == {0, *range(638_977 // 128, row + 1)}


def test_tables_of_captured_tensors_wait_for_no_pair_grid() -> None:
    long = torch.arange(300_000).div(1000, rounding_mode="floor").view(1, -1)
    assert (causal & document(long)).block_mask(300_000, 300_000).kv_indices.shape[-1] < 20


def test_a_mask_with_an_unbound_name_says_so() -> None:
    with pytest.raises(ValueError, match="attention_mask stands for a tensor of the compiled graph: bind"):
        padding(Captured.symbol("attention_mask")).block_mask(4, 4)


def test_what_is_sure_may_differ_between_heads_where_what_is_possible_does_not() -> None:
    mask = causal & padding(torch.ones(2, 40, dtype=torch.bool)) & ~explicit(torch.rand(1, 4, 40, 40) > 0.5)
    found = mask.block_mask(40, 40, block_size=16)
    seen = (
        torch.nn.functional.pad(mask.dense(40, 40, batch=2, heads=4), (0, 8, 0, 8)).unflatten(3, (3, 16)).unflatten(2, (3, 16))
    )
    assert found.full_kv_num_blocks is not None
    listed = found.kv_num_blocks + found.full_kv_num_blocks
    assert (listed >= seen.any(5).any(3).sum(-1)).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int64])
def test_lengths_of_any_integer_dtype(dtype: torch.dtype) -> None:
    assert prefix(torch.tensor([3, 100], dtype=dtype)).density(300, 300) == 103 / 600
