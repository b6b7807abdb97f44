"""``page_topk`` rejects invalid selections and static use. Its errors state the rule, the value and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sparse_compile.masks import Mask, causal, page_topk, per_head, sink

Make = Callable[[Any], Any]
SIZED: dict[str, Make] = {
    "tokens": lambda n: page_topk(n),
    "page": lambda n: page_topk(64, page=n),
    "every": lambda n: page_topk(64, every=n),
}


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("size", [0, -3])
def test_sizes_are_at_least_one(name: str, size: int) -> None:
    with pytest.raises(ValueError, match=f"^page_topk {name} needs to be at least 1, got {size}$"):
        SIZED[name](size)


@pytest.mark.parametrize("name", SIZED)
@pytest.mark.parametrize("size", [True, 2.0, "4", None])
def test_sizes_are_integers(name: str, size: object) -> None:
    with pytest.raises(TypeError, match=f"^page_topk {name} needs an integer, got {size!r}$"):
        SIZED[name](size)


@pytest.mark.parametrize("score", ["max", "", None, 3, ["minmax"]])
def test_an_unknown_score_is_refused(score: Any) -> None:
    with pytest.raises(ValueError, match=r"^page_topk score needs to be one of minmax, mean, keys, got "):
        page_topk(64, score=score)


@pytest.mark.parametrize("group", ["minmax", "MAX", None])
def test_an_unknown_group_is_refused(group: Any) -> None:
    with pytest.raises(ValueError, match=rf"^page_topk group needs to be one of max, mean, sum, got {group!r}$"):
        page_topk(64, group=group)


@pytest.mark.parametrize("share", [True, 1.5, "0", [1], [(1, 0, 2)], {1: None}, {"1": 0}, {1: True}, {1.0: 0}], ids=str)
def test_a_share_that_names_no_layers_is_refused(share: Any) -> None:
    with pytest.raises(TypeError, match="page_topk share needs "):
        page_topk(64, share=share)


@pytest.mark.parametrize("share", [-1, {-1: 0}, {1: -2}], ids=str)
def test_layers_are_counted_from_zero(share: Any) -> None:
    with pytest.raises(ValueError, match=r"^page_topk share needs to be at least 0, got -[12]$"):
        page_topk(64, share=share)


@pytest.mark.parametrize(
    ("share", "circle"), [({0: 0}, "0 -> 0"), ({0: 1, 1: 0}, "0 -> 1 -> 0"), ({1: 2, 2: 3, 3: 1}, "1 -> 2 -> 3 -> 1")], ids=str
)
def test_a_circle_of_leaders_is_refused(share: Any, circle: str) -> None:
    with pytest.raises(ValueError, match=f"share has a cycle, {circle}: one of these layers must score its own pages"):
        page_topk(64, share=share)


def test_a_leader_that_runs_later_is_refused() -> None:
    with pytest.raises(ValueError, match="share gives layer 1 the pages of layer 3, which runs later: name an earlier layer"):
        page_topk(64, share={1: 3})
    with pytest.raises(ValueError, match="share gives layer 0 the pages of layer 2, which runs later: name an earlier layer"):
        page_topk(64, share=2).leader(0)


def test_the_opposite_of_a_selector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"page_topk\(64\) selects pages and cannot be negated: remove the ~"):
        ~page_topk(64)
    with pytest.raises(ValueError, match=r"page_topk\(64\) selects pages and cannot be negated: remove the ~"):
        ~(causal & (sink(4) | page_topk(64)))


QUESTIONS: dict[str, Make] = {
    "call": lambda mask: mask(0, 0, 3, 1),
    "dense": lambda mask: mask.dense(4, 4, heads=2),
    "block_mask": lambda mask: mask.block_mask(4, 4, heads=2),
    "density": lambda mask: mask.density(4, 4, heads=2),
    "draw": lambda mask: mask.draw(4, 4, heads=2),
    "plot": lambda mask: mask.plot(4, 4, head=1),
}


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize(
    "mask", [page_topk(64), causal & (sink(1) | page_topk(64)), per_head([causal, causal & page_topk(64)])], ids=str
)
def test_a_static_answer_is_refused_with_what_to_ask(question: str, mask: Mask) -> None:
    if question == "plot":
        pytest.importorskip("matplotlib")
    rule = r"page_topk\(64\) depends on queries and keys, so the mask is not static: call mask.selected\(q, k\)"
    with pytest.raises(ValueError, match=rule):
        QUESTIONS[question](mask if question != "call" else mask.for_head(1, 2))


@pytest.mark.parametrize(
    ("mask", "rule"),
    [
        (causal & (page_topk(4, page=2) | page_topk(8, page=2)), "need the same page_topk, got page_topk"),
        (per_head([causal & page_topk(4, page=2), causal & page_topk(8, page=2)]), "need the same page_topk, got page_topk"),
        (
            causal & page_topk(8, page=3),
            "a decode step reads pages of 4 keys, but .* summarizes pages of 3: give it a page that divides 4",
        ),
        (causal & page_topk(8, page=8), "a decode step reads pages of 4 keys, but .* summarizes pages of 8"),
    ],
    ids=["two in a head", "two in a group", "does not divide", "larger"],
)
def test_what_makes_no_selection_is_refused_in_use(mask: Mask, rule: str) -> None:
    q, k = torch.randn(1, 2, 1, 4), torch.randn(1, 1, 8, 4)
    with pytest.raises(ValueError, match=rule):
        mask.selected(q, k, q_offset=7, page_size=4)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"page_size": 0}, "page_size needs to be at least 1, got 0"),
        ({"q_block": 0}, "q_block needs to be at least 1, got 0"),
        ({"q_offset": -1}, "q_offset needs to be at least 0, got -1"),
    ],
)
def test_sizes_of_a_selection_are_checked(options: dict[str, Any], rule: str) -> None:
    q, k = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 8, 4)
    with pytest.raises(ValueError, match=rule):
        page_topk(8, page=4).selected(q, k, **{"q_offset": 7, "page_size": 4, **options})


def test_query_heads_that_kv_heads_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"selected needs q .* and k .*, got .1, 3, 1, 4. and .1, 2, 8, 4."):
        page_topk(8, page=4).selected(torch.randn(1, 3, 1, 4), torch.randn(1, 2, 8, 4), q_offset=7, page_size=4)
