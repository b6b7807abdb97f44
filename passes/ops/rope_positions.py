"""Where rotary embeddings put the tokens of a cache whose queries stand at their place in it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("sparse_compile::stream_positions", mutates_args=())
def stream_positions(rope: Tensor, offsets: Tensor, text: Tensor, tensor_names: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Where the model's rotary embedding puts new tokens at ``text`` ``[B, Q]``, and how far window keys turn to join them.

    With ``given`` positions are those of the text, else they count from ``rope``. ``offsets`` ``[max_batch]`` are text
    position less rotary position of the keys kept so far. Returns the rotary positions ``[B, Q]``, the new offsets and the
    turns ``[B]``.
    """
    batch, tokens = text.shape
    known = offsets[:batch]
    at = torch.arange(tokens, device=text.device).expand(batch, tokens)
    ropes = text.clamp(min=0) if tensor_names else rope + at
    last = torch.where(text >= 0, at, -1).amax(dim=1, keepdim=True)
    there = last.clamp(min=0)
    offset = torch.where(last < 0, known.unsqueeze(1), text.gather(1, there) - ropes.gather(1, there)).squeeze(1)
    return ropes, offset, known - offset


@stream_positions.register_fake
def _(rope: Tensor, offsets: Tensor, text: Tensor, tensor_names: bool) -> tuple[Tensor, Tensor, Tensor]:
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


def rotate(x: Any, by: Any, frequencies: Any, *, interleaved: bool) -> Any:
    """``x`` ``[B, H, N, D]`` as if it stood ``by`` ``[B, N]`` positions further on; ``by`` of 0 changes no bit.

    ``frequencies`` ``[pairs]`` are radians for each position. Angles are computed in double precision: a float holds no more
    than 24 bits of a position. For tensors, and for proxies of a graph.
    """
    angle = by[:, None, :, None].to(torch.float64) * frequencies.to(torch.float64)
    cos, sin = angle.cos().to(torch.float32), angle.sin().to(torch.float32)
    pairs = frequencies.shape[0]
    wide = x.to(torch.float32)
    if interleaved:
        a, b = wide[..., 0 : 2 * pairs : 2], wide[..., 1 : 2 * pairs : 2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
    else:
        a, b = wide[..., :pairs], wide[..., pairs : 2 * pairs]
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    return torch.cat([turned, wide[..., 2 * pairs :]], dim=-1).to(x.dtype)
