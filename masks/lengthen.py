"""Lengthen the tensors of a mask, so that it can be asked about positions that no text reaches."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch.nn.functional import pad

from sparse_compile.masks.captured import Captured
from sparse_compile.masks.mask import Mask
from sparse_compile.masks.patterns.documents import Document, Documents
from sparse_compile.masks.patterns.moved import Shifted
from sparse_compile.masks.patterns.repeating import Within
from sparse_compile.masks.patterns.tensor import Explicit, Padding


def lengthened(mask: Mask, length: int) -> Mask:
    """Return a mask with tensors for ``length`` positions that shows the same pairs of the positions it covers now.

    A cache has whole pages, so kernels ask for keys behind the last token. Whatever the mask says there, ``causal`` hides them.

        >>> lengthened(document([[0, 0, 1]]), 5)
        document([[0, 0, 1, 1, 1]])
    """
    if isinstance(mask, Document):
        return replace(mask, ids=_repeat_last(Captured.of(mask.ids), length))
    if isinstance(mask, Documents):
        return replace(
            mask, **{field: _repeat_last(Captured.of(getattr(mask, field)), length) for field in ("q_ids", "kv_ids")}
        )
    if isinstance(mask, Padding):
        return replace(mask, valid=_repeat_last(Captured.of(mask.valid), length))
    if isinstance(mask, Explicit):
        return _lengthened_pairs(mask, length)
    if isinstance(mask, Within) and isinstance(mask.parts, Captured):
        mask = replace(mask, parts=_repeat_last(mask.parts, length))
    if isinstance(mask, Shifted):
        length -= min(mask.q, mask.kv, 0)
    children = mask.children()
    return mask.rebuild([lengthened(child, length) for child in children]) if children else mask


def _repeat_last(captured: Captured, length: int) -> Captured:
    if captured.is_symbol or not 0 < captured.tensor.shape[1] < length:
        return captured
    tensor = captured.tensor
    last = tensor[:, -1:].expand(-1, length - tensor.shape[1])
    return Captured(torch.cat([tensor, last], dim=1))


def _lengthened_pairs(mask: Explicit, length: int) -> Mask:
    captured = Captured.of(mask.visible)
    if captured.is_symbol:
        return mask
    visible, more = captured.tensor, []
    for axis, start in ((3, mask.kv_start), (2, mask.q_start)):  # ``pad`` takes the last axis first
        missing = length - start - visible.shape[axis] if isinstance(start, int) and visible.shape[axis] != 1 else 0
        more += [0, max(0, missing)]
    return replace(mask, visible=Captured(pad(visible, more))) if any(more) else mask
