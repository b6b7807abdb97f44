"""Page summaries in blocks equal those of whole texts, and the chosen blocks are those of the slow reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_compile.masks import Mask, causal, page_topk, sink, sliding_window
from sparse_compile.masks.operators import union
from sparse_compile.masks.selection.page_scoring import summarize
from sparse_compile.masks.selection.page_topk import PageTopK, selector_of
from sparse_compile.vllm.selection import choose_pages, one_head_tables, update_summaries

PAGE, BLOCK, HEADS, DIM = 4, 16, 2, 8


@given(st.integers(1, 60), st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(0, 2**16))
def test_summaries_follow_keys_that_arrive_in_chunks(length: int, chunks: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(length, HEADS, DIM, generator=generator)
    blocks = torch.randperm(8, generator=generator)[: -(-length // BLOCK)]
    position = torch.arange(length)
    slots = blocks[position // BLOCK] * BLOCK + position % BLOCK
    summaries = torch.randn(8, HEADS, BLOCK // PAGE, 2 * DIM, generator=generator)  # what other texts left behind
    first = 0
    while first < length:
        chunk = slice(first, first + chunks[first % len(chunks)])
        padded = torch.cat([slots[chunk], torch.tensor([-1])])
        update_summaries(summaries, torch.cat([keys[chunk], torch.full((1, HEADS, DIM), 99.0)]), padded, PAGE)
        first = chunk.stop
    found = summaries[blocks].transpose(0, 1).flatten(1, 2)[:, : -(-length // PAGE)]
    room = torch.nn.functional.pad(keys, (0, 0, 0, 0, 0, -length % PAGE)).transpose(0, 1)[None]
    valid = (torch.arange(room.shape[2]) < length)[None]
    torch.testing.assert_close(found, summarize(room, valid, PAGE, "minmax")[0])


@pytest.mark.parametrize("group", ["max", "mean", "sum"])
@pytest.mark.parametrize("length", [1, 17, 64, 90])
@pytest.mark.parametrize("rest", [None, sink(2) | sliding_window(8)], ids=["alone", "with a static part"])
def test_the_chosen_pages_are_those_of_the_reference(group: str, length: int, rest: Mask | None) -> None:
    generator = torch.Generator().manual_seed(length)
    q, k = torch.randn(1, 2 * HEADS, 1, DIM, generator=generator), torch.randn(1, HEADS, length, DIM, generator=generator)
    chosen: Mask = page_topk(32, page=PAGE, group=group)
    mask = causal & (chosen if rest is None else rest | chosen)
    selector = selector_of(union([mask]))
    assert isinstance(selector, PageTopK)
    room = torch.nn.functional.pad(k, (0, 0, 0, -length % BLOCK))
    summaries = summarize(room, (torch.arange(room.shape[2]) < length)[None], PAGE, "minmax")[0]
    counts, listed = choose_pages(q[0, :, 0].unflatten(0, (HEADS, 2)), summaries, (mask, mask), selector, length, BLOCK)
    seen = mask.selected(q, k, q_offset=length - 1, page_size=BLOCK).dense(1, length, q_offset=length - 1, heads=2 * HEADS)
    for head in range(HEADS):
        pages = listed[head, : counts[head]].tolist()
        assert [key // BLOCK in pages for key in range(length)] == seen[0, 2 * head, 0].tolist()


def test_tables_name_the_blocks_of_single_heads() -> None:
    counts, chosen = torch.tensor([2, 1]), torch.tensor([[0, 2, 0], [1, 0, 0]])
    assert one_head_tables(torch.tensor([7, 3, 5]), counts, chosen).tolist() == [[14, 10, 0], [7, 0, 0]]
