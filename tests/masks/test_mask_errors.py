"""Every wrong input raises one clear error with the rule, the value, and often the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparse_compile.masks import (
    Mask,
    causal,
    chunked,
    dilated,
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
from support.masks.catalog import CHOSEN, LEFT, LENGTHS, RUNS

# These calls pass arguments of the wrong type or value. Any lets them pass the type checkers.
Make = Callable[[Any], object]
SIZED: dict[str, tuple[str, Make]] = {
    "sink": ("sink size", sink),
    "sliding_window": ("sliding_window size", sliding_window),
    "chunked": ("chunked size", chunked),
    "strided": ("strided step", strided),
    "dilated size": ("dilated size", lambda n: dilated(n, 2)),
    "dilated step": ("dilated step", lambda n: dilated(2, n)),
    "neighborhood grid": ("neighborhood grid", lambda n: neighborhood(n, 1)),
    "neighborhood kernel": ("neighborhood kernel", lambda n: neighborhood(8, n)),
    "neighborhood dilation": ("neighborhood dilation", lambda n: neighborhood(8, 1, dilation=n)),
    "neighborhood kernel of one axis": ("neighborhood kernel", lambda n: neighborhood((8, 8), (3, n))),
    "q_len": ("q_len", lambda n: causal.dense(n, 4)),
    "kv_len": ("kv_len", lambda n: causal.dense(4, n)),
    "batch": ("batch", lambda n: causal.dense(4, 4, batch=n)),
    "heads": ("heads", lambda n: causal.dense(4, 4, heads=n)),
    "block_mask q_len": ("q_len", lambda n: causal.block_mask(n, 4)),
    "block_mask kv_len": ("kv_len", lambda n: causal.block_mask(4, n)),
    "block_mask batch": ("batch", lambda n: causal.block_mask(4, 4, batch=n)),
    "block_mask heads": ("heads", lambda n: causal.block_mask(4, 4, heads=n)),
    "block_size": ("block_size of queries", lambda n: causal.block_mask(4, 4, block_size=n)),
    "block_size of keys": ("block_size of keys", lambda n: causal.block_mask(4, 4, block_size=(2, n))),
    "density q_len": ("q_len", lambda n: causal.density(n, 4)),
    "density kv_len": ("kv_len", lambda n: causal.density(4, n)),
    "density batch": ("batch", lambda n: causal.density(4, 4, batch=n)),
    "density heads": ("heads", lambda n: causal.density(4, 4, heads=n)),
    "draw q_len": ("q_len", lambda n: causal.draw(n, 4)),
    "draw heads": ("heads", lambda n: causal.draw(4, 4, heads=n)),
}
OFFSETS: dict[str, tuple[str, Make]] = {
    "strided": ("strided offset", lambda n: strided(2, offset=n)),
    "prefix": ("prefix length", prefix),
    "dense": ("q_offset", lambda n: causal.dense(4, 4, q_offset=n)),
    "block_mask": ("q_offset", lambda n: causal.block_mask(4, 4, q_offset=n)),
    "density": ("q_offset", lambda n: causal.density(4, 4, q_offset=n)),
    "draw": ("q_offset", lambda n: causal.draw(4, 4, q_offset=n)),
}
every_size = pytest.mark.parametrize("name", SIZED)
every_offset = pytest.mark.parametrize("name", OFFSETS)


# -- numbers --------------------------------------------------------------------------------------------------------


@every_size
@pytest.mark.parametrize("size", [0, -3])
def test_sizes_are_at_least_one(name: str, size: int) -> None:
    rule, make = SIZED[name]
    with pytest.raises(ValueError, match=f"^{rule} needs to be at least 1, got {size}$"):
        make(size)


@every_size
@pytest.mark.parametrize("size", [True, 2.0])
def test_sizes_are_integers(name: str, size: object) -> None:
    rule, make = SIZED[name]
    with pytest.raises(TypeError, match=f"^{rule} needs an integer, got {size}$"):
        make(size)


@every_offset
def test_offsets_and_lengths_are_not_negative(name: str) -> None:
    rule, make = OFFSETS[name]
    with pytest.raises(ValueError, match=f"^{rule} needs to be at least 0, got -1$"):
        make(-1)


@every_offset
def test_offsets_are_no_truth_values(name: str) -> None:
    rule, make = OFFSETS[name]
    with pytest.raises(TypeError, match=f"^{rule} needs an integer, got True$"):
        make(True)


@pytest.mark.parametrize("block_size", [(128,), (1, 2, 3)], ids=str)
def test_block_sizes_are_one_or_two(block_size: Any) -> None:
    with pytest.raises(ValueError, match="block_size needs one size, or one for queries and one for keys"):
        causal.block_mask(4, 4, block_size=block_size)


# -- the operators --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "combine",
    [bool, lambda m: m and sink(2), lambda m: m or sink(2), lambda m: not m, lambda m: sink(2) if m else full],
    ids=["bool", "and", "or", "not", "if"],
)
def test_a_mask_has_no_truth_value(combine: Make) -> None:
    with pytest.raises(TypeError, match=r"'and', 'or' and 'not' cannot combine masks: write a & b, a \| b, ~a instead"):
        combine(causal)


@pytest.mark.parametrize(
    "combine",
    [lambda m: m & 1, lambda m: True & m, lambda m: m | None, lambda m: m & torch.ones(2).bool().tolist()],
    ids=["&", "reversed &", "|", "& list"],
)
def test_masks_combine_with_masks_alone(combine: Make) -> None:
    with pytest.raises(TypeError, match="unsupported operand type"):
        combine(causal)


# -- captured tensors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: document([0, 0, 1]), r"document needs ids of shape \[batch, positions\], got \[3\]"),
        (lambda: document([[[0]]]), r"document needs ids of shape \[batch, positions\], got \[1, 1, 1\]"),
        (lambda: padding([True, False]), r"padding needs valid of shape \[batch, positions\], got \[2\]"),
        (
            lambda: padding(torch.ones(2, 1, 1, 8).bool()),
            r"padding needs valid of shape \[batch, positions\], got \[2, 1, 1, 8\]",
        ),
        (lambda: prefix([[1, 2]]), r"prefix needs lengths of shape \[batch\], got \[1, 2\]"),
        (lambda: prefix(torch.tensor(3)), r"prefix needs lengths of shape \[batch\], got \[\]"),
        (lambda: explicit([[True]]), r"explicit needs visible of shape \[batch, heads, queries, keys\], got \[1, 1\]"),
        (lambda: explicit(CHOSEN, q_start=torch.tensor(3)), r"explicit needs q_start of shape \[1\], got \[\]"),
        (lambda: explicit(CHOSEN, kv_start=[[3]]), r"explicit needs kv_start of shape \[1\], got \[1, 1\]"),
    ],
    ids=["document 1-D", "document 3-D", "padding 1-D", "padding 4-D", "prefix 2-D", "prefix 0-D", "explicit", "q", "kv"],
)
def test_captured_tensors_have_the_axes_asked_for(make: Callable[[], Mask], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        make()


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda: document([[0.0, 1.0]]), "document needs ids of integer dtype, got torch.float32"),
        (lambda: document([[True, False]]), "document needs ids of integer dtype, got torch.bool"),
        (lambda: padding([[0.0, -1e9]]), "padding needs valid of bool or integer dtype, got torch.float32"),
        (lambda: prefix([1.5]), "prefix needs lengths of integer dtype, got torch.float32"),
        (lambda: explicit(torch.zeros(1, 1, 2, 2)), "explicit needs visible of bool dtype, got torch.float32"),
        (lambda: explicit(torch.zeros(1, 1, 2, 2).int()), "explicit needs visible of bool dtype, got torch.int32"),
        (lambda: explicit(CHOSEN, q_start=[1.0]), "explicit needs q_start of integer dtype, got torch.float32"),
    ],
    ids=["float ids", "bool ids", "additive padding", "float lengths", "additive mask", "integer mask", "float start"],
)
def test_captured_tensors_have_the_dtype_asked_for(make: Callable[[], Mask], rule: str) -> None:
    with pytest.raises(TypeError, match=rule):
        make()


@pytest.mark.parametrize(
    ("ask", "rule"),
    [
        (lambda: document(RUNS).dense(17, 4, batch=2), "document covers 16 positions, but the attention reaches position 16"),
        (lambda: document(RUNS).dense(4, 17, batch=2), "document covers 16 positions, but the attention reaches position 16"),
        (
            lambda: document(RUNS).dense(4, 4, q_offset=13, batch=2),
            "document covers 16 positions, but the attention reaches position 16: give at least 17 positions",
        ),
        (lambda: document(RUNS).block_mask(4, 17), "document covers 16 positions"),
        (lambda: document(RUNS).density(4, 17), "document covers 16 positions"),
        (lambda: document(RUNS).draw(4, 17), "document covers 16 positions"),
        (lambda: padding(LEFT).dense(4, 20, batch=2), "padding covers 16 positions, but the attention reaches position 19"),
        (lambda: (causal & ~padding(LEFT)).block_mask(4, 20), "padding covers 16 positions"),
        (lambda: per_head([causal, padding(LEFT)]).block_mask(4, 20), "padding covers 16 positions"),
        (
            lambda: explicit(CHOSEN).dense(4, 17, batch=2, heads=2),
            "explicit covers keys 0 to 15, but the attention has keys 0 to 16",
        ),
        (
            lambda: explicit(CHOSEN).dense(4, 4, q_offset=13, batch=2, heads=2),
            "explicit covers queries 0 to 15, but the attention has queries 13 to 16",
        ),
        (
            lambda: explicit(CHOSEN, q_start=3).dense(4, 4, q_offset=2, batch=2, heads=2),
            "explicit covers queries 3 to 18, but the attention has queries 2 to 5",
        ),
        (
            lambda: explicit(CHOSEN, kv_start=1).dense(4, 18, batch=2, heads=2),
            "explicit covers keys 1 to 16, but the attention has keys 0 to 17",
        ),
    ],
)
def test_captured_tensors_cover_the_lengths(ask: Callable[[], object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        ask()


@pytest.mark.parametrize(
    ("mask", "rule"),
    [
        (document(RUNS), "document was built for batch size 2, but the attention has batch size 3"),
        (padding(LEFT), "padding was built for batch size 2, but the attention has batch size 3"),
        (prefix(LENGTHS), "prefix was built for batch size 2, but the attention has batch size 3"),
        (explicit(CHOSEN), "explicit was built for 2 batch rows, but the attention has 3"),
        (causal & ~per_head([full, padding(LEFT)]), "padding was built for batch size 2, but the attention has batch size 3"),
    ],
    ids=["document", "padding", "prefix", "explicit", "inside other nodes"],
)
def test_captured_tensors_fit_the_batch(mask: Mask, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        mask.dense(4, 4, batch=3, heads=2)


def test_block_mask_refuses_another_batch_size() -> None:
    with pytest.raises(ValueError, match="document was built for batch size 2, but the attention has batch size 3"):
        document(RUNS).block_mask(4, 4, batch=3)


def test_density_refuses_another_batch_size() -> None:
    with pytest.raises(ValueError, match="document was built for batch size 2, but the attention has batch size 3"):
        document(RUNS).density(4, 4, batch=3)


def test_parts_agree_on_the_batch_size() -> None:
    with pytest.raises(ValueError, match=r"the parts of a mask must agree on the batch size, got \[2, 3\]"):
        (padding(LEFT) & document(RUNS + RUNS[:1])).block_mask(4, 4)


# -- heads ----------------------------------------------------------------------------------------------------------


def test_per_head_needs_a_mask() -> None:
    with pytest.raises(ValueError, match="per_head needs at least one mask, got none"):
        per_head([])


def test_per_head_does_not_nest() -> None:
    with pytest.raises(ValueError, match="per_head does not nest"):
        per_head([causal, ~(sink(2) & per_head([causal, full]))])


@pytest.mark.parametrize("other", [3, None, "causal", [causal]], ids=str)
def test_per_head_takes_masks_alone(other: Any) -> None:
    with pytest.raises(TypeError, match=r"per_head needs a list of masks, but one entry is "):
        per_head([causal, other])


def test_per_head_takes_a_list() -> None:
    mask: Any = causal
    with pytest.raises(TypeError, match="per_head needs a list of masks, got causal"):
        per_head(mask)


@pytest.mark.parametrize(
    "ask",
    [
        lambda m: m.dense(4, 4, heads=8),
        lambda m: m.block_mask(4, 4, heads=8),
        lambda m: m.density(4, 4, heads=8),
        lambda m: m.draw(4, 4, heads=8),
        lambda m: m.head_groups(8),
        lambda m: m.for_head(0, 8),
        lambda m: m.for_heads(8),
    ],
    ids=["dense", "block_mask", "density", "draw", "head_groups", "for_head", "for_heads"],
)
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: causal & ~m], ids=["alone", "inside other nodes"])
def test_per_head_fits_query_heads_or_kv_heads(ask: Make, wrap: Callable[[Mask], Mask]) -> None:
    mask = wrap(per_head([causal, sink(2), sink(3)]))
    with pytest.raises(ValueError, match="per_head has 3 masks, but the attention has 8 query heads: give one mask per"):
        ask(mask)


def test_a_longer_list_than_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="per_head has 2 masks, but the attention has 1 query heads"):
        per_head([causal, full]).dense(4, 4)


@pytest.mark.parametrize("head", [-1, 4])
def test_a_head_is_one_of_the_heads(head: int) -> None:
    with pytest.raises(ValueError, match=f"there is no head {head} among 4 heads"):
        per_head([causal, full]).for_head(head, 4)


def test_explicit_fits_the_heads() -> None:
    with pytest.raises(ValueError, match="explicit was built for 2 heads, but the attention has 4"):
        explicit(CHOSEN).dense(4, 4, batch=2, heads=4)


def test_one_head_of_explicit_is_one_of_its_heads() -> None:
    with pytest.raises(ValueError, match="explicit was built for 2 heads, but the attention has 4"):
        explicit(CHOSEN).for_head(3, 4)


# -- neighborhood ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(), (2, 2, 2, 2)], ids=str)
def test_a_grid_has_one_to_three_axes(grid: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"neighborhood needs a grid of one to three axes, got {len(grid)}"):
        neighborhood(grid, 1)


@pytest.mark.parametrize(
    ("field", "given"),
    [("kernel", {"kernel": (3, 3, 3)}), ("dilation", {"dilation": (1,)}), ("causal", {"causal": (True, False, True)})],
)
def test_there_is_one_value_per_axis(field: str, given: dict[str, Any]) -> None:
    (value,) = given.values()
    with pytest.raises(ValueError, match=rf"neighborhood {field} needs one value per grid axis \(2\), got {len(value)}"):
        neighborhood((8, 8), **{"kernel": 3, **given})


@pytest.mark.parametrize(
    ("given", "rule"),
    [((4, 5), "got 5 x 1 on an axis of 4"), (((8, 4), 3, (1, 2)), "got 3 x 2 on an axis of 4")],
    ids=["kernel", "dilated kernel"],
)
def test_a_kernel_fits_the_grid(given: tuple[Any, ...], rule: str) -> None:
    with pytest.raises(ValueError, match=f"neighborhood kernel times dilation needs to fit the grid, {rule}"):
        neighborhood(*given)


def test_neighborhood_causal_is_yes_or_no() -> None:
    causal_axis: Any = 2
    with pytest.raises(TypeError, match="neighborhood causal needs True or False, got 2"):
        neighborhood(8, 3, causal=causal_axis)


# -- plot -----------------------------------------------------------------------------------------------------------


def test_a_plot_that_is_too_large_is_refused() -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="plot shows at most 16777216 pairs, got 8192 x 8192: plot fewer queries or keys"):
        causal.plot(8192, 8192)


def test_a_plot_needs_a_block_size() -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="block_size needs to be at least 1, got 0"):
        causal.plot(8, 8, block_size=0)


def test_a_plot_shows_a_head_that_is_there() -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="there is no head 2 among 2 heads"):
        per_head([causal, full]).plot(8, 8, head=2)


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"plot needs matplotlib 3.6 or newer.*: pip install 'sparse-compile\[plot\]'"):
        causal.plot(8, 8)
