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
from torch import Tensor
from torch.fx import Node

from sparse_compile.passes.graph import emit, inline, value_of
from sparse_compile.passes.storage import Ring
from sparse_compile.passes.turn import turn


@torch.library.custom_op("sparse_compile::stream_positions", mutates_args=())
def stream_positions(rope: Tensor, offsets: Tensor, text: Tensor, given: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Where the model's rotary embedding puts new tokens at ``text`` ``[B, Q]``, and how far window keys turn to join them.

    With ``given`` positions are those of the text, else they count from ``rope``. ``offsets`` ``[max_batch]`` are text
    position less rotary position of the keys kept so far. Returns the rotary positions ``[B, Q]``, the new offsets and the
    turns ``[B]``.
    """
    batch, tokens = text.shape
    known = offsets[:batch]
    at = torch.arange(tokens, device=text.device).expand(batch, tokens)
    ropes = text.clamp(min=0) if given else rope + at
    last = torch.where(text >= 0, at, -1).amax(dim=1, keepdim=True)
    there = last.clamp(min=0)
    offset = torch.where(last < 0, known.unsqueeze(1), text.gather(1, there) - ropes.gather(1, there)).squeeze(1)
    return ropes, offset, known - offset


@stream_positions.register_fake
def _(rope: Tensor, offsets: Tensor, text: Tensor, given: bool) -> tuple[Tensor, Tensor, Tensor]:
    return text.new_empty(text.shape), offsets.new_empty(text.shape[0]), offsets.new_empty(text.shape[0])


@torch.library.custom_op("sparse_compile::stream_advance", mutates_args=())
def stream_advance(rope: Tensor, text: Tensor, period: int) -> Tensor:
    """The rotary position of the next token: at most two periods."""
    after = rope + text.shape[1]
    return torch.where(after >= 2 * period, torch.full_like(after, period), after)


@stream_advance.register_fake
def _(rope: Tensor, text: Tensor, period: int) -> Tensor:
    return rope.new_empty(())


@torch.library.custom_op("sparse_compile::sink_places", mutates_args=())
def sink_places(texts: Tensor, sink: int) -> Tensor:
    """The places ``[B, sink]`` of the first text positions among ``texts`` ``[B, n]``; any place for what is not there."""
    return (texts.unsqueeze(1) == torch.arange(sink, device=texts.device).view(1, -1, 1)).int().argmax(dim=2)


@sink_places.register_fake
def _(texts: Tensor, sink: int) -> Tensor:
    return texts.new_empty(texts.shape[0], sink)


@dataclass(frozen=True)
class Stream:
    """The moving frame of one cache in one graph; nodes go before ``point``."""

    ropes: Node
    turns: Node
    text: Node
    frequencies: Node
    interleaved: bool

    def _turn(self, point: Node, x: Node, by: Callable[..., Any], *read: Node) -> Node:
        """``x`` turned by what ``by`` computes of the nodes it reads."""

        def turned(x: Any, frequencies: Any, *read: Any) -> Any:
            return turn(x, by(*read), frequencies, interleaved=self.interleaved)

        node: Node = inline(point, turned, x, self.frequencies, *read)
        return node

    def joined(self, point: Node, rows: Node, ring: Ring) -> Node:
        """The keys of a ring in the frame of the new tokens."""
        slot = emit(point, torch.arange, ring.slots, device=value_of(rows).device)
        return self._turn(point, rows, lambda turns, slot: turns[:, None] * (slot >= ring.sink), self.turns, slot)

    def settled(self, point: Node, k: Node, ring: Ring) -> Node:
        """New keys, those of the sink where they stand in the text."""

        def by(text: Any, ropes: Any) -> Any:
            return (text - ropes) * ((text >= 0) & (text < ring.sink))

        return self._turn(point, k, by, self.text, self.ropes)

    def sink_scores(self, point: Node, q: Node, keys: Node, texts: Node, ring: Ring, scale: float, *, one: bool) -> Node:
        """The scores ``[B, Hq, Q, sink]`` of the sink, as seen from the queries' places in the cache."""
        last = ring.sink + ring.recent - 1
        heads, group = value_of(keys).shape[1], value_of(q).shape[1] // value_of(keys).shape[1]
        turned = self._turn(point, q, lambda text, ropes: text.clamp(max=last) - ropes, self.text, self.ropes)
        if one:
            first: Node = inline(point, lambda keys: keys[:, :, : ring.sink], keys)
        else:
            place = emit(point, sink_places._opoverload, texts, ring.sink)
            dim = value_of(keys).shape[3]
            first = inline(point, lambda keys, at: keys.gather(2, at[:, None, :, None].expand(-1, heads, -1, dim)), keys, place)

        def score(q: Any, k: Any) -> Any:
            rows = q.unflatten(1, (heads, group)).flatten(2, 3).to(torch.float32)
            scores = rows @ k.to(torch.float32).transpose(-1, -2) * scale
            return scores.unflatten(2, (group, -1)).flatten(1, 2)

        node: Node = inline(point, score, turned, first)
        return node
