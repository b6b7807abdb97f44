"""A quantized cache: attention reads the dequantized numbers, and quantized values do not depend on how text is split."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_compile as sc
from sparse_compile.cache.kv_format import ByLayer
from sparse_compile.masks import causal, page_topk, sink, sliding_window
from sparse_compile.passes.kernels.operands import Append, PageScoring, SelectPages
from sparse_compile.passes.ops.cache.page_selection import select_pages
from sparse_compile.passes.ops.cache.quantized_append import CheckedAppend, quantized_append
from sparse_compile.passes.storage.codec import Format, QuantizedTensor
from sparse_compile.passes.storage.layer_plan import RingStorage
from support.oracles.cache import error
from support.oracles.selection import Head, PageSelection
from support.sessions.cache import in_chunks, ones
from support.sessions.quantized import Session, Text, assert_codes_of_whole_text, assert_same_bits, bits, random_text

LENGTHS = [13, 7, *ones(40), 25, *ones(5)]  # across groups, in steps and in chunks
STREAMING = causal & (sink(2) | sliding_window(6))
FORMATS: dict[str, ByLayer] = {
    "int8": "int8",
    "fp8": "fp8",
    "int4": "int4",
    "int8 and int4": sc.KVFormat("int8", "int4"),
    "int4 and fp8": sc.KVFormat("int4", "fp8"),
    "keys alone": sc.KVFormat("int8", None),
    "values alone": sc.KVFormat(None, "int4"),
    "small groups": sc.KVFormat("int4", "int8", key_group=4, value_group=2),
    "by layer": ["int4", None],
    "by head": [["int8", "fp8"], [None, sc.KVFormat("int4", "int8", 8, 8)]],
}
MIXED: ByLayer = [["int8", "fp8"], ["int4", None]]
MINMAX, MEAN, KEYS = (PageSelection(page_topk(24, page=4, score=score), sink(2)) for score in ("minmax", "mean", "keys"))
OFTEN, SHARED = PageSelection(page_topk(24, page=4, every=3)), PageSelection(page_topk(24, page=4, share=0))
POLICIES: dict[str, list[list[Head]]] = {
    "streaming by head": [[causal, STREAMING], [STREAMING, causal]],
    "a window over pages": [[causal & (sink(2) | sliding_window(70))], [causal]],
    "pages by minmax": [[MINMAX], [MINMAX]],
    "pages by mean": [[MEAN], [causal]],
    "pages by keys": [[KEYS], [causal, KEYS]],
    "pages, rings and all": [[MINMAX, STREAMING], [causal, MEAN]],
    "pages chosen by another layer, and not in every step": [[OFTEN], [SHARED]],
}


def left_padding(pads: list[int], columns: int) -> Tensor:
    """A bool mask ``[B, columns]`` of the columns that are tokens."""
    return torch.arange(columns) >= torch.tensor(pads)[:, None]


# -- attention ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_attention_is_that_to_what_the_codes_stand_for(name: str) -> None:
    session, text = Session(FORMATS[name]), random_text(90)
    session.goes_as_written_out(text, LENGTHS)
    assert_codes_of_whole_text(session, text)


def test_formats_differ_from_the_numbers_themselves_and_from_one_another() -> None:
    """Otherwise the test above would show nothing. A prompt sees itself unquantized, so it is equal in all formats."""
    text, found = random_text(60), []
    for kv in (None, "int8", "fp8", "int4"):
        found.append(Session(kv).feed(text, [20, *ones(40)]))
    assert all(error(a[..., :20, :], found[0][..., :20, :]) < 1e-6 for a in found)
    assert min(error(a[..., 20:, :], b[..., 20:, :]) for i, a in enumerate(found) for b in found[:i]) > 1e-3
    assert error(found[1], found[0]) < error(found[2], found[0]) < error(found[3], found[0])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (4, 1)], ids=["MHA", "GQA", "MQA"])
def test_query_heads_share_the_codes_of_their_kv_head(heads: int, kv_heads: int) -> None:
    session = Session(sc.KVFormat("int8", "int4"), heads=heads, kv_heads=kv_heads)
    session.goes_as_written_out(random_text(70, heads=heads, kv_heads=kv_heads), [33, *ones(20), 17])


@pytest.mark.parametrize(
    ("kv", "page_size"),
    [("int8", 1), (sc.KVFormat("int8", None, key_group=1), 32), (sc.KVFormat(None, "int4", value_group=1), 32)],
    ids=["pages of one token", "keys", "values"],
)
def test_a_group_may_be_a_single_number(kv: ByLayer, page_size: int) -> None:
    Session(kv, page_size=page_size).goes_as_written_out(random_text(40), [33, *ones(7)])


@pytest.mark.parametrize("name", ["int8", "small groups", "by head"])
def test_padding_has_no_say_in_what_is_kept(name: str) -> None:
    text, padding = random_text(90, batch=3), left_padding([40, 0, 13], 96)
    for x in text[1:]:
        x.masked_fill_(~padding[None, :, None, :90, None], 1e4)
    session = Session(FORMATS[name], max_batch=3)
    session.goes_as_written_out(text, [45, *ones(22), 23], padding)
    assert_codes_of_whole_text(session, text, padding)


def test_padding_between_turns_and_chunks_and_steps_of_padding_have_no_say_either() -> None:
    text, padding = random_text(60, batch=2), left_padding([37, 3], 96)
    padding[1, 20:33] = padding[0, 45:47] = False
    session = Session(MIXED, max_batch=2)
    session.goes_as_written_out(text, [8, 8, 25, *ones(19)], padding)
    assert_codes_of_whole_text(session, text, padding)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_hide_what_they_hide_of_numbers(name: str) -> None:
    session = Session("int8", POLICIES[name], page_size=8)
    session.goes_as_written_out(random_text(70), [13, 7, *ones(40), 5, *ones(5)])


@pytest.mark.parametrize("name", ["streaming by head", "pages, rings and all"])
def test_policies_over_heads_of_several_formats_and_padded_rows(name: str) -> None:
    text, padding = random_text(60, batch=2), left_padding([11, 0], 96)
    session = Session(MIXED, POLICIES[name], page_size=8, max_batch=2)
    session.goes_as_written_out(text, [20, *ones(20), 9, *ones(11)], padding)


def test_a_layer_with_a_window_beside_one_in_pages() -> None:
    session = Session("int4", windows=(None, 8), page_size=8)
    session.goes_as_written_out(random_text(70), LENGTHS[:-20])


def test_a_relaxed_chunk_sees_itself_as_it_is() -> None:
    """The mask sees all earlier tokens, so it does not depend on the chunks."""
    session = Session("int4", mode="chunk_relaxed")
    session.goes_as_written_out(random_text(70), [13, 7, *ones(10), 40])


def test_a_batch_may_be_smaller_than_the_cache_and_another_after_a_reset() -> None:
    session = Session(MIXED, [[causal, MINMAX], [MINMAX, causal]], page_size=8, max_batch=3)
    for batch in (2, 3, 1):
        text = random_text(50, batch=batch, seed=batch)
        session.goes_as_written_out(text, [20, *ones(30)])
        session.reset()


def test_numbers_of_16_bits_are_encoded_as_they_are() -> None:
    text = Text(*(x.bfloat16() for x in random_text(70)))
    session = Session(MIXED, dtype=torch.bfloat16)
    session.feed(text, [33, *ones(20), 17])
    assert_codes_of_whole_text(session, text)


# -- cached values ------------------------------------------------------------------------------------------------------


def test_rings_stay_as_they_come() -> None:
    session = Session("int8", [[STREAMING], [causal, STREAMING]], page_size=8)
    first, second = session.cache.cached_layers
    assert all(isinstance(storage, RingStorage) for storage in first.plan.storages)
    assert first.quantized == [] and {buffer.dtype for buffer in first.buffers} == {torch.float32}
    assert [isinstance(storage, RingStorage) for storage in second.plan.storages] == [False, True]
    assert {part.shape[1] for part in second.quantized} == {1}


def test_a_window_of_cache_positions_stays_as_it_comes() -> None:
    session = Session("int8", [[STREAMING]] * 2)
    cache = session.another(page_size=8, cache_positions=True)
    assert [layer.quantized for layer in cache.cached_layers] == [[], []]


@pytest.mark.parametrize("score", ["minmax", "mean"])
def test_pages_are_described_from_the_keys_as_they_came(score: str) -> None:
    selection = PageSelection(page_topk(24, page=4, score=score))
    text = random_text(70)
    for lengths in ([70], [13, 7, *ones(45), 5]):
        exact, coarse = (Session(kv, [[selection]] * 2, page_size=8) for kv in (None, "int4"))
        exact.feed(text, lengths)
        coarse.feed(text, lengths)
        for plain, layer in zip(exact.cache.cached_layers, coarse.cache.cached_layers, strict=True):
            (wanted, page), (got, _) = *plain.summaries(), *layer.summaries()
            assert page == 4
            assert torch.equal(got[:, :, : -(-70 // page)], wanted[:, :, : -(-70 // page)])
    if score == "minmax":
        keys, held = text.k[0, :, :, :68].unflatten(2, (17, 4)), coarse.cache.cached_layers[0].summaries()[0][0][:, :, :17]
        assert torch.equal(held.sort(dim=3).values, torch.cat([keys.amin(dim=3), keys.amax(dim=3)], dim=3).sort(dim=3).values)


def test_a_step_that_chooses_pages_keeps_what_an_append_keeps() -> None:
    """CUDA graphs append and select in one op."""
    forms = sc.KVFormat("int8", "int4", 4).forms(16, 16, 8)
    assert forms is not None
    k, v = torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 16)
    tails = torch.randn(2, 3, 2, 16, 16)
    parts = [torch.zeros(3, *shape, dtype=dtype) for form in forms for shape, dtype in form.parts(2, 32, 16, torch.float32)]
    column, none = torch.tensor(21), torch.zeros(3, 2, 1, dtype=torch.int32)
    choice = torch.zeros(3, 2, 8, 32), torch.zeros(3, 2, 4), none, none.unsqueeze(3)
    found = []
    for together in (False, True):
        (keys, values), held = tails.clone(), [part.clone() for part in parts]
        quantized = QuantizedTensor(*held[:3]), QuantizedTensor(*held[3:])
        if not together:
            quantized_append(
                CheckedAppend(Append(keys, values, *quantized, None, k, v, column, None, *forms, 1, ""), finite=False)
            )
        chosen = [part.clone() for part in choice]
        classes, changed = torch.ones(1, 1, 4, dtype=torch.int8), torch.zeros(1, dtype=torch.int32)
        token = (torch.ones(2, 2, 1, 16), k, v, classes, column, column, changed, None)
        written: Any = (*quantized, forms) if together else (None, None, (Format(), Format()))
        how = PageScoring(8, 4, "minmax", "max", 1)
        fields: Any = (keys, values, *chosen, *written[:2], *token, how, 1, *written[2])
        select_pages(SelectPages(*fields))
        found.append([keys, values, *chosen, *held])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][-1], parts[-1])


# -- chunks and steps ---------------------------------------------------------------------------------------------------

EVERY_GROUP: ByLayer = [["int8", sc.KVFormat("int4", "fp8", key_group=8)]]
ONE_LAYER: dict[str, Any] = {"heads": 2, "windows": (None,)}


def one_layer(length: int, batch: int = 1) -> Text:
    return random_text(length, batch=batch, heads=2, layers=1)


def test_codes_do_not_depend_on_chunks() -> None:
    text, session = one_layer(1003), Session(EVERY_GROUP, max_length=1024, **ONE_LAYER)
    session.feed(text, ones(1003))
    wanted = bits(session.cache)
    assert_codes_of_whole_text(session, text)
    for lengths in ([1003], [1000, 3], in_chunks(1003, 64), in_chunks(1003, 7), [60, *ones(100), 843]):
        session.reset()
        session.feed(text, lengths)
        assert_same_bits(session.cache, wanted)


def test_codes_of_padded_rows_do_not_depend_on_chunks() -> None:
    text, padding = one_layer(90, batch=2), left_padding([0, 45], 96)
    session = Session(EVERY_GROUP, max_batch=2, **ONE_LAYER)
    session.feed(text, ones(90), padding)
    wanted = bits(session.cache)
    for lengths in ([90], in_chunks(90, 7), [50, *ones(10), 30]):
        session.reset()
        session.feed(text, lengths, padding)
        assert_same_bits(session.cache, wanted)


@pytest.mark.parametrize("max_length", [33, 64, 70])
def test_codes_are_right_to_the_last_token_of_a_full_cache(max_length: int) -> None:
    """At the end of the cache, the groups that a chunk may touch do not fit behind its first token."""
    text, session = one_layer(max_length), Session(EVERY_GROUP, max_length=max_length, **ONE_LAYER)
    for last in (1, 2, 31, 32):
        session.reset()
        session.goes_as_written_out(text, [max_length - last, last])
        assert_codes_of_whole_text(session, text)


def test_codes_of_full_groups_never_change() -> None:
    """They stay through thousands of steps, although every step quantizes the group that is being filled."""
    text = one_layer(2100)
    session = Session(sc.KVFormat("int4", "int8", key_group=4, value_group=4), max_length=2100, **ONE_LAYER)
    session.feed(text.at(0, 64))
    early = bits(session.cache)
    session.feed(text.at(64), ones(2036))
    late = bits(session.cache)
    assert all(torch.equal(then, now[:, :, : then.shape[2]]) for then, now in zip(early, late, strict=True))
    assert_codes_of_whole_text(session, text)
