"""``page_topk`` is a plain value like every mask."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

import sparse_compile.masks
from sparse_compile.masks import Mask, causal, full, page_topk, per_head, sink, sliding_window
from sparse_compile.masks.selection.page_topk import has_selector, offered, selector_of, static_part

NAMES = {name: getattr(sparse_compile.masks, name) for name in sparse_compile.masks.__all__}
LEAVES = [
    page_topk(4096),
    page_topk(1, page=1),
    page_topk(4096, page=8, score="mean", group="sum", every=4),
    page_topk(64, score="keys", group="mean"),
    page_topk(64, share=0),
    page_topk(64, every=2, share={2: 1, 1: 0}),
    page_topk(64, share={}),
]
MASKS: list[Mask] = [
    *LEAVES,
    causal & page_topk(64),
    causal & (sink(64) | sliding_window(256) | page_topk(4096, every=4)),
    per_head([causal, causal & (sink(2) | page_topk(8, share={3: 1}))]),
    per_head([page_topk(8), page_topk(16)]) & causal,
]
every_mask = pytest.mark.parametrize("mask", MASKS, ids=str)


# -- a value --------------------------------------------------------------------------------------------------------


@every_mask
def test_repr_is_what_you_would_type(mask: Mask) -> None:
    assert eval(repr(mask), dict(NAMES)) == mask


@every_mask
def test_equal_masks_have_equal_hashes(mask: Mask) -> None:
    assert hash(eval(repr(mask), dict(NAMES))) == hash(mask)


@every_mask
def test_pickle_keeps_the_mask(mask: Mask) -> None:
    assert pickle.loads(pickle.dumps(mask)) == mask


@every_mask
def test_json_keeps_the_mask_and_its_text(mask: Mask) -> None:
    again = Mask.from_json(mask.to_json())
    assert again == mask and hash(again) == hash(mask) and repr(again) == repr(mask)


@every_mask
def test_moving_to_a_device_keeps_the_mask(mask: Mask) -> None:
    assert mask.to("cpu") == mask


@pytest.mark.parametrize(
    "typed",
    [
        "page_topk(4096)",
        "page_topk(4096, page=8, score='mean', group='sum', every=4, share=0)",
        "page_topk(64, share={1: 0, 2: 1})",
        "causal & (sink(64) | sliding_window(256) | page_topk(4096, every=4))",
        "per_head([causal, causal & page_topk(64, share={1: 0})])",
    ],
)
def test_masks_print_as_typed(typed: str) -> None:
    mask = eval(typed, dict(NAMES))
    assert repr(mask) == str(mask) == typed


def test_every_leaf_is_another_value() -> None:
    assert len(set(LEAVES)) == len(LEAVES)


@pytest.mark.parametrize("share", [{2: 1, 1: 0}, ((2, 1), (1, 0)), [(1, 0), (2, 1)], [[1, 0], [2, 1]]], ids=str)
def test_a_share_map_is_the_same_value_however_it_is_given(share: Any) -> None:
    mask = page_topk(64, share=share)
    assert mask == page_topk(64, share={1: 0, 2: 1}) and hash(mask) == hash(page_topk(64, share={1: 0, 2: 1}))
    assert repr(mask) == "page_topk(64, share={1: 0, 2: 1})"


def test_a_share_map_that_changes_later_does_not_change_the_mask() -> None:
    leaders = {1: 0}
    mask = page_topk(64, share=leaders)
    leaders[1] = 7
    assert mask == page_topk(64, share={1: 0})


def test_values_cannot_be_assigned() -> None:
    mask: Any = page_topk(64)
    with pytest.raises(AttributeError):
        mask.tokens = 128


def test_all_but_the_budget_is_given_by_name() -> None:
    make: Any = page_topk
    with pytest.raises(TypeError, match="positional"):
        make(64, 16)


def test_order_does_not_matter_for_equality() -> None:
    assert causal & (sink(2) | page_topk(8)) == (page_topk(8) | sink(2)) & causal


@pytest.mark.parametrize(
    ("written", "simplified"),
    [
        (page_topk(8) & page_topk(8), page_topk(8)),
        (page_topk(8) | page_topk(8), page_topk(8)),
        (page_topk(8) & full, page_topk(8)),
        (page_topk(8) | full, full),
        (page_topk(8) & ~full, ~full),
        (page_topk(8) | ~full, page_topk(8)),
        (causal | causal & page_topk(8), causal),
    ],
    ids=str,
)
def test_masks_with_selectors_are_simplified(written: Mask, simplified: Mask) -> None:
    assert written == simplified


def test_two_selectors_imply_nothing_about_one_another() -> None:
    assert not page_topk(8).implies(page_topk(16)) and len((page_topk(8) & page_topk(16)).children()) == 2


def test_head_groups_and_sizes_need_no_queries() -> None:
    streaming = causal & (sink(2) | sliding_window(4))
    mask = per_head([causal & page_topk(8), streaming])
    assert mask.head_groups(4) == {causal & page_topk(8): (0, 1), streaming: (2, 3)}
    assert mask.sizes() == (1, 2)


def test_the_parts_of_a_mask_with_a_selector() -> None:
    mask = causal & (sink(2) | page_topk(8))
    assert has_selector(mask) and not has_selector(causal)
    assert selector_of(mask) == page_topk(8) and selector_of(causal) is None
    assert static_part(mask) == causal & sink(2)
    assert offered(mask) == causal
    assert static_part(causal & page_topk(8)) == ~full


@pytest.mark.parametrize(
    ("share", "layer", "leader"),
    [(None, 3, 3), (0, 3, 0), (0, 0, 0), ({1: 0, 2: 1}, 2, 0), ({1: 0}, 0, 0), ({1: 0}, 5, 5), ({}, 1, 1)],
)
def test_the_leader_of_a_layer(share: Any, layer: int, leader: int) -> None:
    assert page_topk(64, share=share).leader(layer) == leader
