"""Serve the decode steps of one call of ``generate`` from verified drafts.

``generate`` runs as it always does: it asks the model for the logits after one more token, and chooses the next token. These
logits come from a verification of several tokens at once. If ``generate`` chooses the token that was drafted, the logits after
it are there already. If not, the cache forgets the drafts from there on. The tokens are therefore those of full attention,
whether they are sampled or not, and whatever processors and stopping criteria do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_compile.passes.torch_private import keep_sizes
from sparse_compile.speculative.draft import Drafter
from sparse_compile.speculative.pace import Pace, Stopwatch


@dataclass
class Statistics:
    """What speculative decoding did in one call of ``generate``.

    ``drafted`` tokens were proposed, and ``accepted`` of them were right. ``verifications`` counts the rounds, those without
    any draft included, and ``tokens`` the tokens that they gave. For a batch, every number counts steps of all rows together.
    ``draft_seconds`` and ``verify_seconds`` are the shortest times of one draft and of a verification in the latest rounds.
    They are NaN if no draft was tested.
    """

    drafted: int = 0
    accepted: int = 0
    verifications: int = 0
    tokens: int = 0
    draft_seconds: float = math.nan
    verify_seconds: float = math.nan

    def read(self, pace: Pace) -> None:
        """Take over the times of ``pace``."""
        self.draft_seconds, self.verify_seconds = pace.draft_seconds, pace.verify_seconds

    @property
    def tokens_a_verification(self) -> float:
        """How many tokens came from a verification on average: 1 without drafts."""
        return self.tokens / max(self.verifications, 1)


@dataclass
class _Round:
    """A verification. Its ``outputs`` are those of the model for the token of ``generate``, all ``drafts``, and filling.

    ``served`` is the number of tokens after which the logits were given to ``generate``. ``times`` are still to be read.
    """

    outputs: Any
    drafts: Tensor  # [B, n]
    width: int
    served: int
    times: Stopwatch | None

    def output(self) -> Any:
        """The model's output for the token that ``generate`` gave last."""
        return type(self.outputs)(**{name: self._part(value) for name, value in self.outputs.items()})

    def _part(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._part, value))
        is_by_token = isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == self.width
        return value[:, self.served - 1 : self.served] if is_by_token else value


