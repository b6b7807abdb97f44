"""Where attention finds its keys and values: a closed set, which the cache pass describes and kernels read.

Nothing here writes to a graph. The chosen kernel decides how a source is read: in place, or as the dense tensors that
``lower/cache_writes.py`` makes of it.
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
        """The number of keys that queries may see."""
        return sizes_of(self.k)[2]

    @property
    def dims(self) -> tuple[int, int]:
        """The channels of a key and of a value."""
        return hint_of(sizes_of(self.k)[3]), hint_of(sizes_of(self.v)[3])


@dataclass(frozen=True)
class Cached(Dense):
    """The output of ``update``, a node that updates one layer of a SparseCache.

    ``k`` and ``v`` have the shape of all keys and exist nowhere. With ``is_prompt`` attention sees the new tokens alone. The
    cache pass replaces this source by those below, one for each storage of the layer.
    """

    update: Node
    is_prompt: bool


@dataclass(frozen=True)
class NewTokens:
    """The keys and values ``[B, Hkv, Q, D]`` that a graph adds to a cache, of the KV heads ``heads`` (None: all of them).

    ``start`` ``[]`` is the column of the first one and ``columns`` ``[B, Q]`` are those of all; ``is_step`` says that there is
    one for each sequence. ``texts`` ``[B, columns]`` is the text position of every column of the cache, or None if no token is
    padding. ``anchor`` is the column from which scoring steps are counted, or None in a cache without page selection.
    """

    k: Node
    v: Node
    heads: tuple[int, ...] | None
    start: Node
    columns: Node
    is_step: bool
    texts: Node | None
    anchor: Node | None


@dataclass(frozen=True)
class Paged:
    """Pages that hold every key as it came: buffers ``[max_batch, H, slots, D]`` with column ``n`` in slot ``n``."""

    keys: Node
    values: Node
    new: NewTokens

    @property
    def heads(self) -> int:
        """The number of KV heads."""
        return hint_of(sizes_of(self.keys)[1])

    @property
    def length(self) -> int:
        """The number of keys that queries may see."""
        return hint_of(sizes_of(self.keys)[2])

    @property
    def dims(self) -> tuple[int, int]:
        """The channels of a key and of a value."""
        return hint_of(sizes_of(self.keys)[3]), hint_of(sizes_of(self.values)[3])


@dataclass(frozen=True)
class Quantized:
    """Pages of quantized keys and values. ``tails`` hold the latest tokens as they came, column ``n`` in slot ``n % slots``.

    With ``check_finite``, new numbers that are infinite or NaN are an error when the graph runs.
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
        """The number of keys that queries may see."""
        return hint_of(sizes_of(self.keys.data)[2])

    @property
    def dims(self) -> tuple[int, int]:
        """The channels of a key and of a value."""
        return self.tails.dims


@dataclass(frozen=True)
class Selected:
    """Pages from which decode steps choose what they read. ``choice`` is the state that they choose by.

    ``leads`` says that this layer scores its pages itself, rather than use the scores of an earlier layer.
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
        """Whether one op appends the token of a step and chooses pages."""
        return self.new.is_step and self.state.summary is not None

    @property
    def heads(self) -> int:
        """The number of KV heads."""
        return self.pages.heads

    @property
    def length(self) -> int:
        """The number of keys that queries may see."""
        return self.pages.length

    @property
    def dims(self) -> tuple[int, int]:
        """The channels of a key and of a value."""
        return self.pages.dims


@dataclass(frozen=True)
class RingStep:
    """A ring after one token of each sequence: text position and column of each slot, ``[B, slots]``.

    ``slot`` ``[B, 1]`` is where the token goes; where ``holds`` ``[B, 1]`` is true the slot holds what it has instead.
    """

    texts: Node
    columns: Node
    slot: Node
    holds: Node


@dataclass(frozen=True)
class RingChunk:
    """A ring in the ``order`` of its text, ``[B, slots]``, and a chunk of tokens behind it.

    Text position and column are those of each place of both, ``[B, slots + Q]``. ``source`` ``[B, slots]`` is the place that
    each slot takes its content from afterwards.
    """

    texts: Node
    columns: Node
    order: Node
    source: Node


@dataclass(frozen=True)
class Ring:
    """The ring of some KV heads: buffers ``[max_batch, H, slots, D]``, and where everything stands in this graph.

    ``text`` ``[B, Q]`` are the text positions of the queries. ``window`` is the sink and the number of recent tokens that a
    step sees if that is all its mask says, else None. ``may_hold`` says that a slot may refuse a token: padding, or a ring
    that is full of sink.
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
        """The number of keys that queries may see."""
        return sizes_of(self.at.texts)[1]

    @property
    def dims(self) -> tuple[int, int]:
        """The channels of a key and of a value."""
        return hint_of(sizes_of(self.keys)[3]), hint_of(sizes_of(self.values)[3])


@dataclass(frozen=True)
class Prompt:
    """The first tokens of a cache: attention sees them as they are, and they are written ``into`` a storage."""

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
        """The number of keys that queries may see."""
        return sizes_of(self.new.k)[2]

    @property
    def dims(self) -> tuple[int, int]:
        """The channels of a key and of a value."""
        return self.into.dims


KVSource = Dense | Prompt | Paged | Quantized | Selected | Ring


def can_be_read_in_place(kv: KVSource) -> bool:
    """Whether a decode step can read ``kv`` by our kernel, without making ordinary tensors of it."""
    if isinstance(kv, Ring):
        return kv.window is not None
    return isinstance(kv, Quantized | Selected) and kv.new.is_step
