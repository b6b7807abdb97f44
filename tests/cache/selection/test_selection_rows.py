"""Each row of a batch selects its own pages like the loops, with padding and after the rows change."""

from __future__ import annotations

import pytest
import torch

from sparse_compile.masks import causal, page_topk, sink, sliding_window
from support.oracles.cache import error, random_tokens
from support.oracles.selection import Head, PageSelection
from support.sessions.cache import left_padded, ones
from support.sessions.selection import Session

STREAMING = causal & (sink(2) | sliding_window(6))
MINMAX, MEAN, KEYS = (PageSelection(page_topk(12, page=2, score=score)) for score in ("minmax", "mean", "keys"))
MIXED: list[list[Head]] = [[MINMAX, MEAN], [KEYS, MINMAX]]
SELECTING = PageSelection(page_topk(12, page=4))
EVERY = PageSelection(page_topk(12, page=2, every=3), sink(1))

pytestmark = pytest.mark.usefixtures("fresh")


def both_layers(*heads: Head) -> list[list[Head]]:
    return [list(heads)] * 2


def test_generate_takes_the_most_likely_tokens_under_the_selection() -> None:
    ids, padding = left_padded(18, [7, 0])
    session = Session([[SELECTING], [PageSelection(page_topk(12, page=2, every=3), sink(1))]], max_batch=2)
    stop = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    text = session.model.generate(ids, attention_mask=padding, past_key_values=session.cache, **stop)
    padding = torch.nn.functional.pad(padding, (0, 20), value=1)
    wanted = session.oracle.feed(text, [18, *ones(20)], padding)[:, :-1]
    wanted[:, :, 2] = -torch.inf  # the end-of-text token, which min_new_tokens forbids
    assert torch.equal(text[:, 18:], wanted[:, 17:].argmax(dim=-1))


def test_rows_of_a_batch_select_each_for_itself() -> None:
    ids = random_tokens(32, batch=3)
    session = Session(both_layers(PageSelection(page_topk(12, page=2), sink(1))), max_batch=4)
    session.goes_as_written_out(ids, [15, *ones(17)])
    session.reset()
    wanted = session.oracle.feed(ids[1:2], [15, *ones(17)])
    assert error(session.feed(ids, [15, *ones(17)])[1:2], wanted) < 1e-5


@pytest.mark.parametrize(("score", "pads"), [("minmax", [6, 0, 10]), ("mean", [7, 1, 13]), ("keys", [5, 2, 12])])
def test_padding_on_the_left_is_nothing_to_select(score: str, pads: list[int]) -> None:
    ids, padding = left_padded(36, pads)
    session = Session(both_layers(PageSelection(page_topk(12, page=2, score=score), sliding_window(3))), max_batch=3)
    session.rows_go_as_written_out(ids, [18, *ones(18)], padding)


def test_padded_rows_fill_a_cache_that_is_no_whole_number_of_pages() -> None:
    ids, padding = left_padded(25, [6, 0])
    session = Session([[MINMAX, MEAN], [KEYS, SELECTING]], page_size=8, max_length=25, max_batch=2)
    session.rows_go_as_written_out(ids, [13, *ones(12)], padding)


def test_padding_between_turns_and_in_decode_steps() -> None:
    ids, padding = left_padded(44, [4, 0])
    padding[1, 12:17] = padding[0, 20:29] = padding[1, 33] = 0
    session = Session(both_layers(PageSelection(page_topk(12, page=4), sink(1)), causal), max_batch=2)
    session.rows_go_as_written_out(ids, [15, *ones(5), 11, *ones(13)], padding)


def test_rows_in_another_order_select_as_their_texts_do() -> None:
    ids = random_tokens(40, batch=3)
    session = Session([[EVERY, STREAMING], [MEAN, EVERY]], max_batch=3)
    session.goes_as_written_out(ids[:, :26], [15, *ones(11)])
    order = torch.tensor([2, 0, 2])
    session.reorder(order)
    session.goes_as_written_out(ids[:, 26:], ones(14))


def test_rows_that_are_kept_or_repeated_select_as_their_texts_do() -> None:
    ids = random_tokens(40, batch=3)
    session = Session(MIXED, max_batch=4)
    session.goes_as_written_out(ids[:, :21], [15, *ones(6)])
    session.cache.batch_select_indices(torch.tensor([2, 0]))
    session.oracle.reorder(torch.tensor([2, 0]))
    session.goes_as_written_out(ids[:2, 21:27], ones(6))
    session.cache.batch_repeat_interleave(2)
    session.oracle.reorder(torch.tensor([0, 0, 1, 1]))
    session.goes_as_written_out(random_tokens(10, batch=4, seed=5), ones(10))


def test_a_batch_may_be_smaller_than_the_cache_and_another_after_a_reset() -> None:
    session = Session([[MINMAX, MEAN], [KEYS, EVERY]], max_batch=3)
    for batch in (2, 3, 1):
        session.reset()
        session.goes_as_written_out(random_tokens(32, batch, seed=batch), [13, *ones(19)])


def test_padded_rows_are_reordered_and_rolled_back() -> None:
    ids, padding = left_padded(40, [7, 0])
    session = Session([[PageSelection(page_topk(12, page=4), sink(1))]] * 2, max_batch=2)
    session.rows_go_as_written_out(ids[:, :22], [15, *ones(7)], padding[:, :22])
    session.crop(3)
    session.reorder(torch.tensor([1, 0]))
    session.rows_go_as_written_out(ids[:, 22:].flip(0), ones(18), padding.flip(0)[:, :37])
