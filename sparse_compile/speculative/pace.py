"""Choose how many tokens to draft before each verification, from measured times and from how often drafts are right."""

from __future__ import annotations

import math
import time
from collections import deque
from dataclasses import dataclass, field

import torch

MOST = 7  # drafts of a round unless a number is given; a verification has one more token
FORGETTING = 0.95  # weight of a round in the share of right drafts, relative to the round after it
ROUNDS = 4  # before they have run, nothing is concluded: kernels are compiled and CUDA graphs are recorded in the first ones
REMEMBERED = 16  # rounds whose times count


@dataclass
class Pace:
    """How many tokens are drafted in a round. ``fixed`` is that number; None means that it follows from what is measured.

    A round drafts ``n`` tokens, each in ``draft`` seconds, and verifies them in ``verify`` seconds. If a draft is right with
    probability ``p``, a round yields ``1 + p + ... + p**n`` tokens, because the verification also gives the token after the
    last right draft (Leviathan et al., https://arxiv.org/abs/2211.17192). ``n`` has the most tokens a second. Without drafts,
    there is one token for each ``verify``.
    """

    fixed: int | None = None
    _right: float = 3.0  # a prior of four drafts
    _tested: float = 4.0
    _rounds: int = 0
    _draft: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    _verify: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    @property
    def most(self) -> int:
        """The largest number of drafts in a round."""
        return MOST if self.fixed is None else self.fixed

    @property
    def acceptance(self) -> float:
        """The probability that a draft is right if all drafts before it are."""
        return min(self._right / self._tested, 0.999)

    @property
    def draft_seconds(self) -> float:
        """The shortest time of a draft among the latest rounds; NaN without any."""
        return min(self._draft, default=math.nan)

    @property
    def verify_seconds(self) -> float:
        """The shortest time of a verification among the latest rounds; NaN without any."""
        return min(self._verify, default=math.nan)

    @property
    def break_even(self) -> float:
        """The acceptance from which on drafts pay, for the times that were measured; above 1 if they never do."""
        return self.draft_seconds / self.verify_seconds

    def drafts(self) -> int:
        """The number of tokens to draft next; 0 if drafts do not pay."""
        if self.fixed is not None:
            return self.fixed
        if self._rounds < ROUNDS:
            return min(4, self.most)
        return max(range(self.most + 1), key=self._tokens_a_second)

    def _tokens_a_second(self, drafts: int) -> float:
        tokens = sum(self.acceptance**n for n in range(drafts + 1))
        return tokens / (drafts * self.draft_seconds + self.verify_seconds)

    def note_times(self, drafts: int, draft: float, verify: float) -> None:
        """Record the seconds in which ``drafts`` tokens were drafted, and those of the verification."""
        self._rounds += 1
        if drafts:
            self._draft.append(draft / drafts)
        self._verify.append(verify)

    def note_drafts(self, right: int, *, wrong: bool) -> None:
        """Record how many drafts were right, and whether one was wrong. Drafts after a wrong one say nothing."""
        self._right = self._right * FORGETTING + right
        self._tested = self._tested * FORGETTING + right + wrong


class Stopwatch:
    """Takes the times between marks on a device, without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._marks: list[torch.cuda.Event | float] = []

    def mark(self) -> None:
        """Note the time at which the device has done everything that it was given so far."""
        if not self._is_cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float] | None:
        """The seconds between the marks; None if the device has not reached the last one."""
        if any(isinstance(mark, torch.cuda.Event) and not mark.query() for mark in self._marks):
            return None
        return [_between(first, last) for first, last in zip(self._marks, self._marks[1:], strict=False)]


def _between(first: torch.cuda.Event | float, last: torch.cuda.Event | float) -> float:
    if isinstance(first, torch.cuda.Event) and isinstance(last, torch.cuda.Event):
        return float(first.elapsed_time(last)) / 1e3
    assert isinstance(first, float) and isinstance(last, float)
    return last - first
