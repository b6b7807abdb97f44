"""Play a sample of the fuzzer's cases, and check that the fuzzer notices faults. ``make fuzz`` plays random cases."""

from __future__ import annotations

import pytest

import sparse_compile as sc
from fuzz.case import Case, Prompt
from fuzz.play import play
from fuzz.sample import REFUSED, SAMPLE
from sparse_compile.masks import Mask
from sparse_compile.masks.patterns.positional import SlidingWindow

STREAMING = "causal & (sink(2) | sliding_window(5))"


@pytest.mark.parametrize("name", SAMPLE)
def test_a_case_equals_the_oracle_or_is_refused_for_a_right_reason(name: str) -> None:
    verdict = play(SAMPLE[name])
    assert verdict.kind == ("refused" if name in REFUSED else "equal"), verdict.detail


def test_the_fuzzer_notices_a_mask_that_shows_one_key_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlidingWindow, "__call__", lambda self, b, h, i, j: j >= i - self.size)
    assert play(Case(STREAMING, (Prompt(12),))).kind == "wrong"


def test_the_fuzzer_notices_an_error_that_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: sc.Policy, *_: object, **__: object) -> Mask | None:
        raise IndexError("out of range")

    monkeypatch.setattr(sc.Policy, "mask_for", broken)
    assert play(Case(STREAMING, (Prompt(12),))).kind == "raw"


def test_the_fuzzer_notices_a_refusal_without_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    case = SAMPLE["a text that is too long is refused"]
    monkeypatch.setattr("fuzz.refusals.RIGHT", [])
    assert play(case).kind == "unjust"


def test_a_case_prints_as_a_program_that_builds_it() -> None:
    for case in SAMPLE.values():
        program = case.script().replace("print(play(", "built = ((")
        names: dict[str, object] = {}
        exec(program, names)
        assert names["built"] == case
