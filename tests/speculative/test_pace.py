"""Check how many tokens are drafted, against what each number would yield."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_compile.speculative.pace import MOST, ROUNDS, Pace, Stopwatch


def paced(acceptance: float, draft: float, verify: float) -> Pace:
    """A pace after many rounds of equal times and of drafts that are right with this probability."""
    pace = Pace()
    for _ in range(400):
        pace.note_drafts(round(acceptance * 100), wrong=False)
        pace._tested += 100 - round(acceptance * 100)
    for _ in range(ROUNDS):
        pace.note_times(2, 2 * draft, verify)
    return pace


def yields(acceptance: float, drafts: int, draft: float, verify: float) -> float:
    """Tokens a second of a round, token by token: the first always comes, each other one after right drafts only."""
    expected, probability = 0.0, 1.0
    for _ in range(drafts + 1):
        expected, probability = expected + probability, probability * acceptance
    return expected / (drafts * draft + verify)


@given(st.integers(0, 99), st.integers(1, 200), st.integers(1, 200))
def test_the_number_of_drafts_yields_most(percent: int, draft: int, verify: int) -> None:
    pace = paced(percent / 100, draft / 1e3, verify / 1e3)
    assert pace.acceptance == pytest.approx(percent / 100, abs=1e-6)
    chosen = yields(pace.acceptance, pace.drafts(), draft / 1e3, verify / 1e3)
    best = max(yields(pace.acceptance, n, draft / 1e3, verify / 1e3) for n in range(MOST + 1))
    assert chosen == pytest.approx(best)
    if pace.acceptance < pace.break_even - 1e-9:
        assert pace.drafts() == 0


def test_nothing_is_concluded_from_the_first_rounds() -> None:
    pace = Pace()
    for _ in range(ROUNDS - 1):
        pace.note_times(4, 400.0, 1.0)
        pace.note_drafts(0, wrong=True)
        assert pace.drafts() == 4
    pace.note_times(4, 400.0, 1.0)
    assert pace.drafts() == 0


def test_a_number_stays() -> None:
    pace = Pace(5)
    for _ in range(20):
        pace.note_times(5, 500.0, 1.0)
        pace.note_drafts(0, wrong=True)
    assert pace.drafts() == pace.most == 5


def test_acceptance_follows_the_latest_rounds() -> None:
    pace = Pace()
    for _ in range(100):
        pace.note_drafts(0, wrong=True)
    assert pace.acceptance < 0.05
    for _ in range(100):
        pace.note_drafts(1, wrong=False)
    assert pace.acceptance > 0.95


def test_a_stopwatch_measures_between_marks() -> None:
    watch = Stopwatch(torch.device("cpu"))
    watch.mark()
    time.sleep(0.01)
    watch.mark()
    watch.mark()
    seconds = watch.seconds()
    assert seconds is not None and seconds[0] >= 0.01 > seconds[1]
