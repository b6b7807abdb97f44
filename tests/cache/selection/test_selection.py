"""Decode steps that select pages equal attention to the pages that loops select from the model's own q and k."""

from __future__ import annotations

import pytest
import torch

from sparse_compile.masks import causal, page_topk, sink, sliding_window
from support.oracles.cache import error, random_tokens, whole
from support.oracles.selection import PageSelection
from support.sessions.cache import in_chunks, ones
from support.sessions.selection import Session

STATIC = sink(3) | sliding_window(5)

pytestmark = pytest.mark.usefixtures("fresh")


# -- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [4, 10, 12])
def test_every_length_around_and_beyond_the_budget_is_selected_as_written_out(tokens: int) -> None:
    ids = random_tokens(32)
    wanted = Session([[PageSelection(page_topk(tokens, page=4))]] * 2).goes_as_written_out(ids, ones(32))
    inside = -(-tokens // 4) * 4
    assert error(wanted[:, :inside], whole(ids[:, :inside], causal)) < 1e-5
    assert error(wanted, whole(ids, causal)) > 1e-2, "the selection hides nothing that matters"


@pytest.mark.parametrize("score", ["minmax", "mean", "keys"])
def test_a_budget_no_smaller_than_the_text_is_dense_attention_at_every_length(score: str) -> None:
    ids = random_tokens(43)
    session = Session([[PageSelection(page_topk(43, page=2, score=score))]] * 2, page_size=6, max_length=47)
    assert error(session.feed(ids, ones(43)), whole(ids, causal)) < 1e-5
    session.reset()
    assert error(session.feed(ids, [19, *ones(24)]), whole(ids, causal)) < 1e-5


def test_a_budget_far_beyond_max_length_is_dense_attention() -> None:
    ids, session = random_tokens(24), Session([[PageSelection(page_topk(4096))]] * 2, page_size=64)
    assert error(session.feed(ids, [11, *ones(13)]), whole(ids, causal)) < 1e-5


@pytest.mark.parametrize("tokens", [12, 16, 28])
def test_the_static_part_is_kept_and_takes_its_share_of_the_budget(tokens: int) -> None:
    """Sink and window touch up to four pages, one more than the smallest budget has."""
    Session([[PageSelection(page_topk(tokens, page=4), STATIC)]] * 2).goes_as_written_out(random_tokens(40), [9, *ones(31)])


def test_the_newest_page_is_kept_where_the_static_part_uses_up_the_budget() -> None:
    Session([[PageSelection(page_topk(8, page=4), sink(8))]] * 2).goes_as_written_out(random_tokens(36), [9, *ones(27)])


@pytest.mark.parametrize("page_size", [1, 5, 64])
def test_pages_of_other_sizes(page_size: int) -> None:
    ids, selection = random_tokens(40), PageSelection(page_topk(10, page=1), sink(2))
    Session([[selection]] * 2, page_size=page_size).goes_as_written_out(ids, [13, *ones(27)])


# -- scores and groups ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "group"), [("minmax", "max"), ("minmax", "mean"), ("minmax", "sum"), ("mean", "mean"), ("keys", "max")]
)
def test_every_score_and_group_is_selected_as_written_out(score: str, group: str) -> None:
    selection = PageSelection(page_topk(12, page=2, score=score, group=group), sink(1))
    Session([[selection]] * 2).goes_as_written_out(random_tokens(36), [18, *ones(18)])


def test_scores_and_groups_choose_differently() -> None:
    """Otherwise the test above would show nothing."""
    ids, found = random_tokens(36), []
    for score in ("minmax", "mean", "keys"):
        for group in ("max", "mean"):
            session = Session([[PageSelection(page_topk(12, page=2, score=score, group=group), sink(1))]] * 2)
            found.append(session.oracle.feed(ids, [18, *ones(18)]))
    assert min(error(a, b) for i, a in enumerate(found) for b in found[:i]) > 1e-3


# -- prompts --------------------------------------------------------------------------------------------------------


def test_chunks_of_a_prompt_do_not_matter_to_what_is_selected() -> None:
    ids, session = random_tokens(44), Session([[PageSelection(page_topk(16, page=2), sink(2))]] * 2)
    for lengths in ([30], in_chunks(30, 7), [13, 3, 14], [4, 4, 4, 18]):
        session.reset()
        session.goes_as_written_out(ids, [*lengths, *ones(14)])


def test_second_turns_and_drafts_between_decode_steps() -> None:
    ids = random_tokens(60)
    Session([[PageSelection(page_topk(12, page=4))]] * 2).goes_as_written_out(
        ids, [13, *ones(9), 11, *ones(5), 2, *ones(10), 3, *ones(7)]
    )


def test_a_cache_is_filled_to_its_last_token() -> None:
    for max_length, page_size in ((25, 4), (30, 16)):
        torch._dynamo.reset()
        session = Session([[PageSelection(page_topk(8, page=4))]] * 2, page_size=page_size, max_length=max_length)
        session.goes_as_written_out(random_tokens(max_length), [15, *ones(max_length - 15)])
