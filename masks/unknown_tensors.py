"""Replace the parts of a mask that read unknown tensors, so that the rest can be analyzed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

from sparse_compile.masks.captured import Captured
from sparse_compile.masks.mask import Mask
from sparse_compile.masks.operators import Not, full


def without_symbols(mask: Mask, *, visible: bool = True) -> Mask:
    """Replace every part that reads a symbol (a tensor of the running graph) by ``full``, or by ``~full`` under a ``~``.

    The result shows at least what the mask shows. With ``visible=False`` it is the other way round: the result shows at most
    what the mask shows.
    """
    return _without(mask, lambda captured: captured.is_symbol, visible)


def without_tensors(mask: Mask, *, visible: bool = True) -> Mask:
    """Do the same as ``without_symbols`` for every part that reads a tensor, even if the tensor is there."""
    return _without(mask, lambda captured: True, visible)


def _without(mask: Mask, unknown: Callable[[Captured], bool], visible: bool) -> Mask:
    own = [value for field in fields(mask) if isinstance(value := getattr(mask, field.name), Captured)]
    if any(unknown(captured) for captured in own):
        return full if visible else ~full
    if isinstance(mask, Not):
        return ~_without(mask.mask, unknown, not visible)
    children = mask.children()
    return mask.rebuild([_without(child, unknown, visible) for child in children]) if children else mask
