"""Remove the last tokens of a cache, if its rings still hold what is then visible again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_compile.cache.transfer import Filled
from sparse_compile.passes.ops.cache.cache_update import SparseCacheError


def remove_last(cache: Filled, remove: int) -> None:
    """Remove the last ``remove`` tokens, which are fewer than the cache holds.

    Raises ``SparseCacheError`` if a ring has already overwritten tokens that would be visible again.
    """
    at, rows = cache.positions, cache.host_state.batch or 0
    first = cache.host_state.columns - remove  # the first column that is removed
    texts = _texts_without(cache, first, rows)
    _check_rings(cache, texts, rows, remove)
    for layer in cache.cached_layers:
        layer.restore_tails(remove)
    for ring_texts, columns in zip(at.rings[::2], at.rings[1::2], strict=True):
        gone = ring_texts >= pad(texts, (0, cache.host_state.max_batch - rows)).unsqueeze(1)
        ring_texts.masked_fill_(gone, -1)
        columns.masked_fill_(gone, -1)
    if at.page_texts is not None:
        at.page_texts[:, first:] = -1
    at.padding.crop(first)
    at.texts[:rows] = texts
    at.columns.sub_(remove)
    for rope in at.stream[:1]:
        rope.sub_(remove)
    at.choose_anew()
    cache.host_state.columns = first


def _check_rings(cache: Filled, texts: Tensor, rows: int, remove: int) -> None:
    """Raise ``SparseCacheError`` if a ring lacks tokens that are visible when the texts have the lengths ``texts``."""
    recents: dict[tuple[int, int], int] = {}
    for storage in (storage for layer in cache.cached_layers for storage in layer.plan.storages):
        if (kind := storage.ring_kind) is not None:
            recents[kind] = max(recents.get(kind, 0), storage.needed_recent())
    for number, (sink, slots) in enumerate(cache.cached_layers[0].plan.rings):
        stored = cache.positions.rings[2 * number][:rows]
        start = (texts - (recents[sink, slots] - 1)).clamp(min=sink).unsqueeze(1)
        present = ((stored >= start) & (stored < texts.unsqueeze(1))).sum(dim=1)
        missing = int(((texts - start.squeeze(1)).clamp(min=0) - present).max())
        if missing > 0:
            room = slots - sink - recents[sink, slots] + missing
            raise SparseCacheError(
                f"{remove} tokens cannot be removed: a ring of {slots} slots has overwritten tokens that would be visible "
                f"again. Build the cache with rollback={room} or more, or reset() it and run the text again. The cache is "
                "unchanged"
            )


def _texts_without(cache: Filled, first: int, rows: int) -> Tensor:
    """The text lengths ``[rows]`` after the columns from ``first`` on are removed."""
    at = cache.positions
    if at.page_texts is not None:
        return (at.page_texts[:rows, :first] >= 0).sum(dim=1)
    gone = [(table[:rows] >= first).sum(dim=1) for table in at.rings[1::2]]
    smallest = min(table.shape[1] for table in at.rings)
    remove = cache.host_state.columns - first
    if remove > smallest:
        raise SparseCacheError(
            f"{remove} tokens cannot be removed from rings of {smallest} slots: build the cache with rollback={remove} or "
            "more, or reset() it and run the text again. The cache is unchanged"
        )
    return at.texts[:rows] - torch.stack(gone).amax(dim=0)
