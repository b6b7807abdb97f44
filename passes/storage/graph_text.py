"""Write values as text, so that a graph can carry them as arguments of its ops.

Every such value uses this one encoding: plans, formats, masks, score mods and kernel specifications. The text is JSON, so equal
values give equal text, and reading it never runs code.
"""

from __future__ import annotations

import json
from dataclasses import fields
from functools import lru_cache
from typing import Any, TypeVar

from sparse_compile.masks import Mask, ScoreMod
from sparse_compile.masks.captured import Captured
from sparse_compile.masks.json_format import decode, decode_value, encode, encode_value
from sparse_compile.masks.score_mods import SCORE_MODS
from sparse_compile.passes.torch_private import real_tensors

T = TypeVar("T")
_RIDERS: dict[str, type[Any]] = {kind.__name__: kind for kind in SCORE_MODS}


def rides_in_graphs(kind: type[T]) -> type[T]:
    """Register a frozen dataclass, so that ``from_text`` can rebuild it from its fields."""
    _RIDERS[kind.__name__] = kind
    return kind


def to_text(value: Any) -> str:
    """Return ``value`` as text.

    ``value`` may consist of numbers, text, None, tuples, masks, score mods, captured tensors and registered dataclasses.
    Anything else raises ``TypeError``.
    """
    return json.dumps(_encode(value))


@lru_cache(maxsize=4096)
def from_text(text: str) -> Any:
    """Rebuild the value from the output of ``to_text``. Its tensors are real and on the CPU, even while a graph is traced."""
    with real_tensors():
        return _decode(json.loads(text))


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if isinstance(value, Mask):
        return {"mask": encode(value)}
    if isinstance(value, Captured):
        return {"tensor": encode_value(value)}
    kind = type(value).__name__
    if isinstance(value, ScoreMod) or _RIDERS.get(kind) is type(value):
        return {kind: [_encode(getattr(value, field.name)) for field in fields(value)]}
    raise TypeError(f"a graph carries numbers, text, tuples, masks, score mods and registered dataclasses, got {value!r}")


def _decode(content: Any) -> Any:
    if isinstance(content, list):
        return tuple(_decode(item) for item in content)
    if not isinstance(content, dict):
        return content
    ((kind, value),) = content.items()
    if kind == "mask":
        return decode(value)
    if kind == "tensor":
        return decode_value(value)
    return _RIDERS[kind](*map(_decode, value))
