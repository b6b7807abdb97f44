"""The sources of keys and values: a closed set of types that the cache pass creates and kernels read.

Nothing here writes to a graph. The chosen kernel decides how it reads a source: in place, or as dense tensors that
``lower/nodes/cache_writes.py`` makes from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from sparse_compile.passes.ir.fx_nodes import hint_of, sizes_of
from sparse_compile.passes.storage import layer_plan
from sparse_compile.passes.storage.codec import Format, QuantizedTensor
from sparse_compile.passes.storage.layer_plan import PageSelection, SelectionState


@dataclass(frozen=True)
class Dense:
    """Ordinary tensors of the graph, ``[B, Hkv, KV, D]``."""

    k: Node
    v: Node

    @property
    def heads(self) -> int:
        """The number of KV heads."""
        return hint_of(sizes_of(self.k)[1])

    @property
    def length(self) -> Any:
        """The number of keys that queries can see."""
        return sizes_of(self.k)[2]

    @property
    def dims(self) -> tuple[int, int]:
        """The number of channels of a key and of a value."""
        return hint_of(sizes_of(self.k)[3]), hint_of(sizes_of(self.v)[3])


@dataclass(frozen=True)
class Cached(Dense):
    """The output of ``update``, a node that updates one layer of a SparseCache.

    ``k`` and ``v`` are placeholders with the shape of all keys; no such tensors exist when the graph runs. With
    ``is_prompt``, attention sees the new tokens only. With ``is_computed``, the model computes ``k`` and ``v`` from the outputs
    of the update. ``verifies`` says that the new tokens are a few that speculative
    decoding verifies. The cache pass replaces this source by the sources below, one for each storage of the layer.
    """

    update: Node
    is_prompt: bool
    is_computed: bool = False
    verifies: bool = False


@dataclass(frozen=True)
class NewTokens:
    """The keys and values ``[B, Hkv, Q, D]`` that a graph adds to a cache, for the KV heads ``heads`` (None: all of them).

    ``start`` ``[]`` is the column of the first new token, and ``columns`` ``[B, Q]`` are the columns of all. ``is_step`` says
    that there is one new token for each sequence. ``texts`` ``[B, columns]`` is the text position of every column of the
    cache, or None if no token is padding. ``anchor`` is the column from which the steps that score pages are counted, or
    None in a cache without page selection. ``verifies`` says that these are a few tokens, or one, that read every key.
    """

    k: Node
    v: Node
    heads: tuple[int, ...] | None
    start: Node
    columns: Node
    is_step: bool
    texts: Node | None
    anchor: Node | None
    verifies: bool = False


@dataclass(frozen=True)
class Paged:
    """Pages that hold every key unquantized: buffers ``[max_batch, H, slots, D]`` with column ``n`` in slot ``n``."""

    keys: Node
    values: Node
    new: NewTokens

    @property
    def heads(self) -> int:
        """The number of KV heads."""
        return hint_of(sizes_of(self.keys)[1])

    @property
    def length(self) -> int:
        """The number of keys that queries can see."""
        return hint_of(sizes_of(self.keys)[2])

    @property
    def dims(self) -> tuple[int, int]:
        """The number of channels of a key and of a value."""
        return hint_of(sizes_of(self.keys)[3]), hint_of(sizes_of(self.values)[3])


@dataclass(frozen=True)
class Quantized:
    """Pages of quantized keys and values. ``tails`` hold the latest tokens unquantized, column ``n`` in slot ``n % slots``.

    With ``check_finite``, an infinite or NaN value in a new token raises an error when the graph runs.
    """

    tails: Paged
    keys: QuantizedTensor[Node]
    values: QuantizedTensor[Node]
    forms: tuple[Format, Format]
    check_finite: bool

    @property
    def new(self) -> NewTokens:
        """The tokens that the graph adds."""
        return self.tails.new

    @property
    def heads(self) -> int:
        """The number of KV heads."""
        return self.tails.heads

    @property
    def length(self) -> int:
        """The number of keys that queries can see."""
        return hint_of(sizes_of(self.keys.data)[2])

    @property
    def dims(self) -> tuple[int, int]:
        """The number of channels of a key and of a value."""
        return self.tails.dims


@dataclass(frozen=True)
class Selected:
    """Pages of which decode steps read a selection. ``state`` holds the tensors that the selection uses.

    ``leads`` says that this layer scores its pages itself, instead of using the scores of an earlier layer.
    """

    pages: Paged | Quantized
    selection: PageSelection
    state: SelectionState[Node]
    leads: bool

    @property
    def new(self) -> NewTokens:
        """The tokens that the graph adds."""
        return self.pages.new

    @property
    def appends_with_choice(self) -> bool:
        """Whether one op both appends the token of a step and selects pages."""
        return self.new.is_step and self.state.summary is not None

    @property
    def heads(self) -> int:
        """The number of KV heads."""
        return self.pages.heads

    @property
    def length(self) -> int:
        """The number of keys that queries can see."""
        return self.pages.length

    @property
    def dims(self) -> tuple[int, int]:
        """The number of channels of a key and of a value."""
        return self.pages.dims


@dataclass(frozen=True)
class RingStep:
    """The positions of a ring after a decode step: ``texts`` and ``columns`` of each slot, ``[B, slots]``.

    ``slot`` ``[B, 1]`` is the slot of the new token. If ``holds`` ``[B, 1]`` is true, the slot keeps its old content instead.
    """

    texts: Node
    columns: Node
    slot: Node
    holds: Node


@dataclass(frozen=True)
class RingChunk:
    """The positions of a ring sorted by text position, followed by a chunk of new tokens.

    ``order`` ``[B, slots]`` sorts the slots of the ring. ``texts`` and ``columns`` ``[B, slots + Q]`` are those of the sorted
    ring and the chunk. ``source`` ``[B, slots]`` is the place among them from which each slot takes its content afterwards.
    """

    texts: Node
    columns: Node
    order: Node
    source: Node


@dataclass(frozen=True)
class Ring:
    """The ring of some KV heads: buffers ``[max_batch, H, slots, D]``, and its positions in this graph.

    ``text`` ``[B, Q]`` are the text positions of the queries. ``window`` is the size of the sink and the number of recent
    tokens that a step sees, if its mask is no more than that; else None. ``may_hold`` says that a slot may refuse a new
    token: because the token is padding, or because the sink fills the whole ring.
    """

    storage: layer_plan.RingStorage
    keys: Node
    values: Node
    new: NewTokens
    at: RingStep | RingChunk
    text: Node
    window: tuple[int, int] | None
    may_hold: bool

    @property
    def heads(self) -> int:
        """The number of KV heads."""
        return len(self.storage.heads)

    @property
    def length(self) -> Any:
        """The number of keys that queries can see."""
        return sizes_of(self.at.texts)[1]

    @property
    def dims(self) -> tuple[int, int]:
        """The number of channels of a key and of a value."""
        return hint_of(sizes_of(self.keys)[3]), hint_of(sizes_of(self.values)[3])


@dataclass(frozen=True)
class Prompt:
    """The first tokens of a cache. Attention reads them unquantized, and they are written ``into`` a storage."""

    into: Paged | Quantized | Selected | Ring

    @property
    def new(self) -> NewTokens:
        """The tokens that the graph adds."""
        return self.into.new

    @property
    def heads(self) -> int:
        """The number of KV heads."""
        return self.into.heads

    @property
    def length(self) -> Any:
        """The number of keys that queries can see."""
        return sizes_of(self.new.k)[2]

    @property
    def dims(self) -> tuple[int, int]:
        """The number of channels of a key and of a value."""
        return self.into.dims


KVSource = Dense | Prompt | Paged | Quantized | Selected | Ring


def can_be_read_in_place(kv: KVSource) -> bool:
    """Whether our kernel can read ``kv`` in a decode step without making dense tensors from it."""
    if isinstance(kv, Ring):
        return kv.window is not None
    return isinstance(kv, Quantized | Selected) and kv.new.is_step
