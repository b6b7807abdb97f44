"""What a cache does while a compiled graph runs: the op that marks an update, and where new tokens go.

Transformers traces ``SparseCache.update`` into ``cache_update``, which stands for keys and values that exist nowhere in that
shape. The kv pass replaces it; if that does not happen, running it is an error, before anything was written.
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
    """A cache cannot be used as asked. It holds what it held before."""


class CacheUpdate(NamedTuple, Generic[T]):
    """New keys ``k`` and values ``v`` ``[B, Hkv, Q, D]`` of one layer, and all that the cache has for the layer.

    ``columns`` counts the tokens seen, padding included, int64 ``[]``; ``texts`` without padding, int64 ``[max_batch]``.
    ``page_texts`` ``[max_batch, columns]`` is the text position of each column, -1 for padding. ``rings`` are text
    position and column of each slot, ``[max_batch, slots]``, two for each of ``plan.rings``. ``buffers`` are keys and values of
    each storage, ``[max_batch, heads, slots, D]``. ``stream`` is empty, or for positions in the cache: the rotary position
    of the next token ``[]``, text position less rotary position of the keys ``[max_batch]``, and the frequencies of the layer.
    ``anchor`` ``[]`` is the column from which steps that score pages are counted. ``selection`` is, for each storage that
    selects, its ``SelectionState``: that of its leader, without summaries, if it has one. ``quantized`` are, for each quantized
    storage, the ``QuantizedTensor`` of keys and of values; its buffers are tails.
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
    selection: list[T]
    quantized: list[T]
    plan: LayerPlan

    def buffers_of(self, number: int) -> tuple[T, T]:
        """The buffers of keys and of values of storage ``number``."""
        keys, values = self.buffers[2 * number : 2 * number + 2]
        return keys, values

    def selection_state_of(self, number: int) -> SelectionState[T]:
        """What storage ``number``, which selects, chooses by."""
        rest = list(self.selection)
        for storage in self.plan.storages[:number]:
            rest = rest[_state_count(storage, self.plan.layer) :]
        return SelectionState(*rest[: _state_count(self.plan.storages[number], self.plan.layer)])

    def quantized_of(self, number: int) -> tuple[QuantizedTensor[T], QuantizedTensor[T]]:
        """The quantized keys and values of storage ``number``."""
        keys, values = quantized_of(self.plan, self.quantized, number)
        return keys, values


def _state_count(storage: Storage, layer: int) -> int:
    """How many tensors of ``CacheUpdate.selection`` belong to a storage."""
    if storage.selection is None:
        return 0
    return 1 if storage.selection.by_keys else 4 if storage.leads(layer) else 3


def _refuse(operands: CacheUpdate[Tensor]) -> tuple[Tensor, Tensor]:
    raise SparseCacheError(UNCOMPILED)


def _shapes(operands: CacheUpdate[Tensor]) -> tuple[Tensor, Tensor]:
    k, v, length = operands.k, operands.v, operands.plan.columns
    return k.new_empty(*k.shape[:2], length, k.shape[3]), v.new_empty(*v.shape[:2], length, v.shape[3])


# The keys and values ``[B, Hkv, columns, D]`` that attention would see if they existed.
cache_update = StructuredOp("cache_update", CacheUpdate, _refuse, fake=_shapes)


@torch.library.custom_op("sparse_compile::cache_tokens", mutates_args=())
def cache_tokens(k: Tensor, columns: Tensor, texts: Tensor, mask: str, captures: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Where the new tokens of ``k`` ``[B, Hkv, Q, D]`` stand: column and text position ``[B, Q]``, and the texts' new lengths.

    A token that the model's ``mask`` hides from itself is padding, at text position -1. An empty ``mask`` has no padding.
    """
    args = (*k.shape[::2], columns, texts, from_text(mask) if mask else None, captures)
    return in_few_kernels(_cache_tokens, *args) if k.shape[2] == 1 else _cache_tokens(*args)


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
def _(k: Tensor, columns: Tensor, texts: Tensor, mask: str, captures: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, q_len, _ = k.shape
    return columns.new_empty(batch, q_len), columns.new_empty(batch, q_len), texts.new_empty(batch)


@torch.library.custom_op("sparse_compile::page_positions", mutates_args=())
def page_positions(page_texts: Tensor, column: Tensor, text: Tensor) -> Tensor:
    """``page_texts`` of the rows in use, with the new tokens at their columns: ``[B, columns]``."""
    return page_texts[: column.shape[0]].scatter(1, column, text.to(page_texts.dtype))


@page_positions.register_fake
def _(page_texts: Tensor, column: Tensor, text: Tensor) -> Tensor:
    return page_texts.new_empty(column.shape[0], page_texts.shape[1])
