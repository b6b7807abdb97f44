"""Sets of keys as intervals behave like Python sets."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparse_compile.masks.bounds import Bounds
from sparse_compile.masks.intervals import INF, Intervals, normalize

Pairs = list[tuple[int, int]]

LAST = 24
KEYS = range(LAST)
pairs = st.lists(st.tuples(st.integers(0, LAST), st.integers(0, LAST)), max_size=5)  # unordered, overlapping, or empty
some_rows = st.lists(pairs, min_size=3, max_size=3)


def keys_of(row: Pairs) -> set[int]:
    return {key for start, stop in row for key in range(start, stop)}


def intervals(rows: list[Pairs]) -> Intervals:
    """Build intervals ``[rows, n]`` as the algebra does. Shorter rows are filled with empty intervals."""
    width = max([1, *(len(row) for row in rows)])
    filled = torch.tensor([row + [(7, 7)] * (width - len(row)) for row in rows])
    return normalize(filled[..., 0], filled[..., 1])


def sets(found: Intervals) -> list[set[int]]:
    """Return the keys of each row. Fails if intervals overlap, because their sizes would then count a key twice."""
    rows = []
    for starts, stops in zip(found.start.tolist(), found.stop.tolist(), strict=True):
        keys = [key for start, stop in zip(starts, stops, strict=True) for key in KEYS if start <= key < stop]
        assert len(keys) == len(set(keys))
        rows.append(set(keys))
    return rows


def windows(count: int) -> tuple[Tensor, Tensor]:
    """Return some ranges ``[start, stop)`` for each of ``count`` rows."""
    start = torch.arange(0, LAST, 5).expand(count, -1)
    return start, start + 5


@given(some_rows)
def test_normalising_keeps_the_keys(rows: list[Pairs]) -> None:
    assert sets(intervals(rows)) == [keys_of(row) for row in rows]


@given(some_rows)
def test_normalised_starts_ascend(rows: list[Pairs]) -> None:
    assert (intervals(rows).start.diff(dim=-1) >= 0).all()


@given(some_rows, some_rows)
def test_and_is_intersection(a: list[Pairs], b: list[Pairs]) -> None:
    assert sets(intervals(a) & intervals(b)) == [keys_of(x) & keys_of(y) for x, y in zip(a, b, strict=True)]


def test_and_of_interleaved_intervals_has_more_of_them_than_either() -> None:
    assert sets(intervals([[(0, 4), (6, 10)]]) & intervals([[(2, 7), (8, 12)]])) == [{2, 3, 6, 8, 9}]


@given(some_rows, some_rows)
def test_or_is_union(a: list[Pairs], b: list[Pairs]) -> None:
    assert sets(intervals(a) | intervals(b)) == [keys_of(x) | keys_of(y) for x, y in zip(a, b, strict=True)]


@given(some_rows)
def test_not_is_complement(a: list[Pairs]) -> None:
    assert sets(~intervals(a)) == [set(KEYS) - keys_of(x) for x in a]


@given(some_rows, some_rows, some_rows)
def test_operations_chain(a: list[Pairs], b: list[Pairs], c: list[Pairs]) -> None:
    found = ~(intervals(a) & ~intervals(b)) & (intervals(c) | ~intervals(a))
    expected = [
        (set(KEYS) - (keys_of(x) - keys_of(y))) & (keys_of(z) | (set(KEYS) - keys_of(x)))
        for x, y, z in zip(a, b, c, strict=True)
    ]
    assert sets(found) == expected


@given(some_rows)
def test_double_complement_is_the_same_set(a: list[Pairs]) -> None:
    assert sets(~~intervals(a)) == [keys_of(x) for x in a]


@given(some_rows, some_rows)
def test_count_is_the_size(a: list[Pairs], b: list[Pairs]) -> None:
    found = (intervals(a) | intervals(b)).count()
    assert found.tolist() == [len(keys_of(x) | keys_of(y)) for x, y in zip(a, b, strict=True)]


@given(some_rows, st.integers(0, LAST), st.integers(0, LAST))
def test_clamp_is_the_part_within(a: list[Pairs], low: int, high: int) -> None:
    low, high = min(low, high), max(low, high)
    assert (~intervals(a)).clamp(low, high).count().tolist() == [len(set(range(low, high)) - keys_of(x)) for x in a]


@given(some_rows)
def test_overlap_counts_shared_keys(a: list[Pairs]) -> None:
    starts, stops = windows(3)
    expected = [
        [len(keys_of(x) & set(range(start, stop))) for start, stop in zip(s, e, strict=True)]
        for x, s, e in zip(a, starts.tolist(), stops.tolist(), strict=True)
    ]
    assert intervals(a).overlap(starts, stops).tolist() == expected


@given(some_rows, some_rows)
def test_batches_broadcast(a: list[Pairs], b: list[Pairs]) -> None:
    batched = Intervals.stacked(
        *(torch.stack([x, x])[:, None] for x in (intervals(b).start, intervals(b).stop))
    )  # [2, 1, rows, n]
    found = intervals(a) | batched
    expected = [keys_of(x) | keys_of(y) for x, y in zip(a, b, strict=True)]
    assert [sets(Intervals.stacked(found.start[k, 0], found.stop[k, 0])) for k in range(2)] == [expected, expected]


@given(st.integers(0, LAST), st.integers(0, LAST))
def test_one_interval_that_ends_before_it_starts_is_empty(start: int, stop: int) -> None:
    assert sets(Intervals.of(torch.tensor([start]), torch.tensor([stop]))) == [set(range(start, stop))]


def test_everything_holds_every_key() -> None:
    assert sets(Intervals.everything(torch.zeros(2))) == [set(KEYS)] * 2


def test_nothing_holds_no_key() -> None:
    assert sets(Intervals.nothing(torch.zeros(2))) == [set(), set()]


def test_positions_added_to_no_limit_do_not_overflow() -> None:
    assert torch.iinfo(torch.int64).max > INF + INF


@given(some_rows, some_rows)
def test_not_swaps_what_may_and_what_must_be_seen(a: list[Pairs], b: list[Pairs]) -> None:
    found = ~Bounds(maybe=intervals(a), surely=intervals(b))
    everything = set(KEYS)
    assert (sets(found.maybe), sets(found.surely)) == (
        [everything - keys_of(y) for y in b],
        [everything - keys_of(x) for x in a],
    )
