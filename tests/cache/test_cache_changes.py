"""A SparseCache that is rolled back, saved or loaded gives the same logits as whole texts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sparse_compile as sc
from support.oracles.cache import error, random_tokens, whole
from support.sessions.cache import NO_RETRIEVAL_BELOW, POLICIES, STREAMING, Session, left_padded, ones

pytestmark = pytest.mark.usefixtures("fresh")


# -- rollback -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "streaming", "by KV head", "no retrieval head below", "sink alone"])
def test_a_rollback_is_as_if_the_tokens_had_never_been_there(name: str) -> None:
    policy = POLICIES[name]
    ids, session = random_tokens(40), Session(policy, rollback=5)
    wanted = whole(ids, policy)
    for remove in (1, 5):
        session.cache.reset()
        session.feed(ids[:, :25], [14, *ones(11)])
        session.feed(random_tokens(remove, seed=9), ones(remove))
        session.cache.crop(-remove)
        assert session.cache.get_seq_length() == 25
        assert error(session.feed(ids[:, 25:], ones(15)), wanted[:, 25:]) < 1e-5, remove


def test_a_rejected_draft_of_one_chunk_is_rolled_back() -> None:
    """This includes a chunk that is longer than the ring and whose first tokens are kept."""
    ids, session = random_tokens(40), Session(NO_RETRIEVAL_BELOW, rollback=4)
    wanted = whole(ids, NO_RETRIEVAL_BELOW)
    for stays in (15, 30):
        session.cache.reset()
        session.feed(ids[:, :10])
        session.feed(torch.cat([ids[:, 10:stays], random_tokens(4, seed=9)], dim=1))
        session.cache.crop(-4)
        assert error(session.feed(ids[:, stays:], ones(40 - stays)), wanted[:, stays:]) < 1e-5, stays


def test_rollbacks_follow_one_another_if_the_ring_is_filled_again_between_them() -> None:
    ids = random_tokens(40)
    session = Session(STREAMING, rollback=3)
    at = 12
    session.feed(ids[:, :at])
    for seed in range(4):
        session.feed(random_tokens(3, seed=seed))
        session.cache.crop(-3)
        session.feed(ids[:, at : at + 4])
        at += 4
    assert error(session.feed(ids[:, at:], ones(40 - at)), whole(ids, STREAMING)[:, at:]) < 1e-5


def test_a_ring_that_has_not_wrapped_can_be_rolled_back_without_room_for_it() -> None:
    ids = random_tokens(20)
    session = Session(STREAMING)
    session.feed(ids[:, :4])
    session.feed(random_tokens(3, seed=9))
    session.cache.crop(-3)
    assert error(session.feed(ids[:, 4:], ones(16)), whole(ids, STREAMING)[:, 4:]) < 1e-5


@pytest.mark.parametrize("name", ["streaming", "by KV head"])
def test_a_rollback_of_everything_is_an_empty_cache(name: str) -> None:
    ids, policy = random_tokens(20), POLICIES[name]
    session = Session(policy)
    session.feed(random_tokens(7, seed=9))
    session.cache.crop(-7)
    assert session.cache.get_seq_length() == 0
    assert error(session.feed(ids, [9, *ones(11)]), whole(ids, policy)) < 1e-5


@pytest.mark.parametrize("name", ["streaming", "by KV head", "no retrieval head below"])
def test_a_rollback_beyond_the_room_for_it_is_refused_and_changes_nothing(name: str) -> None:
    ids, policy = random_tokens(40), POLICIES[name]
    session = Session(policy, rollback=2)
    session.feed(ids[:, :25], [14, *ones(11)])
    for remove in (4, 9, 20):
        with pytest.raises(sc.SparseCacheError, match=rf"{remove} tokens cannot be removed"):
            session.cache.crop(-remove)
    assert session.cache.get_seq_length() == 25
    assert error(session.feed(ids[:, 25:], ones(15)), whole(ids, policy)[:, 25:]) < 1e-5


# -- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dense", "streaming", "no retrieval head below"])
def test_a_saved_cache_goes_on_where_it_was_also_in_a_longer_one(name: str, tmp_path: Path) -> None:
    ids, policy = random_tokens(40), POLICIES[name]
    session = Session(policy, max_length=40)
    session.feed(ids[:, :25], [14, *ones(11)])
    session.cache.save(tmp_path / "prompt")
    wanted = whole(ids, policy)[:, 25:]
    for max_length in (40, 80):
        session.cache = session.another(max_length=max_length)
        session.cache.load(tmp_path / "prompt")
        assert session.cache.get_seq_length() == 25
        assert error(session.feed(ids[:, 25:], ones(15)), wanted) < 1e-5, max_length


def test_a_file_replaces_what_the_cache_held(tmp_path: Path) -> None:
    ids = random_tokens(40)
    session = Session(NO_RETRIEVAL_BELOW)
    session.feed(ids[:, :12])
    session.cache.save(tmp_path / "prompt")
    session.feed(random_tokens(25, seed=9))
    session.cache.load(tmp_path / "prompt")
    assert error(session.feed(ids[:, 12:], ones(28)), whole(ids, NO_RETRIEVAL_BELOW)[:, 12:]) < 1e-5


def test_padded_rows_go_on_from_a_file_in_a_cache_of_more_rows(tmp_path: Path) -> None:
    ids, padding = left_padded(30, [7, 0])
    session = Session(NO_RETRIEVAL_BELOW, max_batch=2)
    session.feed_padded(ids[:, :18], padding, [18])
    session.cache.save(tmp_path / "prompt")
    session.options["max_batch"] = 3
    session.cache = session.another()
    session.cache.load(tmp_path / "prompt")
    positions = padding.cumsum(dim=1) - 1
    for at in range(18, 30):
        seen, place = padding[:, : at + 1], positions[:, at : at + 1]
        last = session.feed(ids[:, at : at + 1], attention_mask=seen, position_ids=place)
    for row, pad in ((0, 7), (1, 0)):
        assert error(last[row, -1], whole(ids[row : row + 1, pad:], NO_RETRIEVAL_BELOW)[0, -1]) < 1e-5


def test_an_empty_cache_is_saved_and_loaded(tmp_path: Path) -> None:
    ids = random_tokens(20)
    session = Session(NO_RETRIEVAL_BELOW)
    session.cache.save(tmp_path / "prompt")
    session.feed(random_tokens(25, seed=9))
    session.cache.load(tmp_path / "prompt")
    assert session.cache.get_seq_length() == 0
    assert error(session.feed(ids, [9, *ones(11)]), whole(ids, NO_RETRIEVAL_BELOW)) < 1e-5
