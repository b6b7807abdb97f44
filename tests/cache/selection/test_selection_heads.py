"""KV heads and layers that select pages beside others that do not, in several models, compared with loops."""

from __future__ import annotations

import pytest

from sparse_compile.masks import Mask, causal, page_topk, sink, sliding_window
from support.oracles.cache import error, random_tokens
from support.oracles.selection import Head, Oracle, PageSelection
from support.sessions.cache import ones
from support.sessions.selection import Session

STREAMING = causal & (sink(2) | sliding_window(6))
SELECTING = PageSelection(page_topk(12, page=4))

pytestmark = pytest.mark.usefixtures("fresh")


def both_layers(*heads: Head) -> list[list[Head]]:
    return [list(heads)] * 2


MIXES: dict[str, list[list[Head]]] = {
    "selecting and streaming": both_layers(SELECTING, STREAMING),
    "dense and selecting": both_layers(causal, SELECTING),
    "two selectors": both_layers(SELECTING, PageSelection(page_topk(8, page=2, score="mean"), sink(1))),
    "a dense layer first": [[causal], [SELECTING]],
    "a streaming layer first": [[STREAMING], [SELECTING, causal]],
    "one head of all": [[STREAMING, SELECTING], [STREAMING]],
}


@pytest.mark.parametrize("name", MIXES)
def test_heads_and_layers_that_select_stand_beside_others(name: str) -> None:
    """The prefill sees everything, so streaming heads cache all keys. The next test covers rings."""
    Session(MIXES[name]).goes_as_written_out(random_tokens(40), [17, *ones(23)])


@pytest.mark.parametrize("name", ["selecting and streaming", "one head of all"])
def test_heads_that_select_stand_beside_rings(name: str) -> None:
    prefill: list[list[Head]] = [
        [causal if isinstance(head, PageSelection) else head for head in heads] for heads in MIXES[name]
    ]
    session = Session(MIXES[name], prefill=prefill)
    session.goes_as_written_out(random_tokens(40), [17, *ones(23)])
    assert session.cache.nbytes < Session(MIXES[name]).cache.nbytes


def test_by_query_head_a_kv_head_chooses_once() -> None:
    """The policy names a mask for each query head, and both query heads of a KV head have the same one."""
    Session(both_layers(SELECTING, SELECTING, STREAMING, STREAMING)).goes_as_written_out(random_tokens(36), [17, *ones(19)])


@pytest.mark.parametrize("other", [causal, STREAMING], ids=["dense", "streaming"])
def test_a_query_head_without_a_selector_beside_one_that_selects(other: Mask) -> None:
    """Its KV head always reads what that query head sees, which is everything if it is dense."""
    selection = PageSelection(page_topk(20, page=4))
    Session(both_layers(selection, other, other, selection)).goes_as_written_out(random_tokens(36), [17, *ones(19)])


@pytest.mark.parametrize("name", ["llama mha", "qwen3", "llama of three layers"])
def test_other_models(name: str) -> None:
    layers: list[list[Head]] = [[PageSelection(page_topk(12, page=2), sink(1))]] * (3 if "three" in name else 2)
    Session(layers, name=name).goes_as_written_out(random_tokens(36), [17, *ones(19)])


def test_full_layers_between_sliding_ones_select() -> None:
    window = causal & sliding_window(8)
    session = Session([[window], [SELECTING]], prefill=[[window], [causal]], name="gemma3_text")
    session.goes_as_written_out(random_tokens(40), [17, *ones(23)])


def test_within_the_window_of_a_model_a_large_budget_hides_nothing() -> None:
    window = causal & sliding_window(8)
    layers: list[list[Head]] = both_layers(PageSelection(page_topk(16, page=4), base=window))
    Session(layers, prefill=both_layers(window), name="mistral").goes_as_written_out(random_tokens(40), [17, *ones(23)])


def test_within_the_window_of_a_model_pages_are_selected() -> None:
    window = causal & sliding_window(8)
    layers: list[list[Head]] = both_layers(PageSelection(page_topk(8, page=4), base=window))
    Session(layers, prefill=both_layers(window), name="mistral").goes_as_written_out(random_tokens(40), [17, *ones(23)])


def test_relaxed_chunks_change_nothing_where_nothing_is_forgotten() -> None:
    session = Session(both_layers(SELECTING, causal), mode="chunk_relaxed")
    session.goes_as_written_out(random_tokens(40), [9, 8, *ones(23)])


def test_a_relaxed_decode_step_keeps_what_the_window_showed_one_token_before() -> None:
    ids, lengths = random_tokens(40), [9, 8, *ones(23)]
    wanted = Oracle(both_layers(PageSelection(page_topk(16, page=4), sliding_window(6))), page_size=4).feed(ids, lengths)
    session = Session(both_layers(PageSelection(page_topk(16, page=4), sliding_window(5))), mode="chunk_relaxed")
    assert error(session.feed(ids, lengths), wanted) < 1e-5
