"""How the keys and values of one layer are kept: which KV heads keep pages of everything, and which a ring."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from sparse_compile.masks import Mask
from sparse_compile.masks.analysis import Past, visible_past
from sparse_compile.masks.selection.page_scoring import summary_width
from sparse_compile.masks.selection.page_topk import PageTopK
from sparse_compile.passes.storage.codec import Format, QuantizedTensor
from sparse_compile.passes.storage.graph_text import rides_in_graphs

T = TypeVar("T")
MODES = ("strict", "chunk_relaxed")


@rides_in_graphs
@dataclass(frozen=True)
class PageSelection:
    """How decode steps choose among pages of ``page_size`` keys.

    The scores are those of layer ``leader``, ``by_keys`` if it reads the keys themselves; ``rows`` are the places of the heads
    among those that it scores together. ``width`` is how many pages a query reads at most, padding aside: the pick is slow over
    wide tables.
    """

    selector: PageTopK
    page_size: int
    leader: int
    rows: tuple[int, ...]
    width: int
    by_keys: bool = False

    @property
    def budget(self) -> int:
        """The pages of a query, those of the static part included."""
        return -(-self.selector.tokens // self.page_size)


@dataclass(frozen=True)
class Storage(ABC):
    """Some KV heads of a layer that are stored in one way: ``slots`` places of a buffer ``[max_batch, heads, slots, D]``.

    Pages and rings answer the same questions, so that nobody needs to tell them apart by type.
    """

    heads: tuple[int, ...]
    slots: int

    @property
    def holds_every_key(self) -> bool:
        """Whether no key is ever overwritten."""
        return self.ring_kind is None

    @property
    def ring_kind(self) -> tuple[int, int] | None:
        """Sink and slots of a ring; rings with equal ones share their positions. None for pages."""
        return None

    @property
    def selection(self) -> PageSelection | None:
        """How decode steps choose among pages; None if they read everything."""
        return None

    @property
    def forms(self) -> tuple[Format, Format] | None:
        """The formats of quantized keys and values; None if they are stored as they come."""
        return None

    @property
    def buffer_slots(self) -> int:
        """The slots of the buffers that hold numbers as they come."""
        return self.slots

    @property
    def columns_are_slots(self) -> bool:
        """Whether column ``n`` of the text stands in slot ``n`` of the buffers."""
        return False

    def leads(self, layer: int) -> bool:
        """Whether this storage of ``layer`` scores the pages it chooses, rather than use the scores of another layer."""
        return self.selection is not None and self.selection.leader == layer

    def quantized_shapes(self, dims: tuple[int, int], dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape, less the batch, and dtype of every tensor of quantized keys and values of size ``dims``."""
        forms = zip(self.forms or (), dims, strict=False)
        return [part for form, dim in forms for part in form.parts(len(self.heads), self.slots, dim, dtype)]

    def needed_recent(self) -> int:
        """How many of the latest tokens queries need from a ring, their own included; 0 for pages."""
        return 0

    def shortage(self, past: Past | None) -> bool:
        """Whether queries that need ``past`` of a text (None: all of it) would miss something here."""
        return False

    def holding(self) -> str:
        """What is held of a text, in words."""
        return "every token"

    @abstractmethod
    def identity(self) -> list[Any]:
        """What decides the meaning of the stored tensors, as JSON values; not how many slots hold them."""

    def __str__(self) -> str:
        written = f"{len(self.heads)} heads x {self.slots} slots"
        return written if self.forms is None else "{} in {}, {}".format(written, *(form.kind or "full" for form in self.forms))


@rides_in_graphs
@dataclass(frozen=True)
class PageStorage(Storage):
    """KV heads that keep every key: column ``n`` of the text in slot ``n``, ``slots`` in all.

    With ``selection`` a decode step reads some of the pages only. With ``forms``, of keys and of values, they are quantized,
    and the buffers are a tail: the latest ``tail`` columns as they came, column ``n`` in slot ``n % tail``.
    """

    selection: PageSelection | None = None
    forms: tuple[Format, Format] | None = None
    tail: int = 0

    @property
    def buffer_slots(self) -> int:
        return self.tail or self.slots

    @property
    def columns_are_slots(self) -> bool:
        return self.forms is None

    def identity(self) -> list[Any]:
        selected = [] if self.selection is None else [self.selection.page_size]
        return [self.heads, "pages", *selected, *map(str, self.forms or ()), self.tail]

    def __str__(self) -> str:
        return super().__str__() if self.selection is None else f"{super().__str__()} ({self.selection.selector})"


