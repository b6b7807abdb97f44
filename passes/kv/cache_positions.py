"""StreamingLLM's positions: a query stands where it would in the cache, however long the text is.

Window keys stay where they are: only their distance from the query matters. Positions that grow without end would lose
precision, so all keys and queries stand in a frame that moves on: before a text is two periods long, positions are set back by
one, and the keys of the window are turned along. Sink keys stand at their place in the text for good, and their scores are
computed with the query turned back to its place in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from sparse_compile.passes.ir.fx_emit import emit, inline
from sparse_compile.passes.ir.fx_nodes import value_of
from sparse_compile.passes.ops.rope_positions import rotate, sink_places
from sparse_compile.passes.storage.layer_plan import LayerPlan, RingStorage
from sparse_compile.passes.torch_private import overload


@dataclass(frozen=True)
class MovingFrame:
    """The moving frame of one cache in one graph; nodes go before ``point``."""

    ropes: Node
    turns: Node
    text: Node
    frequencies: Node
    interleaved: bool

    def _turn(self, point: Node, x: Node, by: Callable[..., Any], *read: Node) -> Node:
        """``x`` turned by what ``by`` computes of the nodes it reads."""

        def turned(x: Any, frequencies: Any, *read: Any) -> Any:
            return rotate(x, by(*read), frequencies, interleaved=self.interleaved)

        node: Node = inline(point, turned, x, self.frequencies, *read)
        return node

    def joined(self, point: Node, rows: Node, ring: RingStorage) -> Node:
        """The keys of a ring in the frame of the new tokens."""
        slot = emit(point, torch.arange, ring.slots, device=value_of(rows).device)
        return self._turn(point, rows, lambda turns, slot: turns[:, None] * (slot >= ring.sink), self.turns, slot)

    def settled(self, point: Node, k: Node, ring: RingStorage) -> Node:
        """New keys, those of the sink where they stand in the text."""

        def by(text: Any, ropes: Any) -> Any:
            return (text - ropes) * ((text >= 0) & (text < ring.sink))

        return self._turn(point, k, by, self.text, self.ropes)

    def sink_scores(self, point: Node, q: Node, keys: Node, texts: Node, ring: RingStorage, scale: float, *, one: bool) -> Node:
        """The scores ``[B, Hq, Q, sink]`` of the sink, as seen from the queries' places in the cache."""
        last = ring.sink + ring.recent - 1
        heads, group = value_of(keys).shape[1], value_of(q).shape[1] // value_of(keys).shape[1]
        turned = self._turn(point, q, lambda text, ropes: text.clamp(max=last) - ropes, self.text, self.ropes)
        if one:
            first: Node = inline(point, lambda keys: keys[:, :, : ring.sink], keys)
        else:
            place = emit(point, overload(sink_places), texts, ring.sink)
            dim = value_of(keys).shape[3]
            first = inline(point, lambda keys, at: keys.gather(2, at[:, None, :, None].expand(-1, heads, -1, dim)), keys, place)

        def score(q: Any, k: Any) -> Any:
            rows = q.unflatten(1, (heads, group)).flatten(2, 3).to(torch.float32)
            scores = rows @ k.to(torch.float32).transpose(-1, -2) * scale
            return scores.unflatten(2, (group, -1)).flatten(1, 2)

        node: Node = inline(point, score, turned, first)
        return node


def period_of(plan: LayerPlan) -> int:
    """How far positions run before they are set back: no less than any ring is long, so that a key is turned once."""
    return max(256, *(slots for _, slots in plan.rings))
