"""StreamingLLM's positions: the rotary position of a query is its place in the cache, however long the text is.

Window keys keep their rotary positions, because only their distance from the query matters. Positions that grow without end
would lose precision, so all keys and queries share a frame that moves: before the positions reach two periods, they are set
back by one period, and the window keys are rotated by the same amount. Sink keys always keep their text positions. Their scores
are computed with the query rotated back to its place in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from sparse_compile.passes.ir.fx_emit import emit, inline
from sparse_compile.passes.ir.fx_nodes import value_of
from sparse_compile.passes.ops.cache.rope_positions import rotate, sink_places
from sparse_compile.passes.storage.layer_plan import LayerPlan, RingStorage
from sparse_compile.passes.torch_private import overload


@dataclass(frozen=True)
class MovingFrame:
    """The moving frame of one cache in one graph. Each method adds its nodes before ``point``.

    ``ropes`` ``[B, Q]`` are the rotary positions of the new tokens, and ``text`` ``[B, Q]`` their text positions. ``turns``
    ``[B]`` is how far window keys rotate to join the frame. ``frequencies`` are those of the model's rotary embedding, and
    ``interleaved`` says that it pairs neighboring channels.
    """

    ropes: Node
    turns: Node
    text: Node
    frequencies: Node
    interleaved: bool

    def _turn(self, point: Node, x: Node, by: Callable[..., Any], *read: Node) -> Node:
        """Rotate ``x`` by the number of positions that ``by`` computes from the nodes ``read``."""

        def turned(x: Any, frequencies: Any, *read: Any) -> Any:
            return rotate(x, by(*read), frequencies, interleaved=self.interleaved)

        node: Node = inline(point, turned, x, self.frequencies, *read)
        return node

    def joined(self, point: Node, rows: Node, ring: RingStorage) -> Node:
        """The keys ``rows`` of a ring, with the window keys rotated into the frame of the new tokens."""
        slot = emit(point, torch.arange, ring.slots, device=value_of(rows).device)
        return self._turn(point, rows, lambda turns, slot: turns[:, None] * (slot >= ring.sink), self.turns, slot)

    def settled(self, point: Node, k: Node, ring: RingStorage) -> Node:
        """The new keys ``k``, with those of the sink rotated to their text positions."""

        def by(text: Any, ropes: Any) -> Any:
            return (text - ropes) * ((text >= 0) & (text < ring.sink))

        return self._turn(point, k, by, self.text, self.ropes)

    def sink_scores(
        self, point: Node, q: Node, keys: Node, texts: Node, ring: RingStorage, scale: float, *, is_step: bool
    ) -> Node:
        """The scores ``[B, Hq, Q, sink]`` of the sink, computed with the queries rotated to their places in the cache."""
        last = ring.sink + ring.recent - 1
        heads, group = value_of(keys).shape[1], value_of(q).shape[1] // value_of(keys).shape[1]
        turned = self._turn(point, q, lambda text, ropes: text.clamp(max=last) - ropes, self.text, self.ropes)
        if is_step:
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
    """The number of positions by which they are set back: at least the longest ring, so that a key is rotated at most once."""
    return max(256, *(slots for _, slots in plan.rings))