class Speculation:
    """The drafts and verifications of one call of ``generate`` over ``cache``. The texts ``ids`` grow to ``longest`` tokens.

    The call of ``generate`` with the prompt is served too if the cache holds all tokens of the prompt but one.
    """

    def __init__(
        self, cache: Any, ids: Tensor, pace: Pace, drafter: Drafter, longest: int, give_up: Callable[[Pace], None]
    ) -> None:
        self.cache, self.pace, self.drafter, self.longest, self.give_up = cache, pace, drafter, longest, give_up
        self.statistics = Statistics()
        self.ids = ids  # the text so far, [B, n]
        self.finished: Tensor | None = None  # rows whose text has ended
        self._round: _Round | None = None
        self._held: int | None = None  # columns of the cache that ``generate`` counts
        self._is_busy = False
        self._is_plain = False

    def note_text(self, ids: Tensor, finished: Tensor) -> None:
        """Record the text after a new token, and the rows that it ends."""
        self.ids, self.finished = ids, finished if self.finished is None else self.finished | finished

    def takes(self, cache: Any, tokens: int) -> bool:
        """Whether a call of the model with this cache is a step that this object serves."""
        return cache is self.cache and tokens == 1 and not self._is_busy

    def step(self, run: Callable[[dict[str, Any]], Any], kwargs: dict[str, Any]) -> Any:
        """Return the model's output for the next token. ``run(kwargs)`` runs the model."""
        self.statistics.tokens += 1
        if not self._continues(kwargs["input_ids"]):
            self.settle()
            self._is_busy = True
            try:
                self._round = self._verify(run, kwargs)
            finally:
                self._is_busy = False
        assert self._round is not None and self._held is not None
        self._round.served += 1
        self._held += 1
        return self._round.output()

    def settle(self) -> None:
        """Take all tokens out of the cache that ``generate`` has not given to the model."""
        columns, failed = self.cache.host_state.columns, self.cache.host_state.failed
        if self._held is not None and columns > self._held and not failed:
            self.cache.crop(self._held - columns)
        self._held, self._round = None, None

    def _continues(self, token: Tensor) -> bool:
        """Whether every unfinished row got the token that was drafted for it."""
        current = self._round
        if current is None or current.served > current.drafts.shape[1]:
            return False
        same = token == current.drafts[:, current.served - 1 : current.served]
        agrees = bool((same if self.finished is None else same | self.finished.unsqueeze(1)).all())
        # The device has reached this point, so the times of the round can be read.
        self._note(current, agrees=agrees)
        return agrees

    def _note(self, current: _Round, *, agrees: bool) -> None:
        self.statistics.accepted += agrees
        self.pace.note_drafts(int(agrees), wrong=not agrees)
        times = current.times.seconds() if current.times is not None else None
        if times is not None:
            self.pace.note_times(current.drafts.shape[1], *times)
            current.times = None

    def _verify(self, run: Callable[[dict[str, Any]], Any], kwargs: dict[str, Any]) -> _Round:
        """Draft tokens after the one in ``kwargs``, take them out of the cache again, and verify them."""
        self._held = held = self.cache.host_state.columns
        count, watch = self._count(), Stopwatch(self.ids.device)
        watch.mark()

        def step(token: Tensor, number: int) -> Tensor:
            logits: Tensor = run(self._arguments(kwargs, token, number)).logits
            return logits

        drafts = self.drafter.draft(step, self.ids, count)
        if count:
            self.cache.crop(held - self.cache.host_state.columns)
        watch.mark()
        width = 1 if self._is_plain else self.pace.most + 1
        given = torch.cat((kwargs["input_ids"], drafts), dim=1)
        given = torch.cat((given, given[:, -1:].expand(-1, width - given.shape[1])), dim=1)
        with self.cache.verifying():
            outputs = run(self._arguments(kwargs, given, 0))
        watch.mark()
        self.statistics.drafted += count
        self.statistics.verifications += 1
        return _Round(outputs, drafts, width, 0, watch if count else None)

    def _count(self) -> int:
        """How many tokens to draft: at most so many that the verification does not exceed the longest text."""
        if self._is_plain:
            return 0
        count = self.pace.drafts()
        if not count:
            self._is_plain = True
            self.give_up(self.pace)
        return max(0, min(count, self.longest - self.ids.shape[1] - 1))

    def _arguments(self, kwargs: Mapping[str, Any], tokens: Tensor, skipped: int) -> dict[str, Any]:
        """The arguments for ``tokens`` ``[B, n]`` in place of the one token in ``kwargs``, after ``skipped`` others."""
        count = tokens.shape[1]
        changed = {**kwargs, "input_ids": keep_sizes(tokens.contiguous())}
        if "attention_mask" in kwargs:
            changed["attention_mask"] = self.cache.positions.padding.for_more(kwargs["attention_mask"], skipped + count - 1)
        for name in ("position_ids", "cache_position"):
            if isinstance(kwargs.get(name), Tensor):
                after = torch.arange(skipped, skipped + count, device=tokens.device)
                changed[name] = keep_sizes(kwargs[name] + after)
        if "logits_to_keep" in kwargs:
            changed["logits_to_keep"] = count
        return changed


_current: ContextVar[Speculation | None] = ContextVar("sparse_compile_speculation", default=None)


@contextmanager
def speculating(speculation: Speculation) -> Iterator[None]:
    """A context in which ``speculation`` serves the decode steps over its cache. At its end, the cache is settled."""
    token = _current.set(speculation)
    try:
        yield
    finally:
        _current.reset(token)
        speculation.settle()


def current_speculation() -> Speculation | None:
    """The speculation of the call of ``generate`` that runs in this thread."""
    return _current.get()
