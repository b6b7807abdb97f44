"""Plan how a cache stores the keys and values of one layer: which KV heads have pages of every key, and which have a ring."""

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
from sparse_compile.passes.torch_private import example_size

T = TypeVar("T")
MODES = ("strict", "chunk_relaxed")


@rides_in_graphs
@dataclass(frozen=True)
class PageSelection:
    """How decode steps select pages of ``page_size`` keys.

    The scores come from layer ``leader``. With ``by_keys`` that layer scores the keys themselves and not page summaries.
    ``rows`` are the indices of these heads among the heads that the leader scores together. ``width`` is the largest number of
    pages a query reads when there is no padding; it is small because selection is slow over wide tables.
    """

    selector: PageTopK
    page_size: int
    leader: int
    rows: tuple[int, ...]
    width: int
    by_keys: bool = False

    @property
    def budget(self) -> int:
        """The number of pages that a query reads, including those of the static part of the mask."""
        return -(-self.selector.tokens // self.page_size)


@dataclass(frozen=True)
class Storage(ABC):
    """A storage group: KV heads of a layer that are stored in the same way, in buffers ``[max_batch, heads, slots, D]``.

    Pages and rings have the same interface, so callers do not check the type.
    """

    heads: tuple[int, ...]
    slots: int

    @property
    def holds_every_key(self) -> bool:
        """Whether every key stays in the buffers: none is ever overwritten."""
        return self.ring_kind is None

    @property
    def ring_kind(self) -> tuple[int, int] | None:
        """The sink and slots of a ring, or None for pages. Rings with equal values share their positions."""
        return None

    @property
    def selection(self) -> PageSelection | None:
        """How decode steps select pages, or None if they read all keys."""
        return None

    @property
    def forms(self) -> tuple[Format, Format] | None:
        """The formats of quantized keys and values, or None if they are not quantized."""
        return None

    @property
    def buffer_slots(self) -> int:
        """The number of slots of the unquantized buffers."""
        return self.slots

    @property
    def columns_are_slots(self) -> bool:
        """Whether slot ``n`` of the unquantized buffers holds column ``n`` of the text."""
        return False

    def leads(self, layer: int) -> bool:
        """Whether ``layer``, which has this storage, scores its pages itself instead of using the scores of another layer."""
        return self.selection is not None and self.selection.leader == layer

    def quantized_shapes(self, dims: tuple[int, int], dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape without the batch axis, and dtype, of every tensor of quantized keys and values with ``dims`` channels."""
        forms = zip(self.forms or (), dims, strict=False)
        return [part for form, dim in forms for part in form.parts(len(self.heads), self.slots, dim, dtype)]

    def needed_recent(self) -> int:
        """The number of latest tokens that queries need from a ring, including their own token. 0 for pages."""
        return 0

    def shortage(self, past: Past | None) -> bool:
        """Whether a key that queries need is not stored. ``past`` says what they need; None means every key."""
        return False

    def holding(self) -> str:
        """Describe in words which tokens of a text are stored."""
        return "every token"

    @abstractmethod
    def identity(self) -> list[Any]:
        """The JSON values that decide how to read the stored tensors. The number of slots of pages is not among them."""

    def __str__(self) -> str:
        written = f"{len(self.heads)} heads x {self.slots} slots"
        return written if self.forms is None else "{} in {}, {}".format(written, *(form.kind or "full" for form in self.forms))


@rides_in_graphs
@dataclass(frozen=True)
class PageStorage(Storage):
    """KV heads that store every key. Slot ``n`` of ``slots`` holds column ``n`` of the text.

    With ``selection``, a decode step reads only some of the pages. With ``forms``, one for keys and one for values, the pages
    are quantized, and the unquantized buffers are a tail: they hold the latest ``tail`` columns, column ``n`` in slot
    ``n % tail``.
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
    """KV heads that store the first ``sink`` tokens and, in the other slots, the latest tokens.

    A new token overwrites the oldest token that is not in the sink. Token ``t`` beyond the sink is in slot
    ``sink + (t - sink) % (slots - sink)``. Padding is not stored. Queries need the last ``recent`` tokens, including their own.
    The slots beyond ``sink + recent`` allow that many tokens to be rolled back.
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
    """How a cache stores layer ``layer``, and the masks from which this follows.

    - ``last``: whether this is the last layer of the cache.
    - ``columns``: the largest number of columns, in whole pages. Masks and positions have one entry for each.
    - ``rings``: the sink and slots of every kind of ring in any layer of the cache. All layers share the positions of a kind.
    - ``model``: the mask that the model's config implies. ``prefill`` and ``decode`` are the masks of the policy.
    - ``rotation``: how rotary dimensions pair (``halves`` or ``neighbors``) if tokens are rotated by their position in the
      cache, else empty.
    - ``debug``: raise an error if new keys or values that will be quantized are not finite.
    - ``verifies``: whether the new tokens are a few that speculative decoding verifies. They see what a prompt would see, also
      if there is only one of them, and kernels of decode steps run them.
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
    verifies: bool = False

    def policy(self, phase: str) -> Mask | None:
        """The policy's mask for a phase."""
        return self.decode if phase == "decode" else self.prefill


class SelectionState(NamedTuple, Generic[T]):
    """The state that page selection reads and writes. ``T`` is a tensor or a graph node.

    ``summary`` ``[max_batch, heads, n, width]`` holds the page summaries, and ``scores`` ``[max_batch, heads, pages]`` ranks
    the pages. ``counts`` ``[max_batch, heads, 1]`` and ``table`` ``[max_batch, heads, 1, width]`` list the pages that were
    selected last. Only a layer that scores its own pages has ``summary``. If the keys themselves are scored, there are only
    ``scores``.
    """

    scores: T
    counts: T | None = None
    table: T | None = None
    summary: T | None = None

    def used(self) -> list[T]:
        """The fields that are not None."""
        return [part for part in self if part is not None]


def selection_shapes(pages: Storage, selection: PageSelection, key_dim: int) -> SelectionState[tuple[int, ...]]:
    """The shapes of the selection state of a layer that scores its own pages, without the batch axis."""
    selector, heads, count = selection.selector, len(pages.heads), pages.slots // selection.page_size
    described = summary_width(selector.score, key_dim)
    if not described:
        return SelectionState((heads, count))
    return SelectionState(
        (heads, count), (heads, 1), (heads, 1, selection.width), (heads, pages.slots // selector.page, described)
    )


def quantized_of(plan: LayerPlan, quantized: Sequence[T], number: int) -> list[QuantizedTensor[T]]:
    """Return the quantized keys and values of storage group ``number``, or an empty list if it is not quantized.

    ``quantized`` lists the tensors of all storage groups of the layer.
    """
    rest = list(quantized)
    sides: list[QuantizedTensor[T]] = []
    for storage in plan.storages[: number + 1]:
        sides = []
        for form in storage.forms or ():
            sides.append(QuantizedTensor(*rest[: form.count]))
            rest = rest[form.count :]
    return sides


def misfit(k: Tensor, v: Tensor, buffers: Sequence[Tensor], plan: LayerPlan) -> str:
    """Explain why new keys and values ``[B, Hkv, Q, D]`` do not fit into ``buffers``. Empty if they fit."""
    batch, heads, dim, value_dim = map(example_size, (*k.shape[:2], k.shape[3], v.shape[3]))
    buffer = buffers[0]
    built = sum(len(storage.heads) for storage in plan.storages), buffer.shape[3], buffers[1].shape[3]
    if (heads, dim, value_dim) != built:
        return (
            f"layer {plan.layer} of the cache was built for {built[0]} KV heads of {built[1]} (values {built[2]}), got {heads} "
            f"of {dim} ({value_dim}): build it from the config of this model"
        )
    if {k.dtype, v.dtype} != {buffer.dtype}:
        return f"the cache was built with dtype={buffer.dtype}, got keys of {k.dtype}: build it with that dtype"
    if k.device.type != buffer.device.type or (k.device.index or 0) != (buffer.device.index or 0):
        return f"the cache was built with device={buffer.device}, got keys on {k.device}: build it on that device"
    if batch > buffer.shape[0]:
        return f"the cache was built with max_batch={buffer.shape[0]}, got {batch} sequences: build it with a larger max_batch"
    return ""


def needed_past(mask: Mask, mode: str, length: int) -> Past | None:
    """Return which past keys queries under ``mask`` need, or None if they need all of them.

    In mode ``chunk_relaxed``, a query sees what the query before its chunk saw, so one more recent token is needed.
    """
    past = visible_past(mask, length)
    if past is None or mode == "strict":
        return past
    return Past(past.sink, past.recent + 1) if past.sink + past.recent + 1 < length else None
