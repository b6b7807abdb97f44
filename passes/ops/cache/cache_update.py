"""Ops of a cache in a compiled graph: one marks a cache update, and the others compute the positions of new tokens.

Transformers traces ``SparseCache.update`` into ``cache_update``. Its outputs stand for keys and values that are never
materialized in that shape. The ``kv`` passes replace the op. If they do not, running it raises an error before anything is
written.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from sparse_compile.masks import Mask
from sparse_compile.passes.ops.block_tables import bind, tensor_names
from sparse_compile.passes.ops.small_steps import in_few_kernels
from sparse_compile.passes.ops.structured import StructuredOp
from sparse_compile.passes.storage.codec import QuantizedTensor
from sparse_compile.passes.storage.graph_text import from_text
from sparse_compile.passes.storage.layer_plan import LayerPlan, SelectionState, Storage, quantized_of

T = TypeVar("T")

UNCOMPILED = (
    "a SparseCache is read by compiled attention only, and this model runs without the sparse_compile backend: compile it with "
    "sparse_compile.compile(model, policy), or use a DynamicCache. Nothing was written to the cache"
)


class SparseCacheError(RuntimeError):
    """A cache cannot be used in this way. Its contents are unchanged."""


class CacheUpdate(NamedTuple, Generic[T]):
    """New keys ``k`` and values ``v`` ``[B, Hkv, Q, D]`` of one layer, and the tensors that the cache has for the layer.

    - ``columns``: the number of tokens so far, including padding, int64 ``[]``.
    - ``texts``: the number of tokens so far without padding, int64 ``[max_batch]``.
    - ``page_texts``: the text position of each column, ``[max_batch, columns]``, -1 for padding.
    - ``rings``: two tensors ``[max_batch, slots]`` for each of ``plan.rings``: the text position and the column of each slot.
    - ``buffers``: keys and values of each storage group, ``[max_batch, heads, slots, D]``. They are tails if it is quantized.
    - ``stream``: empty unless tokens are rotated by their position in the cache. Then it holds the rotary position of the next
      token ``[]``, the text position minus the rotary position of the keys ``[max_batch]``, and the layer's frequencies.
    - ``anchor``: the column ``[]`` from which the steps that score pages are counted.
    - ``valid``: False where a column is padding, ``[B, columns]``; None while nothing is padding.
    - ``is_left``: whether all padding comes before all tokens.
    - ``selection``: the ``SelectionState`` tensors of each storage group that selects pages. If another layer scores the pages,
      they are that layer's tensors without the summary.
    - ``quantized``: the ``QuantizedTensor`` of keys and that of values, for each quantized storage group.
    """

    k: T
    v: T
    columns: T
    texts: T
    page_texts: T | None
    rings: list[T]
    buffers: list[T]
    stream: list[T]
    anchor: T | None
    valid: T | None
    is_left: bool
    selection: list[T]
    quantized: list[T]
    plan: LayerPlan

    def buffers_of(self, number: int) -> tuple[T, T]:
        """Return the buffers of keys and of values of storage group ``number``."""
        keys, values = self.buffers[2 * number : 2 * number + 2]
        return keys, values

    def selection_state_of(self, number: int) -> SelectionState[T]:
        """Return the selection state of storage group ``number``, which must select pages."""
        rest = list(self.selection)
        for storage in self.plan.storages[:number]:
            rest = rest[_state_count(storage, self.plan.layer) :]
        return SelectionState(*rest[: _state_count(self.plan.storages[number], self.plan.layer)])

    def quantized_of(self, number: int) -> tuple[QuantizedTensor[T], QuantizedTensor[T]]:
        """Return the quantized keys and values of storage group ``number``."""
        keys, values = quantized_of(self.plan, self.quantized, number)
        return keys, values


def _state_count(storage: Storage, layer: int) -> int:
    """Return how many tensors of ``CacheUpdate.selection`` belong to a storage group."""
    if storage.selection is None:
        return 0
    return 1 if storage.selection.by_keys else 4 if storage.leads(layer) else 3


def _refuse(operands: CacheUpdate[Tensor]) -> tuple[Tensor, Tensor]:
    raise SparseCacheError(UNCOMPILED)


def _shapes(operands: CacheUpdate[Tensor]) -> tuple[Tensor, Tensor]:
    k, v, length = operands.k, operands.v, operands.plan.columns
    return k.new_empty(*k.shape[:2], length, k.shape[3]), v.new_empty(*v.shape[:2], length, v.shape[3])


# Returns the keys and values ``[B, Hkv, columns, D]`` that attention would see if they were materialized.
cache_update = StructuredOp("cache_update", CacheUpdate, _refuse, fake=_shapes)


@torch.library.custom_op("sparse_compile::cache_tokens", mutates_args=())
def cache_tokens(
    batch: int, q_len: int, columns: Tensor, texts: Tensor, mask: str, captures: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return column and text position ``[B, Q]`` of ``q_len`` new tokens in ``batch`` rows, and the new text lengths ``[B]``.

    A token that the model's ``mask`` hides from itself is padding and has text position -1. With an empty ``mask``, there is no
    padding. The sizes are numbers and not those of a tensor of new keys, so that the positions depend on no layer.
    """
    args = (batch, q_len, columns, texts, from_text(mask) if mask else None, captures)
    return in_few_kernels(_cache_tokens, *args) if q_len == 1 else _cache_tokens(*args)


def _cache_tokens(
    batch: int, q_len: int, columns: Tensor, texts: Tensor, tree: Mask | None, captures: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    column = (torch.arange(q_len, device=columns.device) + columns).expand(batch, q_len)
    before = texts[:batch]
    if tree is None:
        text = torch.arange(q_len, device=columns.device) + before.unsqueeze(1)
        return column.clone(), text, before + q_len
    first = columns.view(1)
    row = torch.arange(batch, device=columns.device).unsqueeze(1)
    valid = bind(tree, tensor_names(tree), captures, first, torch.zeros_like(first))(row, row * 0, column, column)
    count = valid.expand(batch, q_len).cumsum(dim=1)
    return column.clone(), torch.where(valid, before.unsqueeze(1) + count - 1, -1), before + count[:, -1]


@cache_tokens.register_fake
def _(
    batch: int, q_len: int, columns: Tensor, texts: Tensor, mask: str, captures: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    return columns.new_empty(batch, q_len), columns.new_empty(batch, q_len), texts.new_empty(batch)


@torch.library.custom_op("sparse_compile::page_positions", mutates_args=())
def page_positions(page_texts: Tensor, column: Tensor, text: Tensor) -> Tensor:
    """Return ``page_texts`` ``[B, columns]`` of the rows in use, with the text positions of new tokens at their columns."""
    return page_texts[: column.shape[0]].scatter(1, column, text.to(page_texts.dtype))


@page_positions.register_fake
def _(page_texts: Tensor, column: Tensor, text: Tensor) -> Tensor:
    return page_texts.new_empty(column.shape[0], page_texts.shape[1])
