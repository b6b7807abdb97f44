"""Masks that read another mask at other positions: what they imply, what they refuse, and how caches serve them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparse_compile.masks import (
    Captured,
    Mask,
    causal,
    chunked,
    coarse,
    dilated,
    document,
    documents,
    explicit,
    neighborhood,
    of_queries,
    page_topk,
    periodic,
    prefix,
    repeated,
    shifted,
    sink,
    sliding_window,
    within,
)
from sparse_compile.masks.analysis import Past, visible_past
from sparse_compile.masks.lengthen import lengthened
from support.oracles.cache import error, random_tokens, whole
from support.sessions.cache import Session, ones

# These calls pass arguments of the wrong type or value. Any lets them pass the type checkers.
Make = Callable[[Any], Mask]
WRONG: dict[str, Any] = {"size": 1.5, "parts": causal}
AROUND: dict[str, Make] = {
    "coarse": lambda mask: coarse(mask, q=2, kv=2),
    "shifted": lambda mask: shifted(mask, q=1),
    "of_queries": of_queries,
    "periodic": lambda mask: periodic(mask, 3),
    "repeated": lambda mask: repeated(mask, 3),
    "within": lambda mask: within(mask, 3),
}
every_kind = pytest.mark.parametrize("name", AROUND)


# -- values ---------------------------------------------------------------------------------------------------------


@every_kind
def test_more_pairs_inside_are_more_pairs_outside(name: str) -> None:
    around = AROUND[name]
    assert around(sink(2)).implies(around(sink(3)))
    assert not around(sink(3)).implies(around(sink(2)))
    assert around(sink(2)) & around(sink(3)) == around(sink(2))


def test_masks_of_other_sizes_do_not_imply_each_other() -> None:
    assert not coarse(sink(2), q=2).implies(coarse(sink(3), q=3))


@every_kind
def test_a_name_inside_is_bound(name: str) -> None:
    lengths = Captured.symbol("lengths")
    mask = AROUND[name](prefix(lengths))
    assert [str(c) for c in mask.captures()] == ["lengths"]
    assert mask.bind({lengths: Captured.of([2])}) == AROUND[name](prefix([2]))


def test_within_takes_the_masks_that_cut_a_text_into_parts() -> None:
    assert within(causal, chunked(4)) == within(causal, 4)
    assert within(causal, document([[5, 5, 7]])) == within(causal, [[0, 0, 2]])


def test_a_window_on_a_grid_prints_values_of_all_axes_once() -> None:
    assert repr(neighborhood((4, 5), (3, 3), (1, 1), stride=(2, 2))) == "neighborhood((4, 5), 3, stride=2)"
    assert repr(neighborhood((4, 5), (3, 2), causal=(True, False))) == "neighborhood((4, 5), (3, 2), causal=(True, False))"


def test_chunks_and_windows_of_tiles_have_a_limited_past() -> None:
    assert visible_past(within(sink(2) | sliding_window(3), 8), 1000) == Past(sink=2, recent=8)
    assert visible_past(coarse(sliding_window(2), q=4, kv=4), 1000) == Past(sink=0, recent=8)
    assert visible_past(periodic(chunked(1), 8), 1000) is None


def test_tensors_are_lengthened_inside_and_outside() -> None:
    assert lengthened(within(causal, [[0, 0, 2]]), 5) == within(causal, [[0, 0, 2, 2, 2]])
    assert lengthened(documents([[0, 1]], [[0]]), 3) == documents([[0, 1, 1]], [[0, 0, 0]])
    assert lengthened(shifted(document([[0, 1]]), q=-1), 3) == shifted(document([[0, 1, 1, 1]]), q=-1)


# -- what is refused ------------------------------------------------------------------------------------------------


@every_kind
def test_a_mask_comes_first(name: str) -> None:
    with pytest.raises(TypeError, match=rf"{name} needs a mask, got 3: give the mask first, as in {name}\(causal, ...\)"):
        AROUND[name](3)


@every_kind
def test_a_selector_stands_outside(name: str) -> None:
    rule = rf"{name} cannot hold page_topk\(64\), which selects keys by content: join the two with &"
    with pytest.raises(ValueError, match=rule):
        AROUND[name](causal & page_topk(64))


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda n: coarse(causal, q=n), "coarse q"),
        (lambda n: coarse(causal, kv=n), "coarse kv"),
        (lambda n: periodic(causal, n), "periodic period"),
        (lambda n: repeated(causal, n), "repeated period"),
        (lambda n: within(causal, n), "within parts"),
        (lambda n: neighborhood(8, 3, stride=n), "neighborhood stride"),
    ],
)
def test_sizes_are_at_least_one(make: Make, rule: str) -> None:
    with pytest.raises(ValueError, match=f"{rule} needs to be at least 1, got 0"):
        make(0)


@pytest.mark.parametrize(
    ("make", "kind", "rule"),
    [
        (lambda: shifted(causal, q=WRONG["size"]), TypeError, "shifted q needs an integer, got 1.5"),
        (
            lambda: within(causal, WRONG["parts"]),
            TypeError,
            r"within needs parts to be a size, starts, chunked\(n\) or document\(ids\)",
        ),
        (lambda: within(causal, [0, 0]), ValueError, r"within needs parts of shape \[batch, positions\], got \[2\]"),
        (lambda: documents([0], [[0]]), ValueError, r"documents needs q_ids of shape \[batch, queries\], got \[1\]"),
        (lambda: documents([[0.0]], [[0]]), TypeError, "documents needs q_ids of integer dtype, got torch.float32"),
        (lambda: documents([[0]], [[0]]).dense(2, 1), ValueError, "q_ids of documents covers 1 positions"),
        (lambda: documents([[0]], [[0]]).dense(1, 2), ValueError, "kv_ids of documents covers 1 positions"),
        (lambda: documents([[0]] * 2, [[0]]).dense(1, 1), ValueError, "q_ids of documents was built for batch size 2"),
        (lambda: within(causal, [[0, 0]]).dense(3, 2), ValueError, "within covers 2 positions"),
        (lambda: coarse(document([[0, 1]]), q=2, kv=2).dense(4, 5), ValueError, "document covers 2 positions"),
        (lambda: shifted(document([[0, 1]]), q=3).dense(6, 2), ValueError, "document covers 2 positions"),
        (lambda: of_queries(document([[0, 1]])).dense(3, 2), ValueError, "document covers 2 positions"),
        (lambda: repeated(document([[0, 1]]), 3).dense(1, 1), ValueError, "document covers 2 positions"),
        (lambda: periodic(document([[0, 1]]), 3).dense(1, 1), ValueError, "document covers 2 positions"),
        (
            lambda: neighborhood(8, 3, stride=4),
            ValueError,
            "neighborhood stride needs to be at most the kernel, got 4 for a kernel of 3: with a larger one, some tokens",
        ),
        (
            lambda: explicit(torch.ones(1, 1, 4, 2).bool(), kv_start=3).dense(4, 6),
            ValueError,
            "explicit covers keys 3 to 4, but the attention has keys 0 to 5",
        ),
    ],
)
def test_a_wrong_value_is_refused(make: Callable[[], object], kind: type[Exception], rule: str) -> None:
    with pytest.raises(kind, match=rule):
        make()


# -- caches ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    "policy",
    [
        within(causal & (sink(1) | sliding_window(2)), 8),
        causal & (of_queries(sink(20)) | coarse(sliding_window(2), q=4, kv=4) | periodic(chunked(1), 5)),
        causal & (shifted(sink(2), kv=3) | repeated(dilated(2, 1), 6)),
    ],
    ids=["a ring", "pages", "shifted pages"],
)
def test_a_cache_serves_them_as_one_pass_does(policy: Mask) -> None:
    ids = random_tokens(32)
    assert error(Session(policy).feed(ids, [17, *ones(15)]), whole(ids, policy)) < 1e-5


def test_a_cache_needs_tensors_for_all_of_its_positions() -> None:
    ids = random_tokens(32)
    with pytest.raises(ValueError, match="within covers 4 positions, but the attention reaches position"):
        Session(causal & within(causal, [[0, 0, 2, 2]])).feed(ids, [17])
