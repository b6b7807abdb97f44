"""Convert masks to JSON and back. Every node of a mask is an object with one key."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from typing import Any

import torch

from sparse_compile.masks.captured import Captured
from sparse_compile.masks.mask import Mask, view
from sparse_compile.masks.operators import And, Full, Not, Or, both, either
from sparse_compile.masks.patterns.documents import Document, Documents
from sparse_compile.masks.patterns.moved import Coarse, OfQueries, Shifted
from sparse_compile.masks.patterns.neighborhood import Neighborhood
from sparse_compile.masks.patterns.per_head import PerHead
from sparse_compile.masks.patterns.positional import Causal, Chunked, Dilated, Sink, SlidingWindow, Strided
from sparse_compile.masks.patterns.remapped import Relaxed, Remapped
from sparse_compile.masks.patterns.repeating import Periodic, Repeated, Within
from sparse_compile.masks.patterns.tensor import Explicit, Padding, Prefix
from sparse_compile.masks.selection.page_topk import PageTopK

VERSION = 1
READERS = {  # by what a file holds
    "mask": "Mask.from_json",
    "policy": "Policy.load",
    "profile": "Profile.load, whose method policy() builds a policy",
}
PATTERNS: dict[str, type[Mask]] = {
    pattern.name: pattern
    for pattern in (
        *(Full, Causal, Sink, SlidingWindow, Chunked, Strided, Dilated),
        *(Prefix, Document, Documents, Padding, Explicit, Neighborhood, PerHead, Remapped, Relaxed, PageTopK),
        *(Coarse, Shifted, OfQueries, Periodic, Repeated, Within),
    )
}


@view
def to_json(mask: Mask) -> str:
    """See ``Mask.to_json``."""
    return json.dumps({"version": VERSION, "mask": encode(mask)})


@view
def from_json(text: str) -> Mask:
    """See ``Mask.from_json``."""
    content = parse_json(text, "mask")
    check_kind(content, "mask")
    if not isinstance(content, dict) or content.get("version") != VERSION or "mask" not in content:
        got = content.get("version") if isinstance(content, dict) else content
        raise ValueError(f"a mask file needs version {VERSION} and a mask, got version {got!r}: write it again with to_json")
    return decode(content["mask"])


def parse_json(text: str, what: str) -> Any:
    """Parse JSON text. Raises ``ValueError`` for invalid JSON; the message says that a ``what`` was expected."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as broken:
        raise ValueError(f"cannot read a {what}, because the text is not valid JSON: {broken}") from broken


def check_kind(content: Any, what: str) -> None:
    """Raise ``ValueError`` if a JSON file holds a value of another kind than ``what``."""
    kinds = [kind for kind in READERS if isinstance(content, dict) and kind in content]
    if kinds and what not in kinds:
        raise ValueError(f"a {what} file is needed, but this is a {kinds[0]} file: read it with {READERS[kinds[0]]}")


def read_json(text: str, what: str, version: int, remedy: str, *, holds: type | None = None) -> Any:
    """Return the value under the key ``what`` in a JSON file of this ``version``.

    With ``holds``, the value must have that type. Without it, the value may be anything and may be missing (then None).
    Raises ``ValueError`` for other content. The message has the version that was found and the ``remedy``.
    """
    content = parse_json(text, what)
    check_kind(content, what)
    got = content.get("version") if isinstance(content, dict) else None
    if got != version or (holds is not None and not isinstance(content.get(what), holds)):
        needs = f"version {version}" if holds is None else f"version {version} and a {what}"
        raise ValueError(f"a {what} file needs {needs}, got version {got!r}: {remedy}")
    return content.get(what)


def encode(mask: Mask) -> Any:
    """Convert a mask to JSON values."""
    if isinstance(mask, And | Or):
        return {mask.name: [encode(child) for child in mask.masks]}
    if isinstance(mask, Not):
        return {"not": encode(mask.mask)}
    arguments = {}
    for field in fields(mask):
        value = getattr(mask, field.name)
        if field.default is MISSING or value != field.default:
            arguments[field.name] = encode_value(value)
    return {mask.name: arguments}


def decode(value: Any) -> Mask:
    """Build a mask from JSON values. Raises ``ValueError`` for anything that ``encode`` does not write."""
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError(f"a mask in JSON must be an object with one key, the pattern, got {value!r}")
    ((name, content),) = value.items()
    if name in ("and", "or", "not"):
        parts = [content] if name == "not" else content
        if not isinstance(parts, list) or not parts:
            raise ValueError(f"{name!r} in JSON needs a list of masks, got {content!r}")
        masks = [decode(part) for part in parts]
        return ~masks[0] if name == "not" else (both if name == "and" else either)(*masks)
    if name not in PATTERNS:
        raise ValueError(f"unknown mask {name!r}: this version supports {', '.join(sorted(PATTERNS))}")
    if not isinstance(content, dict):
        raise ValueError(f"the arguments of {name!r} in JSON must be an object, got {content!r}")
    try:
        return PATTERNS[name](**{field: decode_value(argument) for field, argument in content.items()})
    except (TypeError, RuntimeError) as wrong:  # torch.tensor raises RuntimeError for some invalid values
        raise ValueError(f"cannot build {name!r} from {content!r}: {wrong}") from wrong


def encode_value(value: Any) -> Any:
    """Convert one argument of a mask to JSON values."""
    if isinstance(value, Captured):
        if value.is_symbol:
            return {"symbol": value.name}
        return {"dtype": str(value.tensor.dtype).removeprefix("torch."), "tensor": value.tolist()}
    if isinstance(value, Mask):
        return {"mask": encode(value)}
    if isinstance(value, tuple):
        return [encode(item) if isinstance(item, Mask) else item for item in value]
    return value


def decode_value(value: Any) -> Any:
    """Build one argument of a mask from the JSON values that ``encode_value`` writes."""
    if isinstance(value, dict) and "mask" in value:
        return decode(value["mask"])
    if isinstance(value, dict) and "symbol" in value:
        return Captured.symbol(value["symbol"])
    if isinstance(value, dict) and "tensor" in value:
        dtype = getattr(torch, str(value.get("dtype")), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"unknown tensor dtype {value.get('dtype')!r} in a mask")
        return Captured(torch.tensor(value["tensor"], dtype=dtype))
    if isinstance(value, list):
        return tuple(decode(item) if isinstance(item, dict) else item for item in value)
    return value
