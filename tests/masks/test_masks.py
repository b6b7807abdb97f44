"""Every row of the catalog agrees with its oracle in every kind of call, and is a plain value."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

import sparse_compile.masks
from sparse_compile.masks import (
    Captured,
    Mask,
    causal,
    chunked,
    document,
    explicit,
    full,
    neighborhood,
    padding,
    per_head,
    prefix,
    sink,
    sliding_window,
    strided,
)
from support.masks.catalog import ROWS
from support.masks.row import Row
from support.oracles.masks import pairs

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
NAMES = {name: getattr(sparse_compile.masks, name) for name in sparse_compile.masks.__all__}


def dense(row: Row, **shape: Any) -> torch.Tensor:
    return row.mask.dense(shape.pop("q_len", row.q_len), row.kv_len, batch=row.batch, heads=row.heads, **shape)


# -- meaning --------------------------------------------------------------------------------------------------------


@every_row
def test_dense_is_what_the_oracle_says(row: Row) -> None:
    torch.testing.assert_close(dense(row), pairs(row))


@every_row
def test_dense_from_a_later_position_is_what_the_oracle_says(row: Row) -> None:
    torch.testing.assert_close(dense(row, q_offset=3), pairs(row, q_offset=3))


@every_row
def test_python_integers_give_what_the_oracle_says(row: Row) -> None:
    mask = row.mask.for_heads(row.heads)
    visible = [
        [[[bool(mask(b, h, i, j)) for j in range(row.kv_len)] for i in range(row.q_len)] for h in range(row.heads)]
        for b in range(row.batch)
    ]
    torch.testing.assert_close(torch.tensor(visible), pairs(row))


@every_row
def test_vmap_as_in_flex_attention_gives_what_the_oracle_says(row: Row) -> None:
    visible = create_mask(row.mask.for_heads(row.heads), row.batch, row.heads, row.q_len, row.kv_len, device="cpu")
    torch.testing.assert_close(visible, pairs(row))


@every_row
def test_broadcast_index_tensors_give_what_the_oracle_says(row: Row) -> None:
    b, h, i, j = torch.meshgrid(*(torch.arange(n) for n in (row.batch, row.heads, row.q_len, row.kv_len)), indexing="ij")
    torch.testing.assert_close(row.mask.for_heads(row.heads)(b, h, i, j), pairs(row))


@every_row
def test_int32_indices_give_what_the_oracle_says(row: Row) -> None:
    sizes = (row.batch, row.heads, row.q_len, row.kv_len)
    b, h, i, j = torch.meshgrid(*(torch.arange(n, dtype=torch.int32) for n in sizes), indexing="ij")
    torch.testing.assert_close(row.mask.for_heads(row.heads)(b, h, i, j), pairs(row))


@every_row
def test_rows_of_a_prefill_are_single_decode_steps(row: Row) -> None:
    steps = torch.cat([dense(row, q_len=1, q_offset=i) for i in range(row.q_len)], dim=2)
    torch.testing.assert_close(steps, dense(row))


@every_row
def test_density_is_the_mean_of_dense(row: Row) -> None:
    density = row.mask.density(row.q_len, row.kv_len, batch=row.batch, heads=row.heads)
    assert density == pairs(row).double().mean().item()


@every_row
def test_density_counts_from_the_offset(row: Row) -> None:
    density = row.mask.density(5, row.kv_len, q_offset=3, batch=row.batch, heads=row.heads)
    assert density == pairs(row, q_offset=3, q_len=5).double().mean().item()


@every_row
def test_head_groups_see_what_their_heads_see(row: Row) -> None:
    together = torch.empty(row.batch, row.heads, row.q_len, row.kv_len, dtype=torch.bool)
    for mask, heads in row.mask.head_groups(row.heads).items():
        together[:, list(heads)] = mask.dense(row.q_len, row.kv_len, batch=row.batch, heads=1)
    torch.testing.assert_close(together, pairs(row))


def test_density_of_many_positions_is_exact() -> None:
    visible = sum(min(i + 1, 1000) for i in range(100_000))
    assert causal.density(100_000, 1000) == visible / (100_000 * 1000)


def test_density_of_a_long_streaming_mask_is_exact() -> None:
    n, near, first = 10_000, 1000, 64
    visible = sum(min(i + 1, near) + min(max(i - near + 1, 0), first) for i in range(n))
    assert (causal & (sink(first) | sliding_window(near))).density(n, n) == visible / n**2


# -- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in ROWS if "<" not in repr(row.mask)], ids=lambda row: row.name)
def test_repr_is_what_you_would_type(row: Row) -> None:
    assert eval(repr(row.mask), dict(NAMES)) == row.mask


@every_row
def test_equal_masks_have_equal_hashes(row: Row) -> None:
    assert hash(pickle.loads(pickle.dumps(row.mask))) == hash(row.mask)


@every_row
def test_pickle_keeps_the_mask(row: Row) -> None:
    assert pickle.loads(pickle.dumps(row.mask)) == row.mask


@every_row
def test_json_keeps_the_mask(row: Row) -> None:
    assert Mask.from_json(row.mask.to_json()) == row.mask


@every_row
def test_json_keeps_the_text(row: Row) -> None:
    assert repr(Mask.from_json(row.mask.to_json())) == repr(row.mask)


@every_row
def test_moving_to_a_device_keeps_the_mask(row: Row) -> None:
    assert row.mask.to("cpu") == row.mask


def test_every_row_is_another_value() -> None:
    assert len({row.mask for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize(
    "mask",
    [
        document(torch.tensor([[0, 0, 1]], dtype=torch.int32)),
        padding(torch.tensor([[0, 1, 1]], dtype=torch.uint8)),
        prefix(torch.tensor([3], dtype=torch.int32)),
        explicit([[[[True, False]]]], q_start=[4], kv_start=torch.tensor([2], dtype=torch.int32)),
    ],
    ids=lambda mask: mask.name,
)
def test_repr_keeps_the_dtype_of_captured_tensors(mask: Mask) -> None:
    assert eval(repr(mask), dict(NAMES)) == mask


def test_json_keeps_a_symbol() -> None:
    mask = causal & padding(Captured.symbol("attention_mask"))
    assert Mask.from_json(mask.to_json()) == mask


def test_masks_print_as_typed() -> None:
    typed = "causal & (sink(1) | ~sliding_window(2)) & strided(3, offset=1)"
    assert repr(eval(typed, dict(NAMES))) == typed


def test_long_tensors_are_printed_as_their_dtype_and_shape() -> None:
    mask = causal & padding(torch.ones(2, 4096, dtype=torch.bool))
    assert str(mask) == repr(mask) == "causal & padding(<bool [2, 4096]>)"
    assert repr(padding([[True] * 16])).count("True") == 16


def test_neighboring_heads_with_the_same_mask_are_printed_once() -> None:
    near = causal & sliding_window(2)
    for masks, typed in (
        ([causal] * 3, "per_head([causal] * 3)"),
        ([causal, causal], "per_head([causal, causal])"),
        ([near, causal] + [near] * 30, f"per_head([{near}, causal] + [{near}] * 30)"),
        ([causal] * 3 + [near] * 3 + [causal], f"per_head([causal] * 3 + [{near}] * 3 + [causal])"),
    ):
        mask = per_head(masks)
        assert repr(mask) == typed
        assert eval(typed, dict(NAMES)) == mask


def test_heads_with_other_tensors_are_printed_separately() -> None:
    first, second = (padding(torch.full((1, 40), seen)) for seen in (True, False))
    assert str(per_head([first] * 3 + [second])) == "per_head([padding(<bool [1, 40]>)] * 3 + [padding(<bool [1, 40]>)])"


def test_neighboring_heads_that_look_the_same_share_a_drawing() -> None:
    drawn = per_head([causal, causal, full, causal]).draw(2, 2).splitlines()
    assert drawn == ["heads 0-1", "█·", "██", "head 2", "██", "██", "head 3", "█·", "██"]


def test_str_of_a_symbol_is_its_name() -> None:
    assert str(padding(Captured.symbol("attention_mask"))) == "padding(attention_mask)"


def test_masks_of_other_tensors_differ() -> None:
    assert document([[0, 0]]) != document([[0, 1]])


def test_masks_of_tensors_of_another_dtype_differ() -> None:
    assert document([[0, 1]]) != document(torch.tensor([[0, 1]], dtype=torch.int32))


def test_order_does_not_matter_for_equality() -> None:
    assert {causal & sink(2), sink(2) | causal} == {sink(2) & causal, causal | sink(2)}


def test_captures_are_listed_once_in_the_order_written() -> None:
    mask = (causal & padding([[True, False]]) & document([[1, 2]])) | ~padding([[True, False]])
    assert [c.tolist() for c in mask.captures()] == [[[True, False]], [[1, 2]]]


def test_bind_puts_a_tensor_in_the_place_of_its_name() -> None:
    name = Captured.symbol("attention_mask")
    mask = per_head([causal, causal & padding(name)])
    assert mask.bind({name: Captured.of([[True, False]])}) == per_head([causal, causal & padding([[True, False]])])


def test_sizes_are_the_largest_of_the_parts() -> None:
    assert (padding([[True]] * 3) & per_head([causal, full]) & document([[0]])).sizes() == (3, 2)


def test_hashes_need_no_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "numpy", None)  # torch does not install numpy
    assert hash(document([[0, 1]])) == hash(document([[0, 1]]))


def test_masks_compare_unequal_to_other_things() -> None:
    text: object = "causal"
    assert causal != text


# -- drawing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [row for row in ROWS if row.drawing], ids=lambda row: row.name)
def test_draw_prints_the_drawing(row: Row) -> None:
    lines = row.drawing.split("\n")
    assert row.mask.draw(len(lines), len(lines[0])) == row.drawing


def test_draw_starts_at_the_offset() -> None:
    assert causal.draw(2, 4, q_offset=2) == "███·\n████"


def test_draw_titles_heads_and_batches() -> None:
    mask = per_head([causal, full]) & padding([[True, True], [False, True]])
    assert mask.draw(1, 2) == "batch 0, head 0\n█·\nbatch 0, head 1\n██\nbatch 1, head 0\n··\nbatch 1, head 1\n·█"


def test_draw_shows_the_heads_asked_for() -> None:
    assert causal.draw(1, 1, heads=2) == "heads 0-1\n█"


def test_a_plot_has_pairs_and_blocks() -> None:
    pytest.importorskip("matplotlib")
    assert len((causal & sliding_window(20)).plot(100, 100, block_size=16).axes) == 2


def test_a_plot_tells_the_share_of_visible_pairs() -> None:
    pytest.importorskip("matplotlib")
    assert causal.plot(4, 4, block_size=2).axes[0].get_title() == "pairs: 62.5 % visible"


def test_a_plot_counts_positions_and_blocks_in_whole_numbers() -> None:
    pytest.importorskip("matplotlib")
    figure = causal.plot(4, 4, block_size=2)
    figure.draw_without_rendering()
    ticks = [tick for axes in figure.axes for axis in (axes.xaxis, axes.yaxis) for tick in axis.get_ticklocs()]
    assert all(tick == int(tick) for tick in ticks)


def test_a_plot_counts_block_classes() -> None:
    pytest.importorskip("matplotlib")
    title = causal.plot(40, 40, block_size=10).axes[1].get_title()
    assert title == "blocks of 10: 38 % skipped, 25 % partial, 38 % full"


def test_a_plot_shows_the_head_asked_for() -> None:
    pytest.importorskip("matplotlib")
    assert per_head([causal, full]).plot(4, 4, block_size=2, head=1).axes[0].get_title() == "pairs: 100.0 % visible"


def test_a_plot_shows_one_head_of_an_explicit_mask() -> None:
    pytest.importorskip("matplotlib")
    mask = explicit([[[[False, False]], [[True, False]]]])
    assert mask.plot(1, 2, block_size=1, head=1).axes[0].get_title() == "pairs: 50.0 % visible"


# -- simplification -------------------------------------------------------------------------------------------------

A, B = chunked(4), strided(3)


@pytest.mark.parametrize(
    ("written", "simplified"),
    [
        (A & full, A),
        (full & A, A),
        (A | full, full),
        (A & ~full, ~full),
        (A | ~full, A),
        (~~A, A),
        (~~(A & B), A & B),
        (A & A, A),
        (A | A, A),
        (A & B & A, A & B),
        (A & (A | B), A),
        (A | (A & B), A),
        (A & B & (A & B | causal), A & B),
        (A | B | (A | B) & causal, A | B),
        (sink(2) & ~sink(5), ~full),
        (sink(5) | ~sink(2), full),
        (per_head([~full]) & ~full, ~full),
        (~full | per_head([~full]), per_head([~full])),
        (A & ~A, ~full),
        (A | ~A, full),
        (A & B & ~A, ~full),
        (A | B | ~A, full),
        ((A & B) & ~(A & B), ~full),
        (sliding_window(4) & sliding_window(9), sliding_window(4)),
        (sliding_window(4) | sliding_window(9), sliding_window(9)),
        (sink(2) & sink(5), sink(2)),
        (sink(2) | sink(5), sink(5)),
        (prefix(2) | prefix(5), prefix(5)),
        (chunked(2) & chunked(6), chunked(2)),
        (chunked(2) | chunked(6), chunked(6)),
        (~sink(2) & ~sink(5), ~sink(5)),
        (causal & (sink(1) | sliding_window(2)) & causal, causal & (sink(1) | sliding_window(2))),
        (causal & sliding_window(4) & (causal & sliding_window(9)), causal & sliding_window(4)),
    ],
    ids=repr,
)
def test_masks_are_simplified(written: Mask, simplified: Mask) -> None:
    assert written == simplified


@pytest.mark.parametrize("mask", [chunked(4) & chunked(6), sink(2) & prefix(2), A & B, sliding_window(2) & sink(1)], ids=repr)
def test_what_is_not_implied_stays(mask: Mask) -> None:
    assert len(mask.children()) == 2


@pytest.mark.parametrize(
    ("stronger", "weaker"),
    [
        (causal, full),
        (~full, causal),
        (sink(2), sink(2)),
        (causal & sink(2), sink(3)),
        (sink(2), sink(2) | causal),
        (sink(2) | sink(1) & causal, sink(3)),
        (~sink(3), ~sink(2)),
        (causal & A & B, B & causal),
        (per_head([sink(1), sink(2)]), per_head([sink(2), sink(2)])),
        (per_head([sink(1), sink(2)]), sink(2)),
        (padding([[True, False]]) & causal, padding([[True, False]])),
    ],
    ids=repr,
)
def test_a_stronger_mask_implies_a_weaker_one(stronger: Mask, weaker: Mask) -> None:
    assert stronger.implies(weaker)


@pytest.mark.parametrize(
    ("weaker", "stronger"),
    [
        (full, causal),
        (sink(3), sink(2)),
        (sliding_window(3), sliding_window(2)),
        (chunked(6), chunked(2)),
        (chunked(4), chunked(6)),
        (sink(2) | causal, causal),
        (per_head([sink(1), sink(3)]), sink(2)),
        (neighborhood(8, 5), neighborhood(8, 3)),
    ],
    ids=repr,
)
def test_a_weaker_mask_does_not_imply_a_stronger_one(weaker: Mask, stronger: Mask) -> None:
    assert not weaker.implies(stronger)
