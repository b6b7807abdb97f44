"""Show how far a calibration is, and about how long it will take, as one line on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Lock, Thread
from typing import Any, TextIO

from sparse_compile.calibration.run_length import RunLength

TERMINAL, FILE = 0.5, 30.0  # seconds between two lines; a terminal overwrites its line, and a file keeps all of them


def duration(seconds: float) -> str:
    """A time as people say it.

    >>> [duration(seconds) for seconds in (0.4, 42, 200, 7500)]
    ['0 s', '42 s', '3 min 20 s', '2 h 5 min']
    """
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


@dataclass
class Line:
    """A line that changes while something runs. The first text is shown at once, and later ones after some time has passed."""

    shown: bool = True
    stream: TextIO = field(default_factory=lambda: sys.stderr)
    clock: Callable[[], float] = time.monotonic
    _next: float = 0.0
    _text: str = ""  # on the line
    _lock: Any = field(default_factory=Lock)

    def show(self, text: str, *, now: bool = False) -> None:
        """Replace the line, if it is time to, or ``now``."""
        if self.shown and (now or self.clock() >= self._next) and text != self._text:
            self._write(f"\r\033[K{text}" if self.stream.isatty() else f"{text}\n")
            self._text = text
            self._next = self.clock() + (TERMINAL if self.stream.isatty() else FILE)

    def say(self, text: str) -> None:
        """Print a text that stays."""
        if self.shown:
            self._write(f"\r\033[K{text}\n" if self.stream.isatty() else f"{text}\n")
            self._text = ""

    def end(self) -> None:
        """End the line, so that what is printed next begins another one."""
        if self.shown and self._text and self.stream.isatty():
            self._write("\n")

    def _write(self, text: str) -> None:
        with self._lock:
            self.stream.write(text)
            self.stream.flush()


class Steps:
    """What is known of a training: the step, what it measured, and the time that is left.

    ``length`` returns the number of tokens of a step, if that is known before, and ``compiles`` how many graphs were compiled.
    """

    def __init__(
        self, start: int, steps: int, line: Line, *, length: Callable[[int], int] | None, compiles: Callable[[], int]
    ) -> None:
        self.start, self.steps, self.line, self.compiles = start, steps, line, compiles
        self.lengths = [length(step) for step in range(start, steps)] if length is not None and line.shown else None
        self.run = RunLength()
        self._began = self._last = line.clock()
        self._compiled = compiles()
        self._announced: bool | None = None  # whether the estimate that was said last was rough
        self._told = f"step {start + 1:,} of {steps:,}, compiling"
        self._left = 0.0  # seconds after the last step that is done

    def text(self) -> str:
        """The line that shows the last step that is done."""
        now = self.line.clock()
        left = max(0.0, self._left - (now - self._last))
        return f"{self._told}, {duration(now - self._began)}" + (f", about {duration(left)} left" if left else "")

    def note(self, step: int, tokens: int, measured: str) -> None:
        """Add a step that is done, with its tokens and the text of what it measured."""
        now, compiled = self.line.clock(), self.compiles()
        self.run.note(tokens, now - self._last, compiled=compiled > self._compiled)
        self._last, self._compiled = now, compiled
        left = self.run.of(self._remaining(step + 1))
        if step + 1 < self.steps and self._announced != (rough := self.run.is_rough):
            self._announced = rough
            taken = f"{self.steps - self.start:,} steps take about {duration(now - self._began + left)}"
            self.line.say(f"{taken}, measured on a step of {tokens:,} tokens{' that also compiled' if rough else ''}")
        self._told = f"step {step + 1:,} of {self.steps:,} is done, {measured}"
        self._left = left if step + 1 < self.steps else 0.0

    def _remaining(self, step: int) -> Sequence[int] | int:
        return self.steps - step if self.lengths is None else self.lengths[step - self.start :]


@contextmanager
def ticking(text: Callable[[], str], line: Line, *, period: float = TERMINAL) -> Iterator[None]:
    """Show ``text()`` again and again while the body runs, from a thread of its own, and once more at its end."""
    if not line.shown:
        yield
        return
    ended = Event()

    def tick() -> None:
        while not ended.wait(period):
            line.show(text())

    line.show(text())
    thread = Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        line.show(text(), now=True)
        line.end()
