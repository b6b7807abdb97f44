"""Models build masks of positions in many ways. They are all lifted into the mask language, and the lifted mask is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_compile.masks import causal, sink, sliding_window
from support.comparison import assert_read, compare, qkv
from support.masks.builders import Build, Case, N, attend, from_tril, hidden, i_and_j


def from_triu_of_minus_infinity() -> Tensor:
    """``nn.Transformer.generate_square_subsequent_mask``."""
    return torch.triu(torch.full((N, N), float("-inf")), diagonal=1)


def from_one_minus_mask() -> Tensor:
    """``1 - mask`` over a mask of ones and zeros, as in many models."""
    mask = torch.tril(torch.ones(N, N))[None, None, :, :]
    return (1.0 - mask) * torch.finfo(torch.float32).min


def from_two_fills() -> Tensor:
    """A mask as in the PyTorch tutorials."""
    mask = torch.tril(torch.ones(N, N)) == 0
    return torch.zeros(N, N).masked_fill(mask, float("-inf")).masked_fill(~mask, 0.0)


def from_integers() -> Tensor:
    return torch.ones(N, N, dtype=torch.int64).tril().to(torch.bool).view(1, 1, N, N)


def from_in_place_fill() -> Tensor:
    i, j = i_and_j()
    return torch.zeros(N, N).masked_fill_(j > i, -10000.0)


def banded() -> Tensor:
    ones = torch.ones(N, N, dtype=torch.bool)
    return torch.tril(ones) & torch.triu(ones, diagonal=-3)


def window_both_ways() -> Tensor:
    i, j = i_and_j()
    return (i - j).abs() <= 2


def window_both_ways_by_two_comparisons() -> Tensor:
    i, j = i_and_j()
    return (j > i - 3) & (j < i + 3)


CASES: dict[str, Case] = {
    "tril": Case(from_tril, "causal"),
    "triu of -inf": Case(from_triu_of_minus_infinity, "causal"),
    "(1 - mask) * min": Case(from_one_minus_mask, "causal"),
    "two fills": Case(from_two_fills, "causal"),
    "integers": Case(from_integers, "causal"),
    "in-place fill": Case(from_in_place_fill, "causal"),
    "j <= i": Case(lambda: torch.arange(N)[None, :] <= torch.arange(N)[:, None], "causal"),
    "i >= j": Case(lambda: torch.arange(N).view(N, 1) >= torch.arange(N), "causal"),
    "not j > i": Case(lambda: ~(i_and_j()[1] > i_and_j()[0]), "causal"),
    "logical_not": Case(lambda: torch.logical_not(torch.gt(i_and_j()[1], i_and_j()[0])), "causal"),
    "j < i + 1": Case(lambda: i_and_j()[1] < i_and_j()[0] + 1, "causal"),
    "arange from 5": Case(lambda: torch.arange(5, N + 5) <= torch.arange(5, N + 5)[:, None], "causal"),
    "by difference": Case(lambda: (i_and_j()[0] - i_and_j()[1]) >= 0, "causal"),
    "transposed": Case(lambda: (i_and_j()[0] <= i_and_j()[1]).transpose(0, 1), "causal"),
    "expanded": Case(lambda: from_tril().unsqueeze(0).unsqueeze(0).expand(2, 1, N, N), "causal"),
    "where": Case(lambda: torch.where(i_and_j()[1] <= i_and_j()[0], 0.0, -torch.inf), "causal"),
    "everything": Case(lambda: torch.ones(1, 1, N, N, dtype=torch.bool), "full"),
    "zeros": Case(lambda: torch.zeros(N, N), "full"),
    "band": Case(banded, "causal & sliding_window(4)"),
    "window": Case(lambda: (i_and_j()[1] <= i_and_j()[0]) & (i_and_j()[1] > i_and_j()[0] - 4), "causal & sliding_window(4)"),
    "around": Case(window_both_ways, "dilated(3, 1)"),
    "first keys": Case(lambda: (i_and_j()[1] < 3).expand(N, N), "sink(3)"),
    "all but the first keys": Case(lambda: (i_and_j()[1] >= 3).expand(N, N), "~sink(3)"),
    "sink or window": Case(
        lambda: (i_and_j()[1] <= i_and_j()[0]) & ((i_and_j()[1] < 2) | (i_and_j()[0] - i_and_j()[1] < 3)),
        "causal & (sink(2) | sliding_window(3))",
    ),
    "chunks": Case(lambda: i_and_j()[0] // 4 == i_and_j()[1] // 4, "chunked(4)"),
    "causal chunks": Case(
        lambda: from_tril() & (torch.arange(N)[:, None] // 4 == torch.arange(N)[None] // 4), "causal & chunked(4)"
    ),
    "strictly before": Case(lambda: i_and_j()[1] < i_and_j()[0], "~sliding_window(1)"),
    "after": Case(lambda: i_and_j()[1] > i_and_j()[0], "~causal"),
    "look-ahead of two": Case(lambda: i_and_j()[1] <= i_and_j()[0] + 2, "causal | dilated(3, 1)"),
    "far keys only": Case(lambda: i_and_j()[0] - i_and_j()[1] >= 3, "~sliding_window(3)"),
    "prefix of a fixed length": Case(lambda: (i_and_j()[1] < 4) | from_tril(), "sink(4) | causal"),
    "around, by two comparisons": Case(window_both_ways_by_two_comparisons, "sliding_window(3) & (causal | dilated(3, 1))"),
    "sum of two float masks": Case(
        lambda: hidden(i_and_j()[1] <= i_and_j()[0]) + hidden(i_and_j()[1] > i_and_j()[0] - 4), "causal & sliding_window(4)"
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mask_of_positions_is_lifted(name: str) -> None:
    case = CASES[name]
    assert_read(compare(attend(case.build), *qkv(N)), case.mask)


def written_through_a_view() -> Tensor:
    mask = torch.ones(N, N, dtype=torch.bool)
    mask[:, 3:].fill_(False)
    return mask


def assigned() -> Tensor:
    mask = torch.zeros(N, N, dtype=torch.bool)
    mask[:, :5] = True
    return mask


def assigned_out() -> Tensor:
    mask = torch.ones(N, N, dtype=torch.bool)
    torch.tril(mask, out=mask)
    return mask


NOT_LIFTED: dict[str, Build] = {
    "exclusive or": lambda: from_tril() ^ (i_and_j()[1] < 3),
    "indexed from the end": lambda: torch.arange(N)[i_and_j()[0] - i_and_j()[1]] < 4,
    "rolled": lambda: torch.roll(from_tril(), 2, 0),
    "flipped": lambda: from_tril().flip(0),
    "cat": lambda: torch.cat([torch.ones(N, 3, dtype=torch.bool), from_tril()[:, 3:]], dim=1),
    "pad": lambda: F.pad(torch.ones(N, N - 3, dtype=torch.bool), (3, 0), value=False),
    "every second key": lambda: (torch.arange(2 * N)[::2] % 3 == 0).expand(N, N),
    "outer product": lambda: torch.outer(torch.arange(N), torch.arange(N)) % 2 == 0,
    "written through a view": written_through_a_view,
    "assigned": assigned,
    "assigned through out=": assigned_out,
}


@pytest.mark.parametrize("name", NOT_LIFTED)
def test_what_has_no_words_is_used_as_it_is(name: str) -> None:
    assert_read(compare(attend(NOT_LIFTED[name]), *qkv(N)), "explicit")


def test_what_has_words_is_kept_beside_what_has_none() -> None:
    """Blocks outside the causal part are skipped, although the rest of the mask is a tensor."""
    result = compare(attend(lambda: from_tril() & (i_and_j()[0] * i_and_j()[1] % 3 == 0)), *qkv(N))
    assert_read(result, "causal & explicit")


def test_a_constant_beside_the_mask_is_a_bias() -> None:
    result = compare(attend(lambda: torch.where(from_tril(), 2.0, -torch.inf)), *qkv(N))
    assert_read(result, "full, bias")


@pytest.mark.parametrize("build", [window_both_ways_by_two_comparisons, CASES["look-ahead of two"].build, window_both_ways])
def test_a_window_moves_no_positions(build: Build) -> None:
    """With ``j <= i + 2``, the first query is still at position 0, and a policy counts from there."""
    policy = causal & (sink(1) | sliding_window(2))
    q, k, v = qkv(N)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=build() & policy.dense(N, N))
    result = compare(attend(build), q, k, v, policy=policy)
    assert (result.got - wanted).abs().max() < 1e-5
    assert result.report.sites[0].phase == "other"


# -- fewer queries than keys ----------------------------------------------------------------------------------------------


PAST = 5


def after_the_past() -> Tensor:
    return torch.arange(N + PAST)[None] <= torch.arange(PAST, N + PAST)[:, None]


def after_the_past_by_diagonal() -> Tensor:
    return torch.ones(N, N + PAST).tril(diagonal=PAST).bool()


@pytest.mark.parametrize("build", [after_the_past, after_the_past_by_diagonal])
def test_queries_behind_a_cache_stand_where_they_are(build: Build) -> None:
    assert_read(compare(attend(build), *qkv(N, N + PAST)), "causal")


@pytest.mark.parametrize("build", [after_the_past, after_the_past_by_diagonal])
def test_a_policy_counts_from_the_first_key(build: Build) -> None:
    policy = sink(2) | sliding_window(3)
    q, k, v = qkv(N, N + PAST)
    visible = policy.dense(N, N + PAST, q_offset=PAST) & build()
    result = compare(attend(build), q, k, v, policy=policy)
    assert (result.got - F.scaled_dot_product_attention(q, k, v, attn_mask=visible)).abs().max() < 1e-5


def test_a_position_read_from_a_tensor_is_a_position() -> None:
    """In a decode step with a static cache, the query is at position ``past``, which is known at run time only."""

    def build(past: Tensor) -> Tensor:
        return torch.arange(N)[None] <= (torch.arange(3) + past)[:, None]

    past = torch.tensor(4)
    assert_read(compare(attend(build), *qkv(3, N), past), "causal")
    policy = sink(1) | sliding_window(2)
    q, k, v = qkv(3, N)
    visible = build(past) & policy.dense(3, N, q_offset=4)
    result = compare(attend(build), q, k, v, past, policy=policy)
    assert (result.got - F.scaled_dot_product_attention(q, k, v, attn_mask=visible)).abs().max() < 1e-5


def test_keys_that_begin_later_are_counted_from_there() -> None:
    """If a cache dropped its first keys, key 0 of the tensor is key ``kv_start`` of the text."""

    def build() -> Tensor:
        return torch.arange(4, 4 + N)[None] <= torch.arange(N, N + 4)[:, None]

    result = compare(attend(build), *qkv(4, N))
    assert_read(result, "causal")


# -- dynamic lengths ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["j <= i", "window", "sink or window", "chunks", "around", "two fills", "band"])
def test_masks_of_a_dynamic_length_are_lifted(name: str) -> None:
    """The same builders, with a symbol as the length."""
    builders: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
        "j <= i": lambda i, j, n: j <= i,
        "window": lambda i, j, n: (j <= i) & (j > i - 4),
        "sink or window": lambda i, j, n: (j <= i) & ((j < 2) | (i - j < 3)),
        "chunks": lambda i, j, n: i // 4 == j // 4,
        "around": lambda i, j, n: (i - j).abs() <= 2,
        "two fills": lambda i, j, n: hidden(torch.ones(n, n).tril() != 0),
        "band": lambda i, j, n: torch.ones(n, n, dtype=torch.bool).tril().triu(-3),
    }

    def attention(x: Tensor) -> Tensor:
        q = x.view(1, -1, 4, 8).transpose(1, 2)  # [1, 4, n, 8]
        n = q.shape[2]
        mask = builders[name](torch.arange(n)[:, None], torch.arange(n)[None], n)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask)

    result = compare(attention, torch.randn(1, N, 32), dynamic=True)
    assert_read(result, CASES[name].mask)
    assert not result.report.sites[0].q_len.isdigit()
