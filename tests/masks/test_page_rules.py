"""The rules of page selection: score bounds hold, and selections equal those of a loop and of published systems."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparse_compile.masks import Mask, causal, page_topk, sink
from sparse_compile.masks.selection.page_scoring import (
    HIDDEN,
    KEPT,
    OFFERED,
    choose,
    pool,
    score_keys,
    score_summaries,
    summarize,
    summary_width,
)
from support.oracles.published_selection import kinetics, lserve, quest_evaluation, quest_kernel, upper_bound

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EDGES = [0.0, -0.0, 1.0, -1.0, 1e-38, -1e-38, 1e-45, -1e-45, 6e-8, 65504.0, -65504.0, 1e18, -1e18]
HALF = [x for x in EDGES if abs(x) <= 65504]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@st.composite
def page_and_query(draw: st.DrawFn, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draw a query ``[D]`` and the keys ``[n, D]`` of a page, with large, tiny, equal and negative zero entries."""
    dim, count = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    most = 65504.0 if dtype == torch.float16 else 1e18
    numbers = st.one_of(st.sampled_from(HALF if dtype == torch.float16 else EDGES), st.floats(-4, 4), st.floats(-most, most))
    values = draw(st.lists(numbers, min_size=dim * (count + 1), max_size=dim * (count + 1)))
    rows = torch.tensor(values, dtype=torch.float64).to(dtype).view(count + 1, dim)
    return rows[0], rows[1:]


def rounding(query: Tensor, *summaries: Tensor) -> float:
    """Return a bound on the rounding error of an fp32 sum whose products are at most the largest ``query * digest``.

    Each of the n = 2 D terms has at most n roundings of relative size 2**-24 (Higham's gamma_n). A term may also underflow,
    which loses at most the smallest denormal number.
    """
    terms = 2 * query.numel()
    largest = torch.stack([(query.double() * summary.double()).abs() for summary in summaries]).amax(dim=0).sum()
    return float(largest) * terms * 2**-24 * 1.01 + terms * 2**-149


def minmax(query: Tensor, keys: Tensor) -> float:
    """Return the minmax score of a page."""
    summary = summarize(keys[None, None], torch.ones(1, len(keys), dtype=torch.bool), len(keys), "minmax")
    assert summary.dtype == keys.dtype and summary.shape == (1, 1, 1, summary_width("minmax", query.numel()))
    return score_summaries(query[None, None, None], summary, "minmax").item()


# -- what describes and scores a page -------------------------------------------------------------------------------


@every_dtype
@given(st.data())
def test_no_key_of_a_page_exceeds_its_minmax_score(dtype: torch.dtype, data: st.DataObject) -> None:
    query, keys = data.draw(page_and_query(dtype))
    best = max(float(query.double() @ key.double()) for key in keys)
    assert minmax(query, keys) >= best - rounding(query, keys.amin(dim=0), keys.amax(dim=0))


@every_dtype
@given(st.data())
def test_the_minmax_score_is_the_sum_of_the_larger_products(dtype: torch.dtype, data: st.DataObject) -> None:
    query, keys = data.draw(page_and_query(dtype))
    off = abs(minmax(query, keys) - upper_bound(query.double(), keys.double()))
    assert off <= rounding(query, keys.amin(dim=0), keys.amax(dim=0))


@every_dtype
@given(st.data())
def test_the_mean_score_is_the_mean_of_the_products(dtype: torch.dtype, data: st.DataObject) -> None:
    query, keys = data.draw(page_and_query(dtype))
    summary = summarize(keys[None, None], torch.ones(1, len(keys), dtype=torch.bool), len(keys), "mean")
    got = score_summaries(query[None, None, None], summary, "mean").item()
    wanted = sum(float(query.double() @ key.double()) for key in keys) / len(keys)
    # The mean is an fp32 sum of n keys and a division, rounded once to its dtype. The products then round as above.
    sizes = keys.double().abs().mean(dim=0)
    unit, least = torch.finfo(dtype).eps / 2, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    described = (query.double().abs() * (sizes * (unit + (len(keys) + 1) * 2**-24) * 1.01 + least)).sum()
    assert abs(got - wanted) <= float(described) + 1.01 * rounding(query, sizes + least)


@given(page_and_query(torch.float32))
def test_the_exact_score_is_the_largest_product(example: tuple[Tensor, Tensor]) -> None:
    query, keys = example
    got = score_keys(query[None, None, None], keys[None, None], torch.ones(1, len(keys), dtype=torch.bool), len(keys)).item()
    best = max(float(query.double() @ key.double()) for key in keys)
    assert abs(got - best) <= rounding(query, *keys)


