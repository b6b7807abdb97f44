"""Draw and play batches of random cases. Other processes import this file, so it is not the program itself."""

from __future__ import annotations

import logging
import warnings

from hypothesis import HealthCheck, Phase, given, seed, settings

from fuzz.case import Case
from fuzz.draw import cases
from fuzz.play import Verdict, play

BATCH = 10  # cases of one seed


def drawn(number: int, count: int = BATCH) -> list[Case]:
    """The cases of batch ``number``."""
    found: list[Case] = []

    @seed(number)
    @settings(
        max_examples=count + 1, database=None, deadline=None, derandomize=False, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases())
    def collect(case: Case) -> None:
        found.append(case)

    collect()
    return found[1 : count + 1]  # the first example is the simplest one, for every seed


def play_batch(task: tuple[int, int]) -> list[tuple[Case, Verdict]]:
    """Play the cases of one batch."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    return [(case, play(case)) for case in drawn(*task)]
