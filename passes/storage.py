"""How the keys and values of one layer are kept: which KV heads keep pages of everything, and which a ring."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from sparse_compile.masks import Mask
from sparse_compile.masks.past import Past, visible_past
from sparse_compile.masks.serial import decode, encode

MODES = ("strict", "chunk_relaxed")


@dataclass(frozen=True)
class Pages:
    """KV heads that keep every key: column ``n`` of the text in slot ``n``, ``slots`` in all."""

    heads: tuple[int, ...]
    slots: int


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

    ``rings`` are the sink and slots of every kind of ring in the cache, whichever layer it is in: all layers share the
    positions. ``model`` is the mask the model's config announces; ``prefill`` and ``decode`` are the masks of the policy.
    ``rotation`` says how dimensions pair (``halves``, ``neighbours``) if queries stand at their place in the cache.
    """

    layer: int
    last: bool
    max_length: int
    rings: tuple[tuple[int, int], ...]
    storages: tuple[Storage, ...]
    model: Mask
    prefill: Mask | None
    decode: Mask | None
    mode: str = "strict"
    rotation: str = ""

    def policy(self, phase: str) -> Mask | None:
        """The mask of the policy in a phase."""
        return self.decode if phase == "decode" else self.prefill

    def to_text(self) -> str:
        """The plan as a graph carries it."""
        masks = {name: getattr(self, name) for name in ("model", "prefill", "decode")}
        content = {
            "layer": [self.layer, self.last, self.max_length, self.mode, self.rotation],
            "rings": self.rings,
            "storages": [[list(s.heads), s.slots, *([s.sink, s.recent] if isinstance(s, Ring) else [])] for s in self.storages],
            **{name: None if mask is None else encode(mask) for name, mask in masks.items()},
        }
        return json.dumps(content)

    @staticmethod
    @lru_cache(maxsize=4096)
    def from_text(text: str) -> LayerPlan:
        """Read ``to_text`` back."""
        content = json.loads(text)
        layer, last, max_length, mode, rotation = content["layer"]
        rings = tuple((sink, slots) for sink, slots in content["rings"])
        storages = tuple(
            Ring(tuple(heads), *rest) if len(rest) == 3 else Pages(tuple(heads), *rest) for heads, *rest in content["storages"]
        )
        model, prefill, step = (
            None if content[name] is None else decode(content[name]) for name in ("model", "prefill", "decode")
        )
        assert model is not None
        return LayerPlan(layer, last, max_length, rings, storages, model, prefill, step, mode, rotation)


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
