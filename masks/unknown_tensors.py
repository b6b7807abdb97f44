"""What is left of a mask when some of the tensors it reads are not known: everything it may still show."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

from sparse_compile.masks.captured import Captured
from sparse_compile.masks.mask import Mask
from sparse_compile.masks.operators import Not, full


def without_symbols(mask: Mask, *, visible: bool = True) -> Mask:
    """The mask with every part that reads a tensor of the running graph taken as visible (under ``~``: as hidden)."""
    return _without(mask, lambda captured: captured.is_symbol, visible)


def without_tensors(mask: Mask, *, visible: bool = True) -> Mask:
    """The mask with every part that reads any tensor taken as visible, or with ``visible=False`` as hidden."""
    return _without(mask, lambda captured: True, visible)


def _without(mask: Mask, unknown: Callable[[Captured], bool], visible: bool) -> Mask:
    own = [value for field in fields(mask) if isinstance(value := getattr(mask, field.name), Captured)]
    if any(unknown(captured) for captured in own):
        return full if visible else ~full
    if isinstance(mask, Not):
        return ~_without(mask.mask, unknown, not visible)
    children = mask.children()
    return mask.rebuild([_without(child, unknown, visible) for child in children]) if children else mask
