"""Attention of a decode step to what a cache holds, by the kernel that reads it in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("sparse_compile::attend_kept", mutates_args=())
def attend_kept(
    q: Tensor,
    key_data: Tensor | None,
    key_scale: Tensor | None,
    key_offset: Tensor | None,
    value_data: Tensor | None,
    value_scale: Tensor | None,
    value_offset: Tensor | None,
    counts: Tensor | None,
    table: Tensor | None,
    columns: Tensor | None,
    page_size: int,
    usual: int,
    kinds: str,
    ring_keys: Tensor | None,
    ring_values: Tensor | None,
    ring_texts: Tensor | None,
    text: Tensor | None,
    sunk: int,
    recent: int,
    ring_heads: list[int],
    scale: float,
) -> Tensor:
    """Attention of one query of each sequence, ``[B, Hq, 1, Dv]``; on CUDA only.

    Most KV heads have pages: the ``Codes`` of keys and of values, of ``kinds`` with a slash between them; those listed are
    read, or all up to column ``columns``, and ``usual`` is how many that usually are. ``ring_heads`` have a ring: keys and
    values ``[B', H, slots, D]``, of which the first ``sunk`` tokens are seen and the last ``recent``, by the text positions
    ``ring_texts`` ``[B, slots]`` of the slots and ``text`` ``[B, 1]`` of the query.

    FlexAttention's decode kernel does the same of plain pages under any mask and score mod, and takes half as long again: its
    splits are merged by two more kernels, which cannot start early.
    """
    from sparse_compile.passes.kernels import paged_decode as kernel

    keys = values = ring = None
    if key_data is not None and value_data is not None:
        key_kind, value_kind = kinds.split("/")
        keys = kernel.Kept(key_data, key_scale, key_offset, key_kind)
        values = kernel.Kept(value_data, value_scale, value_offset, value_kind)
    if ring_keys is not None and ring_values is not None and ring_texts is not None and text is not None:
        ring = kernel.Ring(ring_keys, ring_values, ring_texts, text, sunk, recent)
    rings = sum(1 << head for head in ring_heads)
    sizes: dict[str, Any] = {"rings": rings, "page_size": page_size, "scale": scale, "usual": usual}
    out: Tensor = kernel.attend_kept(q, keys, values, counts, table, columns, None, ring, **sizes)
    return out


@attend_kept.register_fake
def _(q: Tensor, *operands: Any) -> Tensor:
    value_data, ring_values, kinds = operands[3], operands[13], operands[11]
    dim = ring_values.shape[3] if ring_values is not None else value_data.shape[3] * (2 if kinds.endswith("int4") else 1)
    return q.new_empty(*q.shape[:3], dim)
