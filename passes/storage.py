"""How the keys and values of one layer are kept: which KV heads keep pages of everything, and which a ring."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

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


Storage = Pages | Ring


@dataclass(frozen=True)
class LayerPlan:
    """How layer ``layer`` of a cache is kept, and the masks that this follows from. ``last`` is the last layer of the cache.

    ``rings`` are the sink and slots of every kind of ring in the cache, whichever layer it is in: all layers share the
    positions. ``model`` is the mask the model's config announces; ``prefill`` and ``decode`` are the masks of the policy.
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

    def policy(self, phase: str) -> Mask | None:
        """The mask of the policy in a phase."""
        return self.decode if phase == "decode" else self.prefill

    def to_text(self) -> str:
        """The plan as a graph carries it."""
        masks = {name: getattr(self, name) for name in ("model", "prefill", "decode")}
        content = {
            "layer": [self.layer, self.last, self.max_length, self.mode],
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
        layer, last, max_length, mode = content["layer"]
        rings = tuple((sink, slots) for sink, slots in content["rings"])
        storages = tuple(
            Ring(tuple(heads), *rest) if len(rest) == 3 else Pages(tuple(heads), *rest) for heads, *rest in content["storages"]
        )
        model, prefill, step = (
            None if content[name] is None else decode(content[name]) for name in ("model", "prefill", "decode")
        )
        assert model is not None
        return LayerPlan(layer, last, max_length, rings, storages, model, prefill, step, mode)


def needed_past(mask: Mask, mode: str, length: int) -> Past | None:
    """What queries under ``mask`` need of the past; a relaxed chunk sees one token more, what the query before it saw."""
    past = visible_past(mask, length)
    if past is None or mode == "strict":
        return past
    return Past(past.sink, past.recent + 1) if past.sink + past.recent + 1 < length else None
