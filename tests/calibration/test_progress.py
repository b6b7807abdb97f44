"""What a calibration says while it runs: how far it is, and how long the rest takes."""

from __future__ import annotations

import io
import time
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_compile.calibration import Passkeys
from sparse_compile.calibration.head_statistics import Layers, _Sums
from sparse_compile.calibration.progress import FILE, TERMINAL, Line, Steps, ticking
from sparse_compile.calibration.run_length import RunLength
from sparse_compile.passes.ops.attention_stats import STATISTICS, Look
from support.models import VOCABULARY


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@dataclass
class Clock:
    """A clock that a test moves."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


def line(stream: io.StringIO) -> tuple[Line, Clock]:
    clock = Clock()
    return Line(stream=stream, clock=clock), clock


def test_a_file_gets_a_line_from_time_to_time() -> None:
    shown, clock = line(stream := io.StringIO())
    for step in range(5):
        shown.show(f"step {step}")
        clock.now += FILE / 2
    shown.show("the last", now=True)
    shown.end()
    assert stream.getvalue() == "step 0\nstep 2\nstep 4\nthe last\n"


def test_a_terminal_has_one_line_that_ends() -> None:
    shown, clock = line(stream := Terminal())
    shown.show("step 0")
    shown.say("a word")
    clock.now += TERMINAL
    shown.show("step 1")
    shown.end()
    assert stream.getvalue() == "\r\033[Kstep 0\r\033[Ka word\n\r\033[Kstep 1\n"


def test_who_wants_no_progress_gets_none() -> None:
    shown = Line(False, stream=(stream := Terminal()))
    with ticking(lambda: "step 0", shown):
        shown.say("a word")
    assert stream.getvalue() == ""


def test_a_long_operation_does_not_keep_the_line_still() -> None:
    shown = Line(stream=(stream := io.StringIO()))
    texts = iter(f"step {step}" for step in range(1000))

    def text() -> str:
        shown._next = 0.0  # let every text be shown
        return next(texts)

    with ticking(text, shown, period=0.01):
        while stream.getvalue().count("\n") < 4:
            time.sleep(0.01)


def test_an_error_ends_the_line_before_it_is_printed() -> None:
    shown, _ = line(stream := Terminal())
    with pytest.raises(ValueError, match="wrong"), ticking(lambda: "step 0", shown):
        raise ValueError("wrong")
    assert stream.getvalue().endswith("step 0\n")


LENGTHS = (1000, 3000, 2000, 4000)


@pytest.mark.parametrize("known", [True, False])
def test_a_training_says_its_length_after_its_first_steps(known: bool) -> None:
    """A step takes 9 seconds for each 1000 tokens; the first one also compiles, for 21 more."""
    shown, clock = line(stream := io.StringIO())
    graphs = 0
    steps = Steps(0, 4, shown, length=LENGTHS.__getitem__ if known else None, compiles=lambda: graphs)
    assert steps.text() == "step 1 of 4, compiling, 0 s"
    graphs, clock.now = 2, clock.now + 30
    steps.note(0, 1000, "loss 1")
    expected = "5 min 0 s" if known else "2 min 0 s"
    assert stream.getvalue() == f"4 steps take about {expected}, measured on a step of 1,000 tokens that also compiled\n"
    clock.now += 27
    steps.note(1, 3000, "loss 2")
    remaining = 9 * (2 + 4) if known else 27 * 2
    told = f"4 steps take about 1 min {57 + remaining - 60} s, measured on a step of 3,000 tokens"
    assert stream.getvalue().splitlines()[1] == told
    assert steps.text() == f"step 2 of 4 is done, loss 2, 57 s, about {remaining} s left"
    clock.now += 2
    assert steps.text() == f"step 2 of 4 is done, loss 2, 59 s, about {remaining - 2} s left"
    clock.now -= 2
    for step in (2, 3):
        clock.now += 9 * LENGTHS[step] / 1000
        steps.note(step, LENGTHS[step], f"loss {step + 1}")
    assert steps.text() == "step 4 of 4 is done, loss 4, 1 min 51 s"
    assert stream.getvalue().count("\n") == 2


@given(st.floats(0, 1e-2), st.floats(1e-9, 1e-6), st.lists(st.integers(100, 30000), min_size=2, max_size=8, unique=True))
def test_two_lengths_tell_how_long_any_other_takes(linear: float, square: float, lengths: list[int]) -> None:
    run = RunLength()
    for tokens in lengths:
        run.note(tokens, linear * tokens + square * tokens**2, compiled=False)
    wanted = sum(linear * tokens + square * tokens**2 for tokens in (500, 32000))
    assert run.of([500, 32000]) == pytest.approx(wanted, rel=1e-3)


@given(st.lists(st.tuples(st.integers(1, 9999), st.floats(1e-3, 1e3)), min_size=1, max_size=6))
def test_noise_makes_no_time_negative(measured: list[tuple[int, float]]) -> None:
    run = RunLength()
    for tokens, seconds in measured:
        run.note(tokens, seconds, compiled=False)
    assert all(run.of([tokens]) > 0 for tokens in (1, 100, 10000))


def test_the_length_of_a_text_is_known_before_it_is_made() -> None:
    data = Passkeys.of_tokens(VOCABULARY, longest=400, shortest=100, count=1, size=3, seed=5)
    lengths = [data.length(step) for step in range(20)]
    assert lengths == [data(step)[0].shape[1] for step in range(20)]
    assert len(set(lengths)) > 5


def test_a_pass_says_which_layers_it_has_measured() -> None:
    clock = Clock()
    sums = _Sums(4, Look(), torch.device("cpu"))
    told = Layers(sums, 50, clock)
    clock.now += 3
    assert told.text() == "one pass over 50 tokens, compiling, 3 s"
    totals = [sums(layer, 2, 50)[0] for layer in range(4)]
    assert "compiling" in told.text()
    totals[0][:, STATISTICS.index("entropy"), 1] = 25
    assert told.text() == "0.5 of 4 layers are done, 3 s"
    clock.now += 15
    totals[0][:, STATISTICS.index("entropy"), 1] = 50
    totals[1][:, STATISTICS.index("entropy"), 1] = 25
    assert told.text() == "1.5 of 4 layers are done, 18 s, about 25 s left"