@rides_in_graphs
@dataclass(frozen=True)
class RingStorage(Storage):
    """KV heads that keep the first ``sink`` tokens, and the latest ones in the other slots, each overwriting the oldest.

    Token ``t`` beyond the sink stands in slot ``sink + (t - sink) % (slots - sink)``. Padding is not kept. Queries need the
    last ``recent`` tokens, their own included; what is above that can be rolled back.
    """

    sink: int
    recent: int

    @property
    def ring_kind(self) -> tuple[int, int]:
        return self.sink, self.slots

    def needed_recent(self) -> int:
        return self.recent

    def shortage(self, past: Past | None) -> bool:
        return past is None or past.sink > self.sink or past.recent > self.recent

    def holding(self) -> str:
        return f"the first {self.sink} and the last {self.recent} tokens"

    def identity(self) -> list[Any]:
        return [self.heads, [self.sink, self.slots]]

    def __str__(self) -> str:
        return f"{super().__str__()} (sink {self.sink}, recent {self.recent})"


@rides_in_graphs
@dataclass(frozen=True)
class LayerPlan:
    """How layer ``layer`` of a cache is kept, and the masks that this follows from. ``last`` is the last layer of the cache.

    ``columns`` is how many there may be, in whole pages: masks and positions have a place for each.
    ``rings`` are the sink and slots of every kind of ring in the cache, whichever layer it is in: all layers share the
    positions. ``model`` is the mask the model's config announces; ``prefill`` and ``decode`` are the masks of the policy.
    ``rotation`` says how dimensions pair (``halves``, ``neighbours``) if queries stand at their place in the cache. With
    ``debug`` new numbers that are not finite are an error where they are encoded.
    """

    layer: int
    last: bool
    columns: int
    rings: tuple[tuple[int, int], ...]
    storages: tuple[Storage, ...]
    model: Mask
    prefill: Mask | None
    decode: Mask | None
    mode: str = "strict"
    rotation: str = ""
    debug: bool = False

    def policy(self, phase: str) -> Mask | None:
        """The mask of the policy in a phase."""
        return self.decode if phase == "decode" else self.prefill


class SelectionState(NamedTuple, Generic[T]):
    """What page selection reads and writes: tensors, or their nodes. Only a layer that leads has ``summary``.

    ``summary`` ``[max_batch, heads, n, width]`` summarizes pages, and ``scores`` ``[max_batch, heads, pages]`` ranks them.
    ``counts`` ``[max_batch, heads, 1]`` and ``table`` ``[max_batch, heads, 1, width]`` list the pages that were chosen last.
    Selection by the keys themselves has scores alone.
    """

    scores: T
    counts: T | None = None
    table: T | None = None
    summary: T | None = None

    def used(self) -> list[T]:
        """Those that there are."""
        return [part for part in self if part is not None]


def selection_shapes(pages: Storage, selection: PageSelection, key_dim: int) -> SelectionState[tuple[int, ...]]:
    """The shapes of what a layer that leads keeps, less the batch."""
    selector, heads, count = selection.selector, len(pages.heads), pages.slots // selection.page_size
    described = summary_width(selector.score, key_dim)
    if not described:
        return SelectionState((heads, count))
    return SelectionState(
        (heads, count), (heads, 1), (heads, 1, selection.width), (heads, pages.slots // selector.page, described)
    )


def quantized_of(plan: LayerPlan, quantized: Sequence[T], number: int) -> list[QuantizedTensor[T]]:
    """The codes of keys and of values of storage ``number`` among those of all storages; none if it keeps plain numbers."""
    rest = list(quantized)
    found: list[QuantizedTensor[T]] = []
    for storage in plan.storages[: number + 1]:
        found = []
        for form in storage.forms or ():
            found.append(QuantizedTensor(*rest[: form.count]))
            rest = rest[form.count :]
    return found


def misfit(k: Tensor, v: Tensor, buffers: Sequence[Tensor], plan: LayerPlan) -> str:
    """Why new keys and values ``[B, Hkv, Q, D]`` cannot go into ``buffers``; empty if they can."""
    batch, heads, _, dim = k.shape
    kept = buffers[0]
    built = sum(len(storage.heads) for storage in plan.storages), kept.shape[3], buffers[1].shape[3]
    if (heads, dim, v.shape[3]) != built:
        return (
            f"layer {plan.layer} of the cache was built for {built[0]} KV heads of {built[1]} (values {built[2]}), got {heads} "
            f"of {dim} ({v.shape[3]}): build it from the config of this model"
        )
    if {k.dtype, v.dtype} != {kept.dtype}:
        return f"the cache was built with dtype={kept.dtype}, got keys of {k.dtype}: build it with that dtype"
    if k.device.type != kept.device.type or (k.device.index or 0) != (kept.device.index or 0):
        return f"the cache was built with device={kept.device}, got keys on {k.device}: build it on that device"
    if batch > kept.shape[0]:
        return f"the cache was built with max_batch={kept.shape[0]}, got {batch} sequences: build it with a larger max_batch"
    return ""


def needed_past(mask: Mask, mode: str, length: int) -> Past | None:
    """What queries under ``mask`` need of the past; a relaxed chunk sees one token more, what the query before it saw."""
    past = visible_past(mask, length)
    if past is None or mode == "strict":
        return past
    return Past(past.sink, past.recent + 1) if past.sink + past.recent + 1 < length else None
