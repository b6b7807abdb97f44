"""A prefill that selects: blocks of 128 queries select blocks of 128 keys by their mean query, compared with loops."""

from __future__ import annotations

import pytest
import torch

import sparse_compile as sc
from sparse_compile.masks import causal, page_topk, sink, sliding_window
from support.oracles.cache import error, random_tokens, whole
from support.oracles.selection import Head, Oracle, PageSelection, build, mask_of
from support.sessions.cache import ones
from support.sessions.selection import Session

STREAMING = causal & (sink(2) | sliding_window(6))
BLOCK = PageSelection(page_topk(128))
TWO_BLOCKS = PageSelection(page_topk(256, page=32, score="mean", group="mean"))

pytestmark = pytest.mark.usefixtures("fresh")


def prefill_session(layers: list[list[Head]], decode: list[list[Head]] | None = None) -> Session:
    return Session(decode or [[causal]] * 2, prefill=layers, max_length=512, page_size=16)


def test_chunks_of_one_query_block_select_as_written_out() -> None:
    ids, session = random_tokens(460), prefill_session([[BLOCK], [TWO_BLOCKS]])
    wanted = session.goes_as_written_out(ids, [128, 128, 100, 2, 70, *ones(2), 30])
    assert error(wanted, whole(ids, causal)) > 1e-2, "the selection hides nothing that matters"


def test_query_blocks_are_counted_from_the_first_query_of_a_chunk() -> None:
    session = prefill_session([[BLOCK], [TWO_BLOCKS]])
    for lengths in ([460], [70, 300, 90]):
        session.reset()
        session.goes_as_written_out(random_tokens(460), lengths)


@pytest.mark.parametrize("score", ["minmax", "mean", "keys"])
def test_every_score_chooses_blocks_as_written_out(score: str) -> None:
    selection = PageSelection(page_topk(200, page=8, score=score), sliding_window(40))
    prefill_session([[selection]] * 2).goes_as_written_out(random_tokens(400), [330, 70])


def test_a_budget_of_the_whole_prompt_is_dense_attention() -> None:
    ids, session = random_tokens(333), prefill_session([[PageSelection(page_topk(333))]] * 2)
    for lengths in ([333], [5, 200, 128]):
        session.reset()
        assert error(session.feed(ids, lengths), whole(ids, causal)) < 1e-5


def test_the_static_part_of_any_query_of_a_block_is_kept() -> None:
    """The sink is in the first block, the window reaches back two blocks, and both exceed the budget of two blocks."""
    layers: list[list[Head]] = [[PageSelection(page_topk(160), sink(3) | sliding_window(150))]] * 2
    prefill_session(layers).goes_as_written_out(random_tokens(420), [100, 320])


def test_heads_that_select_in_a_prefill_stand_beside_others() -> None:
    prefill_session([[BLOCK, STREAMING], [causal, BLOCK]]).goes_as_written_out(random_tokens(400), [300, 80, *ones(20)])


def test_decode_steps_select_for_themselves_after_a_prefill_that_selected() -> None:
    step = PageSelection(page_topk(48, page=8, every=3), sink(1))
    session = prefill_session([[BLOCK], [TWO_BLOCKS]], [[step], [step, causal]])
    session.goes_as_written_out(random_tokens(360), [200, 120, *ones(20), 8, *ones(12)])


def test_rows_of_a_batch_choose_blocks_each_for_itself() -> None:
    session = Session([[causal]] * 2, prefill=[[BLOCK]] * 2, max_length=512, page_size=16, max_batch=2)
    session.goes_as_written_out(random_tokens(300, batch=2), [300])


def test_a_prefill_without_a_cache_selects() -> None:
    ids = random_tokens(400)
    wanted = Oracle([[causal]] * 2, prefill=[[BLOCK]] * 2, page_size=4).feed(ids)
    model = sc.compile(build("llama"), sc.Policy(prefill=mask_of([BLOCK]), decode=causal), inner="eager")
    with torch.no_grad():
        assert error(model(ids, use_cache=False).logits, wanted) < 1e-5


def test_one_policy_selects_in_both_phases() -> None:
    selection = PageSelection(page_topk(128))
    session = Session([[selection]] * 2, prefill=[[selection]] * 2, max_length=512, page_size=16)
    assert session.policy.mask_for("", 0, "prefill") == session.policy.mask_for("", 0, "decode")
    session.goes_as_written_out(random_tokens(330), [310, *ones(20)])
