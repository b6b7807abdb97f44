"""A cache that selects pages still equals the loops after a reset, rollback, save, load or copy."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest

import sparse_compile as sc
from sparse_compile.masks import page_topk, sink
from support.oracles.cache import error, random_tokens
from support.oracles.selection import Head, PageSelection
from support.sessions.cache import ones
from support.sessions.selection import Session

MINMAX, MEAN, KEYS = (PageSelection(page_topk(12, page=2, score=score)) for score in ("minmax", "mean", "keys"))
MIXED: list[list[Head]] = [[MINMAX, MEAN], [KEYS, MINMAX]]
EVERY = PageSelection(page_topk(12, page=2, every=3), sink(1))

pytestmark = pytest.mark.usefixtures("fresh")


# -- nothing stale --------------------------------------------------------------------------------------------------


def test_nothing_of_an_earlier_text_is_left_after_a_reset() -> None:
    """Keys of the earlier text are a hundred times larger, so a minimum or maximum that was left over would win."""
    session = Session(MIXED)
    weights = [layer.self_attn.k_proj.weight for layer in session.model.model.layers]
    ids = random_tokens(40)
    for weight in weights:
        weight.data.mul_(100)
    session.feed(random_tokens(50, seed=9), [33, *ones(17)])
    for weight in weights:
        weight.data.div_(100)
    session.reset()
    session.goes_as_written_out(ids, [17, *ones(23)])
    session.reset()
    session.goes_as_written_out(ids, [5, 6, *ones(29)])


def test_nothing_of_a_rejected_draft_is_left_after_a_rollback() -> None:
    """The draft writes to pages that remain and, in decode steps, to later pages. Its keys are a hundred times larger."""
    session = Session(MIXED)
    weights = [layer.self_attn.k_proj.weight for layer in session.model.model.layers]
    ids = random_tokens(40)
    session.goes_as_written_out(ids[:, :22], [15, *ones(7)])
    for draft in ([5], ones(7), [3, *ones(2)]):
        for weight in weights:
            weight.data.mul_(100)
        session.feed(random_tokens(sum(draft), seed=9), draft)
        session.cache.crop(-sum(draft))
        for weight in weights:
            weight.data.div_(100)
        session.oracle.forget_scores()
        at = session.cache.get_seq_length()
        session.goes_as_written_out(ids[:, at : at + 5], ones(5))


def test_a_rollback_is_as_if_the_tokens_had_never_been_there() -> None:
    ids, session = random_tokens(45), Session(MIXED)
    for remove in (1, 3, 4, 9):
        session.reset()
        session.goes_as_written_out(ids[:, :25], [14, *ones(11)])
        session.goes_as_written_out(random_tokens(remove, seed=9), ones(remove))
        session.crop(remove)
        session.goes_as_written_out(ids[:, 25:], ones(20))


def test_a_rollback_of_everything_is_an_empty_cache() -> None:
    session = Session(MIXED)
    session.goes_as_written_out(random_tokens(20, seed=9), [9, *ones(11)])
    session.cache.crop(-20)
    session.oracle.reset()
    session.goes_as_written_out(random_tokens(30), [9, *ones(21)])


def test_a_refused_step_leaves_the_selection_as_it_was() -> None:
    ids, session = random_tokens(30), Session([[EVERY]] * 2, max_length=30)
    session.goes_as_written_out(ids[:, :22], [14, *ones(8)])
    with pytest.raises(sc.SparseCacheError, match="max_length=30"):
        session.feed(random_tokens(9, seed=9))
    session.goes_as_written_out(ids[:, 22:], ones(8))


# -- files and copies -----------------------------------------------------------------------------------------------


def test_a_saved_cache_goes_on_where_it_was_also_in_a_longer_one(tmp_path: Path) -> None:
    ids, session = random_tokens(44), Session([[MINMAX, MEAN], [KEYS, EVERY]])
    session.goes_as_written_out(ids[:, :24], [14, *ones(10)])
    session.cache.save(tmp_path / "prompt")
    session.oracle.forget_scores()
    wanted = session.oracle.feed(ids[:, 24:], ones(20))
    for max_length in (64, 90):
        session.cache = session.another(max_length=max_length)
        session.feed(random_tokens(40, seed=9), [29, *ones(11)])
        session.cache.load(tmp_path / "prompt")
        assert error(session.feed(ids[:, 24:], ones(20)), wanted) < 1e-5, max_length


def test_a_copy_goes_on_by_itself() -> None:
    ids, session = random_tokens(40), Session([[MINMAX, MEAN], [KEYS, EVERY]])
    session.goes_as_written_out(ids[:, :25], [14, *ones(11)])
    ours, copied = session.cache, deepcopy(session.cache)
    session.feed(random_tokens(15, seed=9), ones(15))
    wanted = session.oracle.feed(ids[:, 25:], ones(15))
    session.cache = copied
    assert error(session.feed(ids[:, 25:], ones(15)), wanted) < 1e-5
    assert ours.get_seq_length() == 40


def test_two_caches_of_a_model_take_turns() -> None:
    texts = random_tokens(40, batch=2)
    session = Session([[MINMAX, MEAN], [KEYS, EVERY]])
    wanted = session.oracle.feed(texts, [15, *ones(25)])
    caches, got = [session.cache, session.another()], []
    for at, size in enumerate([15, *ones(25)]):
        step = slice(14 + at, 15 + at) if at else slice(0, 15)
        for row, session.cache in enumerate(caches):
            got.append((row, step, session.feed(texts[row : row + 1, step], [size])))
    assert max(error(logits[0], wanted[row, step]) for row, step, logits in got) < 1e-5
