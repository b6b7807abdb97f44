"""How the keys and values of one layer are kept: which KV heads keep pages of everything, and which a ring."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from sparse_compile.masks import Mask
from sparse_compile.masks.analysis import Past, visible_past
from sparse_compile.masks.json_format import decode, encode
from sparse_compile.masks.selection.page_scoring import digest_width
from sparse_compile.masks.selection.page_topk import PageTopK
from sparse_compile.passes.storage.codec import Codes, Format
from sparse_compile.passes.torch_private import real_tensors

T = TypeVar("T")
MODES = ("strict", "chunk_relaxed")


@dataclass(frozen=True)
class Selecting:
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
class Pages:
    """KV heads that keep every key: column ``n`` of the text in slot ``n``, ``slots`` in all.

    With ``selecting`` a decode step reads some of the pages only. With ``forms``, of keys and of values, they are kept in fewer
    bits, and the buffers are a tail: the latest ``tail`` columns as they came, column ``n`` in slot ``n % tail``.
    """

    heads: tuple[int, ...]
    slots: int
    selecting: Selecting | None = None
    forms: tuple[Format, Format] | None = None
    tail: int = 0

    def code_shapes(self, dims: tuple[int, int], dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape, less the batch, and dtype of all that is kept of encoded keys and values of size ``dims``."""
        forms = zip(self.forms or (), dims, strict=False)
        return [part for form, dim in forms for part in form.parts(len(self.heads), self.slots, dim, dtype)]


@dataclass(frozen=True)
class Ring:
    """KV heads that keep the first ``sink`` tokens, and the latest ones in the other slots, each overwriting the oldest.

    Token ``t`` beyond the sink stands in slot ``sink + (t - sink) % (slots - sink)``. Padding is not kept. Queries need the
    last ``recent`` tokens, their own included; what is above that can be rolled back.
    """

    heads: tuple[int, ...]
    slots: int
    sink: int
    recent: int

    @property
    def kind(self) -> tuple[int, int]:
        """What tells rings apart by their positions: sink and slots."""
        return self.sink, self.slots


Storage = Pages | Ring


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

    def to_text(self) -> str:
        """The plan as a graph carries it."""
        masks = {name: getattr(self, name) for name in ("model", "prefill", "decode")}
        content = {
            "layer": [self.layer, self.last, self.columns, self.mode, self.rotation, self.debug],
            "rings": self.rings,
            "storages": [_encode(storage) for storage in self.storages],
            **{name: None if mask is None else encode(mask) for name, mask in masks.items()},
        }
        return json.dumps(content)

    @staticmethod
    @lru_cache(maxsize=4096)
    def from_text(text: str) -> LayerPlan:
        """Read ``to_text`` back, with real tensors also while a graph is traced."""
        with real_tensors():
            return LayerPlan._from_text(text)

    @staticmethod
    def _from_text(text: str) -> LayerPlan:
        content = json.loads(text)
        layer, last, columns, mode, rotation, debug = content["layer"]
        rings = tuple((sink, slots) for sink, slots in content["rings"])
        storages = tuple(_decode(storage) for storage in content["storages"])
        model, prefill, step = (
            None if content[name] is None else decode(content[name]) for name in ("model", "prefill", "decode")
        )
        assert model is not None
        return LayerPlan(layer, last, columns, rings, storages, model, prefill, step, mode, rotation, debug)


def _encode(storage: Storage) -> list[Any]:
    if isinstance(storage, Ring):
        return [list(storage.heads), storage.slots, storage.sink, storage.recent]
    chosen = storage.selecting
    selecting = (
        None
        if chosen is None
        else [encode(chosen.selector), chosen.page_size, chosen.leader, chosen.rows, chosen.width, chosen.by_keys]
    )
    forms = [form.to_text() for form in storage.forms or ()]
    return [list(storage.heads), storage.slots, selecting, forms, storage.tail]


def _decode(content: list[Any]) -> Storage:
    heads, slots, *rest = content
    if len(rest) == 2:
        return Ring(tuple(heads), slots, *rest)
    written, texts, tail = rest
    selecting: Selecting | None = None
    if written is not None:
        selector, page_size, leader, rows, width, by_keys = written
        chosen = decode(selector)
        assert isinstance(chosen, PageTopK)
        selecting = Selecting(chosen, page_size, leader, tuple(rows), width, by_keys)
    forms = (Format.from_text(texts[0]), Format.from_text(texts[1])) if texts else None
    return Pages(tuple(heads), slots, selecting, forms, tail)


class Choice(NamedTuple, Generic[T]):
    """What selecting pages takes and leaves: tensors, or their nodes. Only a layer that leads has ``digest``.

    ``digest`` ``[max_batch, heads, n, width]`` describes pages, ``scores`` ``[max_batch, heads, pages]`` ranks them; ``counts``
    ``[max_batch, heads, 1]`` and ``table`` ``[max_batch, heads, 1, width]`` list those that were chosen last. Choosing by the
    keys themselves takes scores alone.
    """

    scores: T
    counts: T | None = None
    table: T | None = None
    digest: T | None = None

    def used(self) -> list[T]:
        """Those that there are."""
        return [part for part in self if part is not None]


def choice_shapes(pages: Pages, selecting: Selecting, key_dim: int) -> Choice[tuple[int, ...]]:
    """The shapes of what a layer that leads keeps, less the batch."""
    selector, heads, count = selecting.selector, len(pages.heads), pages.slots // selecting.page_size
    described = digest_width(selector.score, key_dim)
    if not described:
        return Choice((heads, count))
    return Choice((heads, count), (heads, 1), (heads, 1, selecting.width), (heads, pages.slots // selector.page, described))


def codes_of(plan: LayerPlan, codes: Sequence[T], number: int) -> list[Codes[T]]:
    """The codes of keys and of values of storage ``number`` among those of all storages; none if it keeps plain numbers."""
    rest = list(codes)
    found: list[Codes[T]] = []
    for storage in plan.storages[: number + 1]:
        found = []
        for form in (storage.forms or ()) if isinstance(storage, Pages) else ():
            found.append(Codes(*rest[: form.count]))
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
