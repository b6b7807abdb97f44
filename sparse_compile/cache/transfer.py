"""Copy what one cache holds into another one, in which the same heads may be stored in another way.

Whether a head has pages or a ring depends on ``max_length``, because a ring is never longer than the text. So a longer cache
of the same policy may hold a head in a ring whose tokens a shorter cache holds in pages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from sparse_compile.cache.device_positions import DevicePositions
from sparse_compile.cache.host_state import HostState
from sparse_compile.cache.layer import SparseCacheLayer
from sparse_compile.passes.storage.codec import QuantizedTensor, dequantize
from sparse_compile.passes.storage.layer_plan import Storage, quantized_of


class Filled(Protocol):
    """The members of ``SparseCache`` that this module uses. A protocol avoids an import cycle with ``SparseCache``."""

    cached_layers: tuple[SparseCacheLayer, ...]
    positions: DevicePositions
    host_state: HostState

    def reset(self) -> None: ...


def transfer(source: Filled, target: Filled) -> str:
    """Copy the contents of ``source``, head by head. Returns a head that lacks tokens in ``source``; empty if there is none.

    The target stays as it is if anything is missing. Both have the same model, masks and formats.
    """
    rows, columns = source.host_state.batch or 0, source.host_state.columns
    if not columns:
        target.reset()
        return ""
    texts = _text_of_columns(source, rows, columns)
    lengths = source.positions.texts[:rows]
    rings = [_ring(texts, lengths, sink, slots) for sink, slots in target.cached_layers[0].plan.rings]
    missing = _missing(source, target, texts, rings)
    if missing:
        return missing
    target.reset()
    at = target.positions
    at.texts[:rows] = lengths
    if at.page_texts is not None:
        at.page_texts[:rows, :columns] = texts.to(at.page_texts.dtype)
    for table, made in zip(at.rings, (table for tables in rings for table in tables), strict=True):
        table[:rows] = made
    for old, new in zip(source.cached_layers, target.cached_layers, strict=True):
        _copy_layer(source, old, new, rows, columns, rings)
    if (valid := source.positions.padding.valid) is not None:
        at.padding.restore(valid[:, :columns])
    at.columns.fill_(columns)
    at.choose_anew()
    target.host_state.columns, target.host_state.batch = columns, rows or None
    return ""


def _text_of_columns(cache: Filled, rows: int, columns: int) -> Tensor:
    """The text position ``[rows, columns]`` of every column that the cache still holds; -1 for the others and for padding."""
    at = cache.positions
    if at.page_texts is not None:
        return at.page_texts[:rows, :columns].long()
    texts = at.columns.new_full((rows, columns + 1), -1)  # the last place takes the slots that hold nothing
    for ring_texts, held in zip(at.rings[::2], at.rings[1::2], strict=True):
        places = torch.where(held[:rows] >= 0, held[:rows], columns)
        texts.scatter_(1, places, ring_texts[:rows])
    return texts[:, :columns]


def _ring(texts: Tensor, lengths: Tensor, sink: int, slots: int) -> tuple[Tensor, Tensor]:
    """The text position and the column of each slot ``[rows, slots]`` of a ring; -1 where a slot is empty."""
    rows, columns = texts.shape
    column_of_text = texts.new_full((rows, columns + 1), -1)
    every = torch.arange(columns, device=texts.device).expand(rows, -1)
    column_of_text.scatter_(1, torch.where(texts >= 0, texts, columns), every)
    column_of_text[:, columns] = -1
    held = _held(lengths, sink, slots)
    column = column_of_text.gather(1, torch.where(held >= 0, held, columns))
    return torch.where(column >= 0, held, -1), column


def _held(lengths: Tensor, sink: int, slots: int) -> Tensor:
    """The text position ``[rows, slots]`` that each slot of a ring holds after texts of these lengths; -1 if none."""
    slot, size = torch.arange(slots, device=lengths.device), max(slots - sink, 1)
    rounds = (lengths.unsqueeze(1) - 1 - slot).div(size, rounding_mode="floor")  # how often a slot was used again
    return torch.where(slot < lengths.unsqueeze(1), torch.where(slot < sink, slot, slot + rounds * size), -1)


def _missing(source: Filled, target: Filled, texts: Tensor, rings: list[tuple[Tensor, Tensor]]) -> str:
    """The first head whose storage in ``target`` needs more than ``source`` has."""
    rows, lengths = len(texts), source.positions.texts[: len(texts)]
    valid = source.positions.padding.valid
    for old, new in zip(source.cached_layers, target.cached_layers, strict=True):
        kinds = new.plan.rings
        for storage, number, kept in _heads(old, new):
            if storage.ring_kind is None:
                column = torch.arange(texts.shape[1], device=texts.device).expand(rows, -1)
                needed = torch.ones_like(texts, dtype=torch.bool) if valid is None else valid[:rows, : texts.shape[1]]
            else:
                column, text = rings[kinds.index(storage.ring_kind)][1], _held(lengths, *storage.ring_kind)
                is_recent = text >= lengths.unsqueeze(1) - storage.needed_recent()
                needed = (text >= 0) & (is_recent | (text < storage.ring_kind[0]))
            has_format = storage.forms is None or storage.forms == kept.forms
            if not has_format or bool((needed & (_slots_of(source, old, kept, column) < 0)).any()):
                return f"layer {new.plan.layer}, KV head {number}"
    return ""


def _heads(old: SparseCacheLayer, new: SparseCacheLayer) -> Iterator[tuple[Storage, int, Storage]]:
    """Every KV head of a layer: its new storage, its number, and its old storage."""
    for storage in new.plan.storages:
        for head in storage.heads:
            yield storage, head, next(kept for kept in old.plan.storages if head in kept.heads)


def _slots_of(cache: Filled, layer: SparseCacheLayer, storage: Storage, columns: Tensor) -> Tensor:
    """The slots of a storage that hold the ``columns`` ``[rows, n]``; -1 for those that it does not hold."""
    if storage.ring_kind is None:
        return columns
    held = cache.positions.rings[2 * layer.plan.rings.index(storage.ring_kind) + 1][: len(columns)]
    same = (held.unsqueeze(1) == columns.unsqueeze(2)) & (columns.unsqueeze(2) >= 0)  # [rows, n, slots]
    return torch.where(same.any(dim=2), same.int().argmax(dim=2), -1)


def _copy_layer(
    source: Filled, old: SparseCacheLayer, new: SparseCacheLayer, rows: int, columns: int, rings: list[tuple[Tensor, Tensor]]
) -> None:
    every = torch.arange(columns, device=new.device).expand(rows, -1)
    for number, storage in enumerate(new.plan.storages):
        targets = new.buffers[2 * number : 2 * number + 2]
        for place, head in enumerate(storage.heads):
            at = next(at for at, kept in enumerate(old.plan.storages) if head in kept.heads)
            kept = old.plan.storages[at]
            theirs = kept.heads.index(head)
            if storage.forms is not None:  # the same pages and tails in both
                pairs = [*zip(targets, old.buffers[2 * at : 2 * at + 2], strict=True), *_quantized(old, at, new, number)]
                for to, part in pairs:
                    size = min(to.shape[2], part.shape[2])
                    to[:rows, place, :size] = part[:rows, theirs, :size]
                continue
            wanted = every if storage.ring_kind is None else rings[new.plan.rings.index(storage.ring_kind)][1]
            slots = _slots_of(source, old, kept, wanted)  # [rows, n]
            for to, part in zip(targets, _dense(old, at, theirs, rows, columns), strict=True):
                index = slots.clamp(min=0).unsqueeze(2).expand(-1, -1, part.shape[2])
                found = part.gather(1, index) * (slots >= 0).unsqueeze(2)
                to[:rows, place, : found.shape[1]] = found
    for (to, page), (part, _) in zip(new.summaries(), old.summaries(), strict=True):
        used = -(-columns // page)
        to[:rows, :, :used] = part[:rows, :, :used]


def _quantized(old: SparseCacheLayer, at: int, new: SparseCacheLayer, number: int) -> Iterator[tuple[Tensor, Tensor]]:
    ours, theirs = quantized_of(new.plan, new.quantized, number), quantized_of(old.plan, old.quantized, at)
    for mine, other in zip(ours, theirs, strict=True):
        yield from zip(mine.used(), other.used(), strict=True)


def _dense(layer: SparseCacheLayer, number: int, place: int, rows: int, columns: int) -> list[Tensor]:
    """Keys and values ``[rows, slots, D]`` of one head. Quantized pages are dequantized, but for what their tails hold."""
    storage, tensors = layer.plan.storages[number], []
    buffers = layer.buffers[2 * number : 2 * number + 2]
    sides: Sequence[QuantizedTensor[Tensor] | None] = quantized_of(layer.plan, layer.quantized, number) or (None, None)
    for buffer, quantized, form in zip(buffers, sides, storage.forms or (None, None), strict=True):
        one = buffer[:rows, place]
        if quantized is not None and form is not None:
            parts = [part[:rows, place : place + 1] for part in quantized.used()]
            whole = dequantize(QuantizedTensor(*parts), form, buffer.dtype)[:, 0].clone()
            latest = torch.arange(max(0, columns - storage.buffer_slots), columns, device=buffer.device)
            whole[:, latest] = one[:, latest % storage.buffer_slots]
            one = whole
        tensors.append(one)
    return tensors