@pytest.mark.parametrize("score", ["minmax", "mean"])
@pytest.mark.parametrize("fill", [math.nan, math.inf, -math.inf, 1e30])
def test_keys_that_are_none_describe_nothing(score: str, fill: float) -> None:
    keys = torch.randn(2, 3, 12, 5, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([[True] * 4 + [False, True, False, True] + [False] * 4, [False] * 6 + [True] * 6])
    spoiled = keys.masked_fill(~valid[:, None, :, None], fill)
    summary = summarize(spoiled, valid, 4, score)
    assert (
        torch.equal(summary, summarize(keys, valid, 4, score)) and summary[0, :, 2].eq(0).all() and summary[1, :, 0].eq(0).all()
    )
    some = [[[0, 1, 2, 3], [5, 7], []], [[], [6, 7], [8, 9, 10, 11]]]
    for row, pages in enumerate(some):
        for page, members in enumerate(pages):
            if members:
                held = keys[row][:, members]
                wanted = held.mean(1) if score == "mean" else torch.cat([held.amin(1), held.amax(1)], dim=-1)
                torch.testing.assert_close(summary[row, :, page], wanted, rtol=1e-6, atol=1e-7)


def test_one_row_of_valid_serves_a_batch() -> None:
    keys, valid = torch.randn(3, 2, 8, 4), torch.arange(8).unsqueeze(0) < 6
    for score in ("minmax", "mean"):
        assert torch.equal(summarize(keys, valid, 4, score), summarize(keys, valid.expand(3, -1), 4, score))


def test_an_exact_score_of_no_key_is_the_least_there_is() -> None:
    valid = torch.tensor([[True, False, False, False]])
    scores = score_keys(torch.ones(1, 1, 1, 2), torch.full((1, 1, 4, 2), math.nan).index_fill(2, torch.tensor(0), 1), valid, 2)
    assert scores.flatten().tolist() == [2, -math.inf]


def test_scores_are_pooled_over_query_heads_then_over_logical_pages() -> None:
    scores = torch.tensor([[1.0, 5, 2, -3], [4, 0, -2, -1]])
    assert pool(scores, "max", 2).tolist() == [5, 2]
    assert pool(scores, "mean", 2).tolist() == [2.5, 0]
    assert pool(scores, "sum", 2).tolist() == [5, 0]
    assert pool(scores, "sum", 1).tolist() == [5, 5, 0, -4]


# -- which pages are selected ---------------------------------------------------------------------------------------


def chosen(scores: Sequence[float], classes: Sequence[int], budget: int, width: int) -> list[int]:
    """Select pages in one loop. Infinities count as the largest and smallest finite numbers, and NaN as the smallest."""
    most = torch.finfo(torch.float32).max
    worth = [-most if math.isnan(score) else min(max(score, -most), most) for score in scores]
    pages = [page for page, kind in enumerate(classes) if kind == KEPT]
    for page in sorted(range(len(scores)), key=lambda page: (-worth[page], page)):
        if classes[page] == OFFERED and len(pages) < budget:
            pages.append(page)
    return sorted(pages[:width])


SCORES = st.one_of(st.sampled_from([0.0, -0.0, 1.0, math.nan, math.inf, -math.inf, 3.4028234663852886e38]), st.floats(width=32))

KINDS = st.sampled_from([HIDDEN, OFFERED, KEPT])


@given(st.data(), st.integers(1, 12), st.integers(1, 14), st.integers(1, 14))
def test_pages_are_chosen_as_by_a_loop(data: st.DataObject, pages: int, budget: int, width: int) -> None:
    rows = data.draw(st.integers(1, 3))
    scores = [data.draw(st.lists(SCORES, min_size=pages, max_size=pages)) for _ in range(rows)]
    classes = [
        data.draw(st.lists(st.sampled_from([HIDDEN, OFFERED, KEPT]), min_size=pages, max_size=pages)) for _ in range(rows)
    ]
    count, table = choose(torch.tensor(scores), torch.tensor(classes), budget, width)
    assert count.dtype == table.dtype == torch.int32 and table.shape == (rows, width)
    for row in range(rows):
        wanted = chosen(scores[row], classes[row], budget, width)
        assert count[row] == len(wanted)
        assert table[row].tolist() == wanted + [0] * (width - len(wanted))


def test_one_row_of_classes_serves_many_scores() -> None:
    scores, classes = torch.randn(2, 3, 6), torch.tensor([KEPT, OFFERED, HIDDEN, OFFERED, OFFERED, HIDDEN])
    count, table = choose(scores, classes, 2, 4)
    assert count.shape == (2, 3) and table.shape == (2, 3, 4)
    for row in range(2):
        for head in range(3):
            wanted = chosen(scores[row, head].tolist(), classes.tolist(), 2, 4)
            assert table[row, head, : int(count[row, head])].tolist() == wanted


def test_nothing_offered_is_nothing_chosen() -> None:
    count, table = choose(torch.randn(1, 5), torch.full((5,), HIDDEN), 3, 4)
    assert count.tolist() == [0] and table.tolist() == [[0, 0, 0, 0]]


# -- what published systems choose ----------------------------------------------------------------------------------


def keys_read(mask: Mask, q: Tensor, k: Tensor, page_size: int) -> list[list[int]]:
    """Return the keys that each query head reads in one decode step of ``q`` ``[Hq, D]`` and ``k`` ``[Hkv, N, D]``."""
    last = k.shape[1] - 1
    chosen = mask.selected(q[None, :, None], k[None], q_offset=last, page_size=page_size)
    return [row.nonzero().flatten().tolist() for row in chosen.dense(1, last + 1, q_offset=last, heads=len(q))[0, :, 0]]


def pages_read(mask: Mask, q: Tensor, k: Tensor, page_size: int) -> list[list[int]]:
    return [sorted({j // page_size for j in keys}) for keys in keys_read(mask, q, k, page_size)]


def random_step(heads: int, kv_heads: int, length: int, dim: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    return torch.randn(heads, dim, generator=generator), torch.randn(kv_heads, length, dim, generator=generator)


LENGTHS = [1, 16, 31, 47, 48, 49, 63, 64, 65, 100, 160, 161, 255, 256, 257]


@pytest.mark.parametrize("budget", [16, 32, 48, 128])
def test_quests_kernels_choose_the_same_pages(budget: int) -> None:
    for length in LENGTHS:
        q, k = random_step(3, 3, length)
        assert pages_read(causal & page_topk(budget), q, k, 16) == quest_kernel(q, k, budget), length


@pytest.mark.parametrize("budget", [48, 64, 128])
def test_quests_evaluation_chooses_the_same_but_for_the_newest_page(budget: int) -> None:
    """Quest's evaluation does not force the newest page. If it left that page out, the worst page makes room for it here."""
    exchanged = 0
    for length in [length for length in LENGTHS if length >= budget]:
        q, k = random_step(3, 3, length)
        newest = (length - 1) // 16
        for head, theirs in enumerate(quest_evaluation(q, k, budget)):
            worth = {page: upper_bound(q[head].double(), k[head, page * 16 : page * 16 + 16].double()) for page in theirs}
            if newest not in theirs:
                theirs = sorted({*theirs, newest} - {min(worth, key=lambda page: (worth[page], -page))})
                exchanged += 1
            assert pages_read(causal & page_topk(budget), q, k, 16)[head] == theirs, (length, head)
    assert exchanged


def test_quests_evaluation_loses_pages_of_texts_within_the_budget_and_we_do_not() -> None:
    q, k = random_step(2, 2, 50)
    assert {len(pages) for pages in quest_evaluation(q, k, 1024)} == {3}
    assert pages_read(causal & page_topk(1024), q, k, 16) == [[0, 1, 2, 3]] * 2


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (1, 1)])
@pytest.mark.parametrize("group", ["max", "mean", "sum"])
def test_lserve_chooses_the_same_pages(heads: int, kv_heads: int, group: str) -> None:
    for length in [1, 64, 191, 192, 193, 255, 256, 257, 300, 512, 640, 641]:
        q, k = random_step(heads, kv_heads, length)
        for budget in (192, 256, 384):
            assert pages_read(causal & page_topk(budget, group=group), q, k, 64) == lserve(q, k, budget), (length, budget)


@pytest.mark.parametrize("first", [0, 16], ids=["no sink", "a page of sink"])
def test_block_topk_of_kinetics_reads_the_same_keys(first: int) -> None:
    """Kinetics runs with one local key, which keeps only the newest page, and with a sink of no page or one page.

    Its own sink of 4 keys would shift its blocks, so that no block would be a page.
    """
    for length in [1, 15, 16, 17, 64, 65, 100, 160, 161, 199]:
        q, k = random_step(6, 2, length)
        for topk in (1, 2, 5):
            selector = page_topk((first // 16 + topk + 1) * 16, score="mean", group="mean")
            mask = causal & (sink(first) | selector) if first else causal & selector
            read = keys_read(mask, q, k, 16)
            assert [read[0], read[3]] == kinetics(q, k, topk, sink=first), (length, topk)
            assert read[0] == read[1] == read[2]
