"""Update the text positions and columns of the slots of a ring as new tokens arrive."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.passes.ops.small_steps import in_few_kernels


@torch.library.custom_op("sparse_compile::ring_step", mutates_args=())
def ring_step(
    ring_texts: Tensor, ring_columns: Tensor, sink: int, column: Tensor, text: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the text position and the column of each slot ``[B, slots]`` after one new token per row.

    Also returns the slot of the token ``[B, 1]``, and whether that slot keeps its contents ``[B, 1]``. It does if the token is
    padding, and if all slots are sink slots and the token is beyond the sink.
    """
    return in_few_kernels(_ring_step, ring_texts, ring_columns, sink, column, text)


def _ring_step(
    ring_texts: Tensor, ring_columns: Tensor, sink: int, column: Tensor, text: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, slots = column.shape[0], ring_texts.shape[1]
    old_texts, old_columns = ring_texts[:batch], ring_columns[:batch]
    slot = torch.where(text < sink, text.clamp(min=0), sink + (text - sink) % max(slots - sink, 1))
    unchanged = text < 0
    if slots == sink:
        unchanged, slot = unchanged | (text >= sink), slot.clamp(max=slots - 1)
    new_text = old_texts.scatter(1, slot, torch.where(unchanged, old_texts.gather(1, slot), text))
    new_column = old_columns.scatter(1, slot, torch.where(unchanged, old_columns.gather(1, slot), column))
    return new_text, new_column, slot, unchanged


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
    """Lay out a ring in text order with a chunk of tokens behind it, ``[B, slots + Q]``, and write the chunk to the ring.

    Returns

    - the order of the slots ``[B, slots]``;
    - the text position and the column of each entry of the layout ``[B, slots + Q]``;
    - the entry from which each slot takes its contents afterwards ``[B, slots]``;
    - the text position and the column of each slot afterwards ``[B, slots]``.
    """
    batch, slots = column.shape[0], ring_texts.shape[1]
    old_texts, old_columns = ring_texts[:batch], ring_columns[:batch]
    order = old_texts.argsort(dim=1, stable=True)
    place = order.argsort(dim=1)
    all_texts = torch.cat([old_texts.gather(1, order), text], dim=1)
    all_columns = torch.cat([old_columns.gather(1, order), column], dim=1)
    slot = torch.arange(slots, device=text.device).expand(batch, slots)
    last = texts.unsqueeze(1) - 1
    # The latest text position that belongs in each slot. If all slots are sink slots, later tokens belong in none.
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
