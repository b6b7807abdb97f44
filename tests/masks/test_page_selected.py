"""``mask.selected(q, k)`` equals the rule written out in loops: static part, newest page, then the best pages."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparse_compile.masks import Mask, causal, full, page_topk, per_head, sink, sliding_window
from support.oracles.selection import Head, PageSelection, keys_of, mask_of, scores_of, seen_by

STREAMING = causal & (sink(2) | sliding_window(6))
STATIC = sink(3) | sliding_window(5)
RULES: dict[str, PageSelection] = {
    "minmax": PageSelection(page_topk(12, page=2)),
    "mean": PageSelection(page_topk(12, page=2, score="mean")),
    "keys": PageSelection(page_topk(12, page=1, score="keys")),
    "mean of the group": PageSelection(page_topk(12, page=4, group="mean")),
    "sum of the group": PageSelection(page_topk(12, page=4, group="sum")),
    "static part": PageSelection(page_topk(24, page=4), STATIC),
    "static part that exceeds the budget": PageSelection(page_topk(4, page=4), STATIC),
    "window of the model": PageSelection(page_topk(8, page=2), base=causal & sliding_window(21)),
    "not causal": PageSelection(page_topk(8, page=2), base=sliding_window(100)),
    "tokens that fill no page": PageSelection(page_topk(9, page=4)),
}
every_rule = pytest.mark.parametrize("name", RULES)


def random_qk(
    batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, dim: int = 6, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, q_len, dim, generator=generator)
    return q, torch.randn(batch, kv_heads, kv_len, dim, generator=generator)


def written_out(
    heads: list[Head], q: Tensor, k: Tensor, *, q_offset: int, page_size: int = 4, q_block: int = 1, valid: Tensor | None = None
) -> Tensor:
    """Return which pairs are visible: bool ``[B, Hq, Q, KV]``."""
    (batch, q_heads, q_len, _), (_, kv_heads, kv_len, _) = q.shape, k.shape
    group, texts, everything = q_heads // kv_heads, list(range(kv_len)), [True] * kv_len
    seen = torch.zeros(batch, q_heads, q_len, kv_len, dtype=torch.bool)
    for row in range(batch):
        some = everything if valid is None else valid.expand(batch, -1)[row].tolist()
        for head in range(q_heads):
            rule, kv_head = heads[head * len(heads) // q_heads], head // group
            for first in range(0, q_len, q_block):
                block = range(first, min(first + q_block, q_len))
                at = [q_offset + i for i in block]
                if isinstance(rule, PageSelection):
                    mean = q[row, kv_head * group : (kv_head + 1) * group, block].double().mean(dim=1)
                    worth = scores_of(rule.selector, mean, k[row, kv_head], page_size, some)
                    sets = keys_of(rule, worth, at, texts, everything, page_size)
                else:
                    sets = [seen_by(rule, t, texts, everything) for t in at]
                for i, part in zip(block, sets, strict=True):
                    seen[row, head, i, list(part)] = True
    return seen


def assert_selected(heads: list[Head], q: Tensor, k: Tensor, **options: Any) -> None:
    options = {"page_size": 4, **options}
    mask = mask_of(heads).selected(q, k, **options)
    got = mask.dense(q.shape[2], k.shape[2], q_offset=options["q_offset"], batch=q.shape[0], heads=q.shape[1])
    assert torch.equal(got, written_out(heads, q, k, **options))


# -- one query ------------------------------------------------------------------------------------------------------


@every_rule
def test_every_length_of_a_text_is_selected_as_written_out(name: str) -> None:
    for length in range(1, 33):
        q, k = random_qk(1, 4, 2, 1, length, seed=length)
        assert_selected([RULES[name]], q, k, q_offset=length - 1)


@every_rule
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (3, 3), (6, 2), (4, 1)])
def test_heads_of_a_group_choose_together_and_groups_apart(name: str, heads: int, kv_heads: int) -> None:
    q, k = random_qk(3, heads, kv_heads, 1, 30)
    assert_selected([RULES[name]], q, k, q_offset=29)


@pytest.mark.parametrize("score", ["minmax", "mean", "keys"])
@pytest.mark.parametrize(("page", "page_size"), [(1, 1), (1, 3), (2, 6), (5, 5), (4, 16)])
@pytest.mark.parametrize("tokens", [40, 41, 47])
def test_a_budget_of_the_whole_text_shows_what_no_selector_would(score: str, page: int, page_size: int, tokens: int) -> None:
    plain = causal & (sink(1) | sliding_window(2)) | causal
    for length in range(1, tokens + 1):
        q, k = random_qk(1, 2, 1, 1, length, dim=2)
        chosen = (causal & page_topk(tokens, page=page, score=score)).selected(q, k, q_offset=length - 1, page_size=page_size)
        assert torch.equal(
            chosen.dense(1, length, q_offset=length - 1, heads=2), plain.dense(1, length, q_offset=length - 1, heads=2)
        )


def test_a_text_beyond_the_budget_loses_keys() -> None:
    for length in range(13, 33):
        q, k = random_qk(1, 2, 1, 1, length)
        chosen = (causal & page_topk(12, page=4)).selected(q, k, q_offset=length - 1, page_size=4)
        seen = chosen.dense(1, length, q_offset=length - 1, heads=2).sum(dim=-1).unique()
        assert seen.tolist() == [12 - (-length) % 4]


def test_the_newest_page_and_the_static_part_are_kept_however_bad_they_are() -> None:
    q = torch.ones(1, 1, 1, 2)
    k = torch.arange(32, 0, -1.0).view(1, 1, 32, 1).expand(-1, -1, -1, 2)  # the oldest are the best
    shown = (causal & (sliding_window(6) | page_topk(16, page=4))).selected(q, k, q_offset=30, page_size=4)
    # The window 25..30 touches pages 6 and 7, which leaves two of the four pages of the budget.
    assert shown.dense(1, 31, q_offset=30)[0, 0, 0].nonzero().flatten().tolist() == [*range(8), *range(24, 31)]


def test_of_equal_pages_the_lower_is_kept() -> None:
    q, k = torch.ones(1, 2, 1, 3), torch.ones(1, 1, 40, 3)
    k[:, :, 20:24] = 2
    for score in ("minmax", "mean", "keys"):
        shown = (causal & page_topk(16, page=2, score=score)).selected(q, k, q_offset=39, page_size=4)
        kept = shown.dense(1, 40, q_offset=39, heads=2)[0, 1, 0].nonzero().flatten().tolist()
        assert kept == [*range(8), *range(20, 24), *range(36, 40)], score


def test_a_physical_page_is_worth_its_best_logical_page() -> None:
    q, k = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 32, 1)
    k[0, 0, 8:16, 0] = 3  # a good page
    k[0, 0, 16:20, 0] = torch.tensor([9.0, 9, -50, -50])  # one good logical page of two
    shown = (causal & page_topk(16, page=2, score="mean")).selected(q, k, q_offset=31, page_size=8)
    assert shown.dense(1, 32, q_offset=31)[0, 0, 0].nonzero().flatten().tolist() == [*range(16, 32)]


def test_keys_after_the_query_are_not_chosen() -> None:
    q, k = random_qk(1, 2, 1, 1, 40)
    k[:, :, 20:] *= 100
    assert_selected([PageSelection(page_topk(8, page=4))], q, k, q_offset=17)
    shown = (causal & page_topk(8, page=4)).selected(q, k, q_offset=17, page_size=4).dense(1, 40, q_offset=17, heads=2)
    assert shown.sum(dim=-1).unique().tolist() == [6]


@given(st.integers(0, 999), st.integers(1, 40), st.sampled_from([(1, 1), (1, 4), (2, 4), (4, 4), (3, 6)]), st.integers(1, 30))
def test_any_selection_is_as_written_out(seed: int, length: int, sizes: tuple[int, int], tokens: int) -> None:
    page, page_size = sizes
    choices = torch.randint(3, (2,), generator=torch.Generator().manual_seed(seed)).tolist()
    score, group = ("minmax", "mean", "keys")[choices[0]], ("max", "mean", "sum")[choices[1]]
    rule = PageSelection(page_topk(tokens, page=page, score=score, group=group), [~full, sink(2), sliding_window(3)][seed % 3])
    q, k = random_qk(2, 4, 2, 1, length, seed=seed)
    assert_selected([rule], q, k, q_offset=length - 1, page_size=page_size)


# -- batches, padding, heads ----------------------------------------------------------------------------------------


def test_rows_of_a_batch_choose_as_each_alone() -> None:
    q, k = random_qk(4, 2, 1, 1, 30)
    mask = causal & (sink(1) | page_topk(12, page=2))
    together = mask.selected(q, k, q_offset=29, page_size=4).dense(1, 30, q_offset=29, batch=4, heads=2)
    for row in range(4):
        one = slice(row, row + 1)
        alone = mask.selected(q[one], k[one], q_offset=29, page_size=4)
        assert torch.equal(together[one], alone.dense(1, 30, q_offset=29, heads=2))
    assert len({str(row.tolist()) for row in together}) > 1


@pytest.mark.parametrize("score", ["minmax", "mean", "keys"])
@pytest.mark.parametrize("fill", [0.0, 1e4, -1e4, float("nan"), float("inf")])
def test_what_stands_in_padding_does_not_matter(score: str, fill: float) -> None:
    q, k = random_qk(1, 2, 1, 1, 40)
    valid = torch.ones(1, 40, dtype=torch.bool)
    valid[0, :6] = valid[0, 18:21] = False
    k[:, :, ~valid[0]] = fill
    assert_selected([PageSelection(page_topk(16, page=2, score=score))], q, k, q_offset=39, valid=valid)


@pytest.mark.parametrize("score", ["minmax", "mean", "keys"])
def test_a_page_of_padding_is_worth_less_than_any_key(score: str) -> None:
    q, k, valid = torch.ones(1, 1, 1, 2), torch.full((1, 1, 32, 2), -1.0), torch.arange(32).unsqueeze(0) >= 9
    shown = (causal & page_topk(12, page=4, score=score)).selected(q, k, q_offset=31, page_size=4, valid=valid)
    assert shown.dense(1, 32, q_offset=31)[0, 0, 0].nonzero().flatten().tolist() == [*range(8, 16), *range(28, 32)]


@pytest.mark.parametrize("score", ["minmax", "mean", "keys"])
def test_a_logical_page_of_padding_adds_nothing_to_its_page(score: str) -> None:
    q, k, valid = torch.ones(1, 1, 1, 2), torch.full((1, 1, 32, 2), -1.0), torch.arange(32).unsqueeze(0) >= 10
    k[:, :, 10:12] = -5
    shown = (causal & page_topk(12, page=2, score=score)).selected(q, k, q_offset=31, page_size=4, valid=valid)
    assert shown.dense(1, 32, q_offset=31)[0, 0, 0].nonzero().flatten().tolist() == [*range(12, 20), *range(28, 32)]


def test_padding_differs_by_row() -> None:
    q, k = random_qk(3, 2, 1, 1, 40)
    valid = torch.arange(40) >= torch.tensor([[0], [5], [8]])
    for score in ("minmax", "mean", "keys"):
        assert_selected([PageSelection(page_topk(36, page=2, score=score), sliding_window(3))], q, k, q_offset=39, valid=valid)


def test_integers_tell_padding_as_well() -> None:
    q, k = random_qk(1, 1, 1, 1, 40)
    valid, mask = torch.arange(40).view(1, 40) >= 7, causal & page_topk(16, page=4)
    assert mask.selected(q, k, q_offset=39, page_size=4, valid=valid.long()) == mask.selected(
        q, k, q_offset=39, page_size=4, valid=valid
    )


def test_heads_without_a_selector_stay_as_they_are() -> None:
    q, k = random_qk(1, 4, 2, 1, 30)
    selection = PageSelection(page_topk(8, page=4))
    two_selectors: list[Head] = [PageSelection(page_topk(8, page=2), sink(1)), selection]
    mixes: list[list[Head]] = [[selection, STREAMING], [causal, selection], two_selectors]
    for heads in mixes:
        assert_selected(heads, q, k, q_offset=29)
    mask = per_head([selection.mask, STREAMING]).selected(q, k, q_offset=29, page_size=4)
    assert [mask.for_head(head, 4) for head in (2, 3)] == [STREAMING] * 2


def test_a_mask_without_a_selector_is_returned() -> None:
    q, k = random_qk(1, 2, 1, 1, 8)
    mask: Mask = per_head([causal, STREAMING])
    assert mask.selected(q, k, q_offset=7) is mask


@pytest.mark.parametrize("order", [0, 1])
def test_a_query_head_without_a_selector_leaves_the_others_of_its_kv_head_a_choice(order: int) -> None:
    """A dense head makes its KV head read every page. A streaming head makes all heads of its KV head read its pages."""
    q, k = random_qk(1, 2, 1, 1, 30)
    for other, pages in ((causal, range(8)), (STREAMING, [0, 6, 7])):
        masks = [other, causal & page_topk(4, page=4)]
        chosen = per_head(masks[:: 1 - 2 * order]).selected(q, k, q_offset=29, page_size=4)
        seen = chosen.dense(1, 30, q_offset=29, heads=2)[0, :, 0]
        assert {int(j) // 4 for j in seen[1 - order].nonzero().flatten()} == set(pages)
        assert torch.equal(seen[order], other.dense(1, 30, q_offset=29)[0, 0, 0])


# -- blocks of queries ----------------------------------------------------------------------------------------------


@every_rule
@pytest.mark.parametrize(("q_block", "page_size"), [(8, 8), (3, 4), (64, 4)])
def test_blocks_of_queries_choose_by_their_mean(name: str, q_block: int, page_size: int) -> None:
    for q_len, kv_len in ((17, 17), (5, 30), (20, 33)):
        q, k = random_qk(2, 4, 2, q_len, kv_len)
        assert_selected([RULES[name]], q, k, q_offset=kv_len - q_len, q_block=q_block, page_size=page_size)


def test_a_block_of_one_query_is_a_decode_step() -> None:
    q, k = random_qk(1, 2, 1, 12, 30)
    mask = causal & (sink(2) | page_topk(12, page=2))
    rows = mask.selected(q, k, q_offset=18, page_size=4).dense(12, 30, q_offset=18, heads=2)
    for i in range(12):
        step = mask.selected(q[:, :, i : i + 1], k[:, :, : 19 + i], q_offset=18 + i, page_size=4)
        assert torch.equal(rows[:, :, i : i + 1, : 19 + i], step.dense(1, 19 + i, q_offset=18 + i, heads=2))


def test_a_budget_of_the_whole_prompt_shows_everything_to_every_block() -> None:
    q, k = random_qk(1, 2, 2, 37, 37)
    chosen = (causal & page_topk(37, page=2)).selected(q, k, page_size=8, q_block=8)
    assert torch.equal(chosen.dense(37, 37, heads=2), causal.dense(37, 37, heads=2))
