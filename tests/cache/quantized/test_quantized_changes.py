"""A quantized cache that is rolled back, reordered, saved or copied equals a cache that never saw the other tokens."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_compile as sc
from sparse_compile.cache.kv_format import ByLayer
from sparse_compile.masks import causal, page_topk, sink, sliding_window
from sparse_compile.passes.storage.codec import LEVELS
from support.oracles.cache import error
from support.oracles.selection import Head, PageSelection
from support.sessions.cache import ones
from support.sessions.quantized import Session, Text, assert_codes_of_whole_text, assert_same_bits, bits, random_text

MIXED: ByLayer = [["int8", sc.KVFormat("int4", "fp8", key_group=8)], ["int4", None]]
STREAMING = causal & (sink(2) | sliding_window(6))
MINMAX = PageSelection(page_topk(24, page=4), sink(2))
SELECTING: list[list[Head]] = [[MINMAX, causal], [STREAMING, MINMAX]]


def draft(length: int, batch: int = 1) -> Text:
    """Tokens to remove, whose keys and values would be the smallest and largest of every group."""
    text = random_text(length, batch=batch, seed=9)
    return Text(text.q, text.k * 100, text.v * 100)


def left_padding(pads: list[int], columns: int) -> Tensor:
    return torch.arange(columns) >= torch.tensor(pads)[:, None]


# -- rollback -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [20, 50, 64, 93])
def test_codes_after_a_rollback_are_as_if_the_tokens_had_never_been_there(at: int) -> None:
    """This holds for as many tokens as the tail has beyond the group that is being filled: 33 with pages of 32 tokens."""
    text, session = random_text(128), Session(MIXED, max_length=128)
    for remove in (1, 5, 33):
        for lengths in ([remove], ones(remove)):
            session.reset()
            session.feed(text.at(0, at))
            session.feed(draft(remove), lengths)
            session.cache.crop(-remove)
            assert session.cache.get_seq_length() == at
            session.feed(text.at(at), [1, 1, 128 - at - 2])
            assert_codes_of_whole_text(session, text)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_to_the_end_of_the_cache_after_a_rollback_leaves_full_groups_as_they_are(dtype: torch.dtype) -> None:
    """The chunk reads more groups than it writes to, and the tail has already lost some of them."""
    session = Session("int8", max_length=128, dtype=dtype)
    for seed in range(4):
        text, lost = (Text(*(x.to(dtype) for x in some)) for some in (random_text(128, seed=seed), draft(33)))
        session.reset()
        session.feed(text.at(0, 50))
        session.feed(lost)
        session.cache.crop(-33)
        session.feed(text.at(50))
        assert_codes_of_whole_text(session, text)


def test_a_rollback_is_as_if_the_tokens_had_never_been_there_also_to_what_is_selected() -> None:
    text, session = random_text(70), Session([["int8", "int4"], [None, "fp8"]], SELECTING, page_size=8, rollback=10)
    session.goes_as_written_out(text.at(0, 40), [30, *ones(10)])
    for remove in (1, 10):
        session.goes_as_written_out(draft(remove), ones(remove))
        session.crop(remove)
    session.goes_as_written_out(text.at(40), [*ones(10), 20])
    assert_codes_of_whole_text(session, text)


def test_rollback_makes_room_for_longer_ones() -> None:
    text, session = random_text(96), Session(MIXED, max_length=160, rollback=64)
    session.feed(text.at(0, 90))
    session.feed(draft(64))
    session.cache.crop(-64)
    session.feed(text.at(90), ones(6))
    assert_codes_of_whole_text(session, text)


def test_rollbacks_follow_one_another() -> None:
    text, session = random_text(96), Session(MIXED)
    session.feed(text.at(0, 40))
    for at in range(40, 80, 8):
        session.feed(draft(5))
        session.cache.crop(-5)
        session.feed(text.at(at, at + 8), [3, *ones(5)])
    assert_codes_of_whole_text(session, text.at(0, 80))


def test_padded_rows_are_rolled_back() -> None:
    text, padding = random_text(80, batch=2), left_padding([37, 0], 96)
    session = Session(MIXED, max_batch=2)
    session.goes_as_written_out(text.at(0, 50), padding=padding)
    session.goes_as_written_out(draft(20, batch=2), [15, *ones(5)], padding)
    session.crop(20)
    session.goes_as_written_out(text.at(50), [7, *ones(23)], padding)
    assert_codes_of_whole_text(session, text, padding)


@pytest.mark.parametrize("kind", LEVELS)
def test_after_a_rollback_beyond_the_tail_numbers_are_within_a_step_of_their_codes(kind: str) -> None:
    """A group that is filled further is quantized twice, each time within half a step. Earlier groups do not change."""
    text, session = random_text(160), Session(kind, max_length=160)
    session.feed(text)
    for at in (120, 77, 40):
        before, full = bits(session.cache), at // 32 * 32
        session.cache.crop(at - session.cache.get_seq_length())
        session.feed(text.at(at, at + 5), ones(5))
        for then, now, (_, tokens) in zip(
            before, bits(session.cache), session.cache.cached_layers[0].quantized_parts() * 2, strict=True
        ):
            assert torch.equal(then[:, :, : full // tokens], now[:, :, : full // tokens])
        session.held = text.at(0, at + 5)
        keys, group = session.decoded(1)[0][:, :, full:], text.k[1][:, :, full : full + 32]  # with every token that it ever had
        least, largest = group.amin(dim=2), group.amax(dim=2)
        bound = (largest - least) / LEVELS[kind] * 1.01 + 2 * least.abs() * 2**-11
        far = (keys - group[:, :, : at + 5 - full]).abs().amax(dim=2)
        assert bool((far <= bound).all()) and bool((far > bound / 10).any())


def test_a_rollback_beyond_the_tail_attends_to_what_the_codes_stand_for() -> None:
    text, session = random_text(160), Session(MIXED, max_length=160)
    session.goes_as_written_out(text)
    for remove in (100, 20):
        session.crop(remove)
        at = session.cache.get_seq_length()
        session.goes_as_written_out(random_text(10, seed=at), [4, *ones(6)])


def test_a_rollback_of_everything_is_an_empty_cache() -> None:
    text, session = random_text(70), Session(MIXED)
    session.feed(draft(50))
    session.cache.crop(-50)
    assert session.cache.get_seq_length() == 0
    session.goes_as_written_out(text, [9, *ones(11), 50])
    assert_codes_of_whole_text(session, text)


def test_nothing_of_an_earlier_text_is_left_after_a_reset() -> None:
    text, session = random_text(70), Session([["int8", "int4"], [None, "fp8"]], SELECTING, page_size=8)
    session.feed(draft(90), [70, *ones(20)])
    session.reset()
    session.goes_as_written_out(text, [9, *ones(11), 50])
    assert_codes_of_whole_text(session, text)


# -- rows ---------------------------------------------------------------------------------------------------------------


def turned(session: Session, rows: Tensor) -> None:
    """Reorder the contents of the oracle like those of the cache."""
    assert session.held is not None
    session.held, session.oracle.padding = session.held.rows(rows), session.oracle.padding[rows]
    session.oracle.forget_scores()


@pytest.mark.parametrize("layers", [None, SELECTING], ids=["all", "selecting"])
def test_rows_can_be_put_in_another_order(layers: list[list[Head]] | None) -> None:
    text, order = random_text(70, batch=3), torch.tensor([2, 0, 2])
    session = Session(MIXED, layers, page_size=8, max_batch=3)
    session.goes_as_written_out(text.at(0, 45), [40, *ones(5)])
    session.cache.reorder_cache(order)
    turned(session, order)
    session.goes_as_written_out(text.at(45), [*ones(10), 15])
    assert_codes_of_whole_text(session, text.at(0, 45).rows(order).then(text.at(45)))


@pytest.mark.parametrize("indices", [torch.tensor([3, 1]), torch.tensor([False, True, False, True])], ids=["numbers", "bools"])
def test_some_rows_can_be_kept(indices: Tensor) -> None:
    text, session = random_text(70, batch=4), Session(MIXED, max_batch=4)
    session.goes_as_written_out(text.at(0, 45), [40, *ones(5)])
    session.cache.batch_select_indices(indices)
    turned(session, indices)
    rows = text.rows(indices)
    session.goes_as_written_out(rows.at(45), [*ones(10), 15])
    assert_codes_of_whole_text(session, rows)


def test_rows_can_be_repeated_and_go_on_apart() -> None:
    text, later, rows = random_text(45, batch=2), random_text(25, batch=4, seed=5), torch.tensor([0, 0, 1, 1])
    session = Session(MIXED, max_batch=4)
    session.goes_as_written_out(text, [40, *ones(5)])
    session.cache.batch_repeat_interleave(2)
    turned(session, rows)
    session.goes_as_written_out(later, [4, *ones(21)])
    assert_codes_of_whole_text(session, text.rows(rows).then(later))


# -- files and copies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, SELECTING], ids=["all", "selecting"])
def test_a_saved_cache_goes_on_where_it_was_also_in_a_longer_one(layers: list[list[Head]] | None, tmp_path: Path) -> None:
    text, session = random_text(90), Session(MIXED, layers, page_size=8)
    session.feed(text.at(0, 45), [40, *ones(5)])
    session.cache.save(tmp_path / "prompt")
    held = bits(session.cache)
    wanted = session.feed(text.at(45), [*ones(20), 25])
    for max_length in (96, 130):
        session.cache = session.another(max_length=max_length)
        session.feed(draft(60))
        session.cache.load(tmp_path / "prompt")
        assert session.cache.get_seq_length() == 45
        assert_same_bits(session.cache, held)
        assert error(session.feed(text.at(45), [*ones(20), 25]), wanted) < 1e-5, max_length
        assert_codes_of_whole_text(session, text)


@pytest.mark.parametrize(
    "other",
    [
        {"kv": None},
        {"kv": "int4"},
        {"kv": ["int8", "int4"]},
        {"kv": sc.KVFormat("int8", "int4")},
        {"kv": sc.KVFormat("int8", "int8", key_group=8)},
        {"rollback": 64},
        {"page_size": 64},
    ],
    ids=str,
)
def test_a_file_of_another_cache_is_refused(other: dict[str, Any], tmp_path: Path) -> None:
    session = Session("int8")
    session.feed(random_text(40))
    session.cache.save(tmp_path / "prompt")
    cache = session.another(**other)
    with pytest.raises(
        ValueError, match="was saved from a cache of another model, policy, mode, page size, rollback, dtype or kv format"
    ):
        cache.load(tmp_path / "prompt")
    assert cache.get_seq_length() == 0


def test_a_file_without_codes_is_refused(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    session = Session("int8")
    session.feed(random_text(40))
    session.cache.save(tmp_path / "whole")
    with safe_open(str(tmp_path / "whole"), framework="pt") as file:
        header, names = file.metadata(), list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names if name != "layer_1_code_2"}
    save_file(tensors, str(tmp_path / "part"), metadata=header)
    with pytest.raises(ValueError, match="is broken: layer_1_code_2 is missing or has another shape"):
        session.cache.load(tmp_path / "part")
    assert session.cache.get_seq_length() == 40


def test_a_copy_goes_on_by_itself() -> None:
    text, session = random_text(90), Session(MIXED, SELECTING, page_size=8)
    session.feed(text.at(0, 45), [40, *ones(5)])
    ours, copied = session.cache, deepcopy(session.cache)
    session.feed(draft(45), ones(45))
    session.cache = copied
    session.feed(text.at(45), [*ones(20), 25])
    assert_codes_of_whole_text(session, text)
    assert ours.get_seq_length() == 90


def test_two_caches_take_turns() -> None:
    text, session = random_text(60, batch=2), Session(MIXED)
    caches = [session.cache, session.another()]
    for start, stop in [(0, 40), *((at, at + 1) for at in range(40, 60))]:
        for row, session.cache in enumerate(caches):
            session.feed(text.rows(torch.tensor([row])).at(start, stop))
    for row, session.cache in enumerate(caches):
        assert_codes_of_whole_text(session, text.rows(torch.tensor([row])))
