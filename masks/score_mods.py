"""Score mods: changes to attention scores between ``q @ k`` and the softmax."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch

from sparse_compile.masks.captured import Captured
from sparse_compile.masks.mask import Index
from sparse_compile.masks.patterns.tensor import TensorLike, look_up


@dataclass(frozen=True, repr=False)
class ScoreMod(ABC):
    """A change to attention scores: a FlexAttention ``score_mod`` that is also a plain value.

    ``a >> b`` applies ``a`` first. Incoming scores are already scaled by ``1/sqrt(head_dim)``, or by the model's own scale.

        >>> from sparse_compile.masks import alibi, softcap
        >>> softcap(50.0) >> alibi([0.5, 0.25])
        softcap(50.0) >> alibi([0.5, 0.25])
    """

    name: ClassVar[str]

    @abstractmethod
    def __call__(self, score: Any, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        """Return the changed score."""

    def parts(self) -> tuple[ScoreMod, ...]:
        """Return the single changes in the order in which they are applied."""
        return (self,)

    def __rshift__(self, other: ScoreMod) -> ScoreMod:
        if not isinstance(other, ScoreMod):
            return NotImplemented
        return in_order((*self.parts(), *other.parts()))

    def captures(self) -> tuple[Captured, ...]:
        """Return the tensors that are read, each once, in the order in which they are written."""
        captured: dict[Captured, None] = {}
        for part in self.parts():
            for field in fields(part):
                value = getattr(part, field.name)
                if isinstance(value, Captured):
                    captured[value] = None
        return tuple(captured)

    def bind(self, tensors: Mapping[Captured, Captured]) -> ScoreMod:
        """Return the same change with captured tensors replaced, for example a symbol by its tensor."""
        bound = []
        for part in self.parts():
            values = {field.name: getattr(part, field.name) for field in fields(part)}
            bound.append(replace(part, **{k: tensors.get(v, v) if isinstance(v, Captured) else v for k, v in values.items()}))
        return in_order(tuple(bound))

    def __repr__(self) -> str:
        return self._written(lambda x: f"float('{x}')" if isinstance(x, float) and math.isinf(x) else repr(x))

    def __str__(self) -> str:
        return self._written(str)

    def _written(self, text: Callable[[Any], str]) -> str:
        """Return the code that builds this value, without arguments at the end that are not set."""
        values = [getattr(self, field.name) for field in fields(self)]
        count = max(at for at, (x, field) in enumerate(zip(values, fields(self), strict=True)) if x != field.default) + 1
        return f"{self.name}({', '.join(text(x) for x in values[:count])})"


@dataclass(frozen=True, repr=False)
class Sequence(ScoreMod):
    """Several changes that are applied one after the other. Written ``a >> b``."""

    mods: tuple[ScoreMod, ...]
    name: ClassVar[str] = ">>"

    def __call__(self, score: Any, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        for mod in self.mods:
            score = mod(score, b, h, q_idx, kv_idx)
        return score

    def parts(self) -> tuple[ScoreMod, ...]:
        return self.mods

    def __repr__(self) -> str:
        return " >> ".join(repr(mod) for mod in self.mods)

    def __str__(self) -> str:
        return " >> ".join(str(mod) for mod in self.mods)


def in_order(mods: tuple[ScoreMod, ...]) -> ScoreMod:
    """Combine changes in this order. Raises ``ValueError`` if ``sink_logits`` stands anywhere but last."""
    if any(isinstance(mod, SinkLogits) for mod in mods[:-1]):
        raise ValueError("sink_logits is part of the softmax and must come last: write the other score mods before it")
    return mods[0] if len(mods) == 1 else Sequence(mods)


def _capture(mod: ScoreMod, field: str, rank: int, shape: str) -> None:
    captured = Captured.of(getattr(mod, field))
    if not captured.is_symbol and captured.tensor.dim() != rank:
        raise ValueError(f"{mod.name} needs {field} of shape {shape}, got {list(captured.tensor.shape)}")
    object.__setattr__(mod, field, captured)


@dataclass(frozen=True, repr=False)
class Alibi(ScoreMod):
    """Add a penalty that grows with distance: ``score + slopes[h] * (j - i)`` (ALiBi, https://arxiv.org/abs/2108.12409).

    ``slopes`` is a float tensor ``[heads]``, one per query head.
    """

    slopes: TensorLike
    name: ClassVar[str] = "alibi"

    def __post_init__(self) -> None:
        _capture(self, "slopes", 1, "[heads]")

    def __call__(self, score: Any, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        return score + Captured.of(self.slopes).tensor[h] * (kv_idx - q_idx)


@dataclass(frozen=True, repr=False)
class Softcap(ScoreMod):
    """Limit scores to the range ``(-cap, cap)``: ``cap * tanh(score / cap)`` (Gemma 2).

    Raises ``ValueError`` unless ``0 < cap < inf``.
    """

    cap: float
    name: ClassVar[str] = "softcap"

    def __post_init__(self) -> None:
        if not 0 < self.cap < float("inf"):
            raise ValueError(f"softcap needs a finite cap above 0, got {self.cap}")

    def __call__(self, score: Any, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        return (score / self.cap).tanh() * self.cap


@dataclass(frozen=True, repr=False)
class LogWeight(ScoreMod):
    """Count keys several times: ``score + log(weight[b, j])``, for cache entries that stand for several tokens.

    ``weight`` is a non-negative float tensor ``[B, N]`` over key positions; a ``B`` of 1 fits every batch size. A weight of 0
    hides the key.
    """

    weight: TensorLike
    name: ClassVar[str] = "log_weight"

    def __post_init__(self) -> None:
        _capture(self, "weight", 2, "[batch, positions]")

    def __call__(self, score: Any, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        weight = Captured.of(self.weight).tensor
        return score + look_up(weight, b, kv_idx).log()


@dataclass(frozen=True, repr=False)
class Bias(ScoreMod):
    """Add a tensor to the scores: ``score + bias[b, h, i - q_start, j - kv_start]``, as T5 does for relative positions.

    ``bias`` is ``[B, H, Q, KV]``; an axis of size 1 is broadcast. ``q_start`` and ``kv_start`` are the text positions of its
    first query and key: integers, or one-element tensors.
    """

    bias: TensorLike
    q_start: int | TensorLike = 0
    kv_start: int | TensorLike = 0
    name: ClassVar[str] = "bias"

    def __post_init__(self) -> None:
        _capture_at_positions(self, "bias")

    def __call__(self, score: Any, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        return score + _at_positions(self, self.bias, b, h, q_idx, kv_idx)


@dataclass(frozen=True, repr=False)
class Scaled(ScoreMod):
    """Multiply scores: ``score * factor``, or ``score * factor[b, h, i - q_start, j - kv_start]`` for a tensor.

    ``factor`` is a number or a float tensor ``[B, H, Q, KV]``; an axis of size 1 is broadcast, so that ``[1, H, 1, 1]`` is a
    temperature per head (Swin v2, https://arxiv.org/abs/2111.09883). ``q_start`` and ``kv_start`` are as for ``bias``.

        >>> scaled([[[[2.0]], [[0.5]]]]) >> softcap(30.0)
        scaled([[[[2.0]], [[0.5]]]]) >> softcap(30.0)
    """

    factor: float | TensorLike
    q_start: int | TensorLike = 0
    kv_start: int | TensorLike = 0
    name: ClassVar[str] = "scaled"

    def __post_init__(self) -> None:
        if not isinstance(self.factor, int | float):
            _capture_at_positions(self, "factor")
        elif not math.isfinite(self.factor):
            raise ValueError(f"scaled needs a finite factor, got {self.factor}: hide keys with a mask")

    def __call__(self, score: Any, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        factor = self.factor
        return score * (factor if isinstance(factor, int | float) else _at_positions(self, factor, b, h, q_idx, kv_idx))


@dataclass(frozen=True, repr=False)
class Clamped(ScoreMod):
    """Cut scores off at both ends, one of which may be infinite. Raises ``ValueError`` unless ``low < high``.

    >>> clamped(-50.0, 50.0) >> alibi([0.5])
    clamped(-50.0, 50.0) >> alibi([0.5])
    """

    low: float
    high: float
    name: ClassVar[str] = "clamped"

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ValueError(f"clamped needs a low end below the high end, got {self.low} and {self.high}: swap the two")

    def __call__(self, score: Any, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        return score.clamp(min=self.low, max=self.high)


def _capture_at_positions(mod: Bias | Scaled, field: str) -> None:
    _capture(mod, field, 4, "[batch, heads, queries, keys]")
    for start in ("q_start", "kv_start"):
        if not isinstance(getattr(mod, start), int):
            _capture(mod, start, 1, "[1]")


def _at_positions(mod: Bias | Scaled, table: TensorLike, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
    q_start = mod.q_start if isinstance(mod.q_start, int) else Captured.of(mod.q_start).tensor[0]
    kv_start = mod.kv_start if isinstance(mod.kv_start, int) else Captured.of(mod.kv_start).tensor[0]
    return look_up(Captured.of(table).tensor, b, h, q_idx - q_start, kv_idx - kv_start)


@dataclass(frozen=True, repr=False)
class SinkLogits(ScoreMod):
    """Add a learned logit per query head to the softmax, for a term that carries no value (gpt-oss).

    ``weights = softmax([scores, logits[h]])[:-1]``. This is a term of the softmax and not a change to a score. It must
    therefore come last, and it cannot be called as a ``score_mod``: the attention op applies it. ``logits`` is a float tensor
    ``[heads]``.
    """

    logits: TensorLike
    name: ClassVar[str] = "sink_logits"

    def __post_init__(self) -> None:
        _capture(self, "logits", 1, "[heads]")

    def __call__(self, score: Any, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        raise TypeError(
            "sink_logits is a term of the softmax, not a score_mod: "
            "pass it to sparse_attention(score_mod=...), which applies it"
        )


@dataclass(frozen=True, repr=False)
class SinkScores(ScoreMod):
    """Replace the scores of the first keys of a text by scores computed elsewhere: ``scores[b, h, i, keys[b, j]]``.

    ``scores`` is ``[B, H, Q, n]``. ``keys`` ``[B, KV]`` holds the text position of each key. The scores of keys at positions
    0 to ``n - 1`` are replaced; other positions, negative ones included, keep their scores.
    """

    scores: TensorLike
    keys: TensorLike
    name: ClassVar[str] = "sink_scores"

    def __post_init__(self) -> None:
        _capture(self, "scores", 4, "[batch, heads, queries, keys]")
        _capture(self, "keys", 2, "[batch, keys]")

    def __call__(self, score: Any, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        scores = Captured.of(self.scores).tensor
        position = look_up(Captured.of(self.keys).tensor, b, kv_idx)
        count = scores.shape[3]
        replaced = scores[b, h, q_idx, position.clamp(min=0, max=count - 1)]
        return torch.where((position >= 0) & (position < count), replaced.to(score.dtype), score)


SCORE_MODS: tuple[type[ScoreMod], ...] = (Alibi, Softcap, LogWeight, Bias, Scaled, Clamped, SinkLogits, SinkScores, Sequence)

alibi = Alibi
softcap = Softcap
log_weight = LogWeight
bias = Bias
scaled = Scaled
clamped = Clamped
sink_logits = SinkLogits
sink_scores = SinkScores
