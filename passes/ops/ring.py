"""Text positions and columns of the slots of a ring, before and after new tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.passes.ops.small_steps import in_few_kernels


@torch.library.custom_op("sparse_compile::ring_step", mutates_args=())
def ring_step(
    ring_texts: Tensor, ring_columns: Tensor, sink: int, column: Tensor, text: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A ring after one token per row: text position and column of each slot ``[B, slots]``.

    Also the slot of the token, ``[B, 1]``, and whether that slot keeps what it has, as it does if the token is padding.
    """
    return in_few_kernels(_ring_step, ring_texts, ring_columns, sink, column, text)


def _ring_step(
    ring_texts: Tensor, ring_columns: Tensor, sink: int, column: Tensor, text: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, slots = column.shape[0], ring_texts.shape[1]
    known, at = ring_texts[:batch], ring_columns[:batch]
    slot = torch.where(text < sink, text.clamp(min=0), sink + (text - sink) % max(slots - sink, 1))
    kept = text < 0
    if slots == sink:
        kept, slot = kept | (text >= sink), slot.clamp(max=slots - 1)
    new_text = known.scatter(1, slot, torch.where(kept, known.gather(1, slot), text))
    new_column = at.scatter(1, slot, torch.where(kept, at.gather(1, slot), column))
    return new_text, new_column, slot, kept


@ring_step.register_fake
def _(
    ring_texts: Tensor, ring_columns: Tensor, sink: int, column: Tensor, text: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = (column.shape[0], ring_texts.shape[1])
    new = ring_texts.new_empty(shape), ring_columns.new_empty(shape)
    return *new, text.new_empty(text.shape), text.new_empty(text.shape, dtype=torch.bool)


@torch.library.custom_op("sparse_compile::ring_chunk", mutates_args=())
def ring_chunk(
    ring_texts: Tensor, ring_columns: Tensor, sink: int, column: Tensor, text: Tensor, texts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A ring and a chunk of tokens behind it, ``[ring in the order of its text | chunk]``: ``[B, slots + Q]`` in all.

    Returns the order of the slots ``[B, slots]``, text position and column of each place, the place that each slot takes
    its content from afterwards, and text position and column of the slots then.
    """
    batch, slots = column.shape[0], ring_texts.shape[1]
    known, at = ring_texts[:batch], ring_columns[:batch]
    order = known.argsort(dim=1, stable=True)
    place = order.argsort(dim=1)
    all_texts = torch.cat([known.gather(1, order), text], dim=1)
    all_columns = torch.cat([at.gather(1, order), column], dim=1)
    slot = torch.arange(slots, device=text.device).expand(batch, slots)
    last = texts.unsqueeze(1) - 1
    # The latest text position that belongs in each slot. Nothing does beyond the sink of a ring without any other slots.
    latest = last - (last - slot) % max(slots - sink, 1)
    wanted = torch.where(slot < sink, slot, latest)
    ahead = torch.where(text >= 0, 1, 0).cumsum(dim=1)
    before = texts.unsqueeze(1) - ahead[:, -1:]
    new = (wanted >= before) & (wanted <= last) & ((slot < sink) | (wanted >= sink))
    within = torch.searchsorted(ahead, (wanted - before + 1).contiguous()).clamp(max=text.shape[1] - 1)
    source = torch.where(new, slots + within, place)
    return order, all_texts, all_columns, source, all_texts.gather(1, source), all_columns.gather(1, source)


@ring_chunk.register_fake
def _(
    ring_texts: Tensor, ring_columns: Tensor, sink: int, column: Tensor, text: Tensor, texts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, slots = column.shape[0], ring_texts.shape[1]
    places = slots + column.shape[1]
    sizes = (slots, places, places, slots, slots, slots)
    order, texts_, columns_, source, new_text, new_column = (column.new_empty(batch, size) for size in sizes)
    return order, texts_, columns_, source, new_text, new_column
