"""Compare SparseCache with whole texts under dense masks: prefill, decode, chunks, turns and padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, per_head, sliding_window
from support.oracles.cache import error, random_tokens, whole
from support.sessions.cache import (
    CAPACITY,
    DUO,
    NO_RETRIEVAL_BELOW,
    POLICIES,
    STREAMING,
    Session,
    assert_rows_alone,
    in_chunks,
    left_padded,
    ones,
)

pytestmark = pytest.mark.usefixtures("fresh")


# -- one text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICIES)
def test_prefill_and_decode_equal_one_pass(name: str) -> None:
    ids, policy = random_tokens(32), POLICIES[name]
    assert error(Session(policy).feed(ids, [17, *ones(15)]), whole(ids, policy)) < 1e-5


def test_the_policies_of_these_tests_hide_something_that_matters() -> None:
    ids = random_tokens(32)
    shown = [name for name, policy in POLICIES.items() if error(whole(ids, policy), whole(ids, causal)) < 1e-2]
    assert shown == ["dense", "no policy", "sees everything"]


@pytest.mark.parametrize("policy", [STREAMING, NO_RETRIEVAL_BELOW], ids=["rings", "rings and pages"])
def test_chunks_of_a_prompt_do_not_matter(policy: sc.Policy | Mask) -> None:
    ids = random_tokens(1003)
    wanted = whole(ids, policy)
    session = Session(policy, max_length=1024)
    for lengths in ([1003], [1000, 3], in_chunks(1003, 64), in_chunks(1003, 7), [60, *ones(100), 843]):
        session.cache.reset()
        assert error(session.feed(ids, lengths), wanted) < 1e-5, lengths[:2]


@pytest.mark.parametrize("page_size", [1, 5])
def test_a_ring_wraps_right_after_a_prompt_about_as_long_as_itself(page_size: int) -> None:
    ids, session = random_tokens(30), Session(STREAMING, page_size=page_size)
    wanted = whole(ids, STREAMING)
    slots = -(-CAPACITY // page_size) * page_size
    for prompt in (slots - 1, slots, slots + 1):
        session.cache.reset()
        assert error(session.feed(ids, [prompt, *ones(30 - prompt)]), wanted) < 1e-5, prompt


def test_a_ring_wraps_right_in_a_chunk_about_as_long_as_itself() -> None:
    ids, session = random_tokens(30), Session(STREAMING)
    wanted = whole(ids, STREAMING)
    for first in (1, 5):
        for second in (CAPACITY - 1, CAPACITY, CAPACITY + 1, 2 * CAPACITY):
            session.cache.reset()
            lengths = [first, second, *ones(30 - first - second)]
            assert error(session.feed(ids, lengths), wanted) < 1e-5, lengths


@pytest.mark.parametrize("name", ["streaming", "by KV head", "no retrieval head below"])
def test_a_second_turn_sees_the_first(name: str) -> None:
    ids, policy = random_tokens(50), POLICIES[name]
    lengths = [13, *ones(9), 11, *ones(5), 2, *ones(10)]
    assert error(Session(policy).feed(ids, lengths), whole(ids, policy)) < 1e-5


@pytest.mark.parametrize("name", ["streaming", "by query head", "no retrieval head above"])
def test_drafts_of_several_tokens_are_appended(name: str) -> None:
    ids, policy = random_tokens(40), POLICIES[name]
    assert error(Session(policy).feed(ids, [9, 4, 4, 1, 4, 3, 1, 1, 5, 8]), whole(ids, policy)) < 1e-5


def test_a_decode_step_stands_at_its_own_position_and_not_one_before_or_after() -> None:
    ids = random_tokens(20)
    session = Session(DUO)
    session.feed(ids[:, :12])
    wanted = whole(ids, DUO)
    for place in range(12, 20):
        got = session.feed(ids[:, place : place + 1])
        assert error(got, wanted[:, place : place + 1]) < 1e-5
    assert session.cache.get_seq_length() == 20
    late = torch.cat([ids[:, :1], ids[:, :19]], dim=1)
    assert error(whole(late, DUO)[:, 19], wanted[:, 18]) > 1e-2, "a step off by one would not show"


def test_a_cache_is_filled_to_its_last_token() -> None:
    ids = random_tokens(24)
    for policy in (DUO, STREAMING):
        torch._dynamo.reset()
        assert error(Session(policy, max_length=24).feed(ids, [20, *ones(4)]), whole(ids, policy)) < 1e-5


def test_a_ring_no_shorter_than_the_text_keeps_everything() -> None:
    ids = random_tokens(20)
    session = Session(STREAMING, max_length=20, page_size=64)
    assert error(session.feed(ids, [11, *ones(9)]), whole(ids, STREAMING)) < 1e-5


# -- phases and modes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "policy",
    [
        sc.Policy(prefill=STREAMING, decode=causal & sliding_window(3)),
        sc.Policy(prefill=causal & sliding_window(3), decode=STREAMING),
        sc.Policy(prefill=causal, decode=DUO),
        sc.Policy(prefill=DUO, decode=causal),
        sc.Policy(decode=STREAMING),
    ],
    ids=str,
)
def test_prefill_and_decode_each_follow_their_own_mask(policy: sc.Policy) -> None:
    ids = random_tokens(34)
    wanted = whole(ids, policy, decoded=range(20, 34))
    assert error(wanted, whole(ids, policy)) > 1e-2
    assert error(Session(policy).feed(ids, [13, 7, *ones(14)]), wanted) < 1e-5


@pytest.mark.parametrize(
    "name", ["streaming", "by KV head", "by query head", "no retrieval head below", "sink alone", "chunked"]
)
def test_a_relaxed_chunk_sees_itself_and_what_was_seen_just_before_it(name: str) -> None:
    ids, policy = random_tokens(44), POLICIES[name]
    lengths = [12, 9, 1, 1, 13, *ones(8)]
    wanted = whole(ids, policy, relaxed=lengths)
    assert error(wanted, whole(ids, policy)) > 1e-2
    assert error(Session(policy, mode="chunk_relaxed").feed(ids, lengths), wanted) < 1e-5


@pytest.mark.parametrize("policy", [STREAMING, DUO, per_head([causal, STREAMING, causal, STREAMING])], ids=str)
def test_a_relaxed_chunk_of_a_padded_row_begins_at_its_own_text(policy: Mask) -> None:
    ids, padding = random_tokens(30, batch=2), torch.ones(2, 30, dtype=torch.int64)
    padding[0, :5] = 0
    got = Session(policy, mode="chunk_relaxed", max_batch=2).feed_padded(ids, padding, [14, 9, *ones(7)])
    for row, first in ((0, 9), (1, 14)):
        text = ids[row : row + 1, 14 - first :]
        wanted = whole(text, policy, relaxed=[first, 9, *ones(7)])[0]
        assert error(got[row, 14 - first :], wanted) < 1e-5


# -- batches ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "streaming", "by KV head", "by query head", "no retrieval head below", "chunked"])
def test_padded_rows_equal_each_row_alone(name: str) -> None:
    policy = POLICIES[name]
    ids, padding = left_padded(30, [7, 0, 12])
    got = Session(policy, max_batch=3).feed_padded(ids, padding, [18, *ones(12)])
    assert_rows_alone(got, ids, padding, policy)


@pytest.mark.parametrize("name", ["streaming", "by KV head"])
def test_padded_rows_in_chunks_equal_each_row_alone_even_if_a_chunk_is_all_padding(name: str) -> None:
    policy = POLICIES[name]
    ids, padding = left_padded(30, [9, 0, 1])
    got = Session(policy, max_batch=3).feed_padded(ids, padding, [6, 6, 6, *ones(12)])
    assert_rows_alone(got, ids, padding, policy)


@pytest.mark.parametrize("name", ["streaming", "by KV head"])
def test_padding_between_two_turns_is_no_part_of_the_text(name: str) -> None:
    policy = POLICIES[name]
    ids, padding = left_padded(40, [4, 0])
    padding[1, 12:15] = 0  # padding at the end of the first prompt
    padding[0, 20:27] = 0  # padding at the start of the second prompt
    got = Session(policy, max_batch=2).feed_padded(ids, padding, [15, *ones(5), 11, *ones(9)])
    assert_rows_alone(got, ids, padding, policy)


@pytest.mark.parametrize("name", ["streaming", "by KV head"])
def test_a_decode_step_of_padding_changes_nothing_in_its_row(name: str) -> None:
    policy = POLICIES[name]
    ids, padding = left_padded(30, [3, 0])
    padding[0, 16:19] = 0
    padding[1, 22] = 0
    got = Session(policy, max_batch=2).feed_padded(ids, padding, [14, *ones(16)])
    assert_rows_alone(got, ids, padding, policy)


@pytest.mark.parametrize("name", ["streaming", "by KV head"])
def test_a_batch_may_be_smaller_than_the_cache_and_another_after_a_reset(name: str) -> None:
    policy = POLICIES[name]
    session = Session(policy, max_batch=4)
    for batch in (2, 4, 1):
        ids = random_tokens(24, batch, seed=batch)
        assert error(session.feed(ids, [13, *ones(11)]), whole(ids, policy)) < 1e-5
        session.cache.reset()
        assert session.cache.get_seq_length() == 0


@pytest.mark.parametrize("name", ["streaming", "by KV head"])
def test_generate_with_padding_equals_each_row_alone(name: str) -> None:
    policy = POLICIES[name]
    ids, padding = left_padded(18, [7, 0])
    session = Session(policy, max_batch=2)
    stop = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    both = session.model.generate(ids, attention_mask=padding, past_key_values=session.cache, **stop)
    for row, pad in enumerate((7, 0)):
        text = both[row : row + 1, pad:]
        wanted = whole(text, policy)[:, :-1]
        wanted[:, :, 2] = -torch.inf  # the end-of-text token, which min_new_tokens forbids
        assert text[0, 18 - pad :].tolist() == wanted[0, 17 - pad :].argmax(dim=-1).tolist()


def test_rows_can_be_put_in_another_order() -> None:
    ids = random_tokens(30, batch=3)
    session = Session(NO_RETRIEVAL_BELOW, max_batch=3)
    session.feed(ids[:, :20], [15, *ones(5)])
    order = torch.tensor([2, 0, 2])
    session.cache.reorder_cache(order)
    texts = torch.cat([ids[order, :20], ids[:, 20:]], dim=1)
    assert error(session.feed(texts[:, 20:], ones(10)), whole(texts, NO_RETRIEVAL_BELOW)[:, 20:]) < 1e-5


@pytest.mark.parametrize("indices", [torch.tensor([3, 1]), torch.tensor([False, True, False, True])], ids=["numbers", "bools"])
def test_some_rows_can_be_kept(indices: Tensor) -> None:
    ids = random_tokens(30, batch=4)
    session = Session(NO_RETRIEVAL_BELOW, max_batch=4)
    session.feed(ids[:, :20], [15, *ones(5)])
    session.cache.batch_select_indices(indices)
    texts = ids[indices]
    assert error(session.feed(texts[:, 20:], ones(10)), whole(texts, NO_RETRIEVAL_BELOW)[:, 20:]) < 1e-5


def test_rows_can_be_repeated_and_go_on_apart() -> None:
    ids, later = random_tokens(20, batch=2), random_tokens(10, batch=4, seed=5)
    session = Session(NO_RETRIEVAL_BELOW, max_batch=4)
    session.feed(ids, [15, *ones(5)])
    session.cache.batch_repeat_interleave(2)
    texts = torch.cat([ids.repeat_interleave(2, dim=0), later], dim=1)
    assert error(session.feed(later, [4, *ones(6)]), whole(texts, NO_RETRIEVAL_BELOW)[:, 20:]) < 1e-5


def test_padded_rows_can_be_reordered_and_cropped() -> None:
    ids, padding = left_padded(30, [7, 0])
    session = Session(NO_RETRIEVAL_BELOW, max_batch=2, rollback=3)
    session.feed_padded(ids[:, :20], padding, [15, *ones(5)])
    session.cache.crop(-3)
    session.cache.reorder_cache(torch.tensor([1, 0]))
    turned, turned_padding = ids.flip(0), padding.flip(0)
    got, positions = [], (turned_padding.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        for at in range(17, 30):
            step = slice(at, at + 1)
            inputs = {"attention_mask": turned_padding[:, : at + 1], "position_ids": positions[:, step]}
            got.append(session.model(turned[:, step], past_key_values=session.cache, **inputs).logits)
    logits = torch.cat([torch.zeros(2, 17, got[0].shape[2]), *got], dim=1)
    for row, pad in ((0, 0), (1, 7)):
        wanted = whole(turned[row : row + 1, pad:], NO_RETRIEVAL_BELOW)
        assert error(logits[row, 17:], wanted[0, 17 - pad :]) < 1e-5
