"""Scores that serve several steps or layers select the same pages as loops."""

from __future__ import annotations

import pytest
from torch._dynamo.utils import counters

from sparse_compile.masks import causal, page_topk, sink, sliding_window
from support.oracles.cache import error, random_tokens
from support.oracles.selection import Oracle, PageSelection
from support.sessions.cache import left_padded, ones
from support.sessions.selection import Session

STREAMING = causal & (sink(2) | sliding_window(6))

pytestmark = pytest.mark.usefixtures("fresh")


# -- reused scores --------------------------------------------------------------------------------------------------


def test_scores_are_used_for_so_many_steps() -> None:
    ids = random_tokens(52)
    twos, threes, fours, fives = (PageSelection(page_topk(12, page=2, every=every), sink(1)) for every in (2, 3, 4, 5))
    wanted = Session([[twos, threes], [fours, fives]]).goes_as_written_out(ids, [18, *ones(34)])
    each_step = Oracle([[PageSelection(page_topk(12, page=2), sink(1))]] * 2, page_size=4)
    assert error(each_step.feed(ids, [18, *ones(34)]), wanted) > 1e-3, "old scores choose as new ones do"


def test_steps_that_score_and_steps_that_do_not_are_one_graph() -> None:
    session = Session([[PageSelection(page_topk(12, page=2, every=3))], [PageSelection(page_topk(12, page=2, share=0))]])
    session.feed(random_tokens(20), [18, *ones(2)])
    graphs = counters["stats"]["unique_graphs"]
    session.feed(random_tokens(20), ones(20))
    session.cache.crop(-3)
    session.feed(random_tokens(9), ones(9))
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.parametrize("score", ["mean", "keys"])
def test_other_scores_are_used_again_as_well(score: str) -> None:
    selection = PageSelection(page_topk(12, page=2, every=3, score=score), sink(1))
    Session([[selection, causal], [STREAMING, selection]]).goes_as_written_out(random_tokens(46), [18, *ones(28)])


def test_scores_longer_in_use_than_the_budget_has_pages_keep_the_newest_page() -> None:
    """Ten steps fill five pages of two keys, but the budget is three pages."""
    session = Session([[PageSelection(page_topk(6, page=2, every=10))]] * 2, page_size=2)
    session.goes_as_written_out(random_tokens(50), [15, *ones(35)])


def test_scores_are_made_anew_after_a_chunk_a_rollback_and_a_reset() -> None:
    ids, session = random_tokens(60), Session([[PageSelection(page_topk(12, page=2, every=5))]] * 2)
    session.goes_as_written_out(ids[:, :41], [18, *ones(7), 4, *ones(6), 2, *ones(4)])
    session.crop(2)
    session.goes_as_written_out(ids[:, 41:50], ones(9))
    session.reset()
    session.goes_as_written_out(ids[:, :30], [18, *ones(12)])


def test_a_prompt_token_by_token_is_scored_from_the_first_on() -> None:
    Session([[PageSelection(page_topk(12, page=2, every=3))]] * 2).goes_as_written_out(random_tokens(33), ones(33))


def test_the_static_part_of_old_scores_is_of_now() -> None:
    """The window moves on while the scores stay the same."""
    selection = PageSelection(page_topk(20, page=2, every=5), sliding_window(6))
    Session([[selection, causal]] * 2).goes_as_written_out(random_tokens(46), [18, *ones(28)])


# -- scores of another layer ----------------------------------------------------------------------------------------


def test_a_layer_uses_the_scores_of_its_leader() -> None:
    ids = random_tokens(40)
    session = Session([[PageSelection(page_topk(12, page=2))], [PageSelection(page_topk(12, page=2, share={1: 0}))]])
    wanted = session.goes_as_written_out(ids, [17, *ones(23)])
    alone = Oracle([[PageSelection(page_topk(12, page=2))]] * 2, page_size=4)
    assert error(alone.feed(ids, [17, *ones(23)]), wanted) > 1e-3, "the layers choose alike anyway"


def test_followers_have_a_budget_and_a_static_part_of_their_own() -> None:
    leader = PageSelection(page_topk(12, page=2, every=3), sink(1))
    follower = PageSelection(page_topk(20, page=2, every=3, share=0), sliding_window(5))
    Session([[leader], [follower]]).goes_as_written_out(random_tokens(44), [17, *ones(27)])


def test_leaders_of_leaders_serve_all_layers_and_heads() -> None:
    shared = page_topk(12, page=2, every=2, share={1: 0, 2: 1})
    heads = [PageSelection(shared), PageSelection(page_topk(8, page=2, every=2, share={1: 0, 2: 1}))]
    session = Session([list(heads), [heads[0], causal], [causal, heads[0]]], name="llama of three layers")
    session.goes_as_written_out(random_tokens(36), [17, *ones(19)])


def test_padded_rows_use_their_own_scores_again() -> None:
    ids, padding = left_padded(40, [7, 0, 3])
    leader, follower = PageSelection(page_topk(12, page=4, every=4)), PageSelection(page_topk(12, page=4, every=4, share=0))
    session = Session([[leader], [follower]], max_batch=3)
    session.rows_go_as_written_out(ids, [16, *ones(9), 5, *ones(10)], padding)
