"""Compute rotary positions for a cache whose tokens are rotated by their position in the cache and not in the text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("sparse_compile::stream_positions", mutates_args=())
def stream_positions(rope: Tensor, offsets: Tensor, text: Tensor, follows_text: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rotary positions of new tokens at text positions ``text`` ``[B, Q]``, and how far to rotate window keys.

    With ``follows_text``, the rotary positions are those of the text. Otherwise they count from ``rope``. ``offsets``
    ``[max_batch]`` are the text position minus the rotary position of the cached keys. Returns the rotary positions ``[B, Q]``,
    the new offsets ``[B]``, and the number of positions ``[B]`` by which cached window keys must be rotated to match.
    """
    batch, tokens = text.shape
    old_offsets = offsets[:batch]
    step = torch.arange(tokens, device=text.device).expand(batch, tokens)
    ropes = text.clamp(min=0) if follows_text else rope + step
    last = torch.where(text >= 0, step, -1).amax(dim=1, keepdim=True)
    index = last.clamp(min=0)
    offset = torch.where(last < 0, old_offsets.unsqueeze(1), text.gather(1, index) - ropes.gather(1, index)).squeeze(1)
    return ropes, offset, old_offsets - offset


@stream_positions.register_fake
def _(rope: Tensor, offsets: Tensor, text: Tensor, follows_text: bool) -> tuple[Tensor, Tensor, Tensor]:
    return text.new_empty(text.shape), offsets.new_empty(text.shape[0]), offsets.new_empty(text.shape[0])


@torch.library.custom_op("sparse_compile::stream_advance", mutates_args=())
def stream_advance(rope: Tensor, text: Tensor, period: int) -> Tensor:
    """Return the rotary position of the next token. From two periods on, it is set back to one period."""
    after = rope + text.shape[1]
    return torch.where(after >= 2 * period, torch.full_like(after, period), after)


@stream_advance.register_fake
def _(rope: Tensor, text: Tensor, period: int) -> Tensor:
    return rope.new_empty(())


@torch.library.custom_op("sparse_compile::sink_places", mutates_args=())
def sink_places(texts: Tensor, sink: int) -> Tensor:
    """Return the indices ``[B, sink]`` of the first ``sink`` text positions in ``texts`` ``[B, n]``.

    A text position that is missing gets an arbitrary index.
    """
    return (texts.unsqueeze(1) == torch.arange(sink, device=texts.device).view(1, -1, 1)).int().argmax(dim=2)


@sink_places.register_fake
def _(texts: Tensor, sink: int) -> Tensor:
    return texts.new_empty(texts.shape[0], sink)


def rotate(x: Any, by: Any, frequencies: Any, *, interleaved: bool) -> Any:
    """Rotate ``x`` ``[B, H, N, D]`` forward by ``by`` ``[B, N]`` positions. A ``by`` of 0 changes no bit.

    ``frequencies`` ``[pairs]`` are radians per position. Angles are computed in double precision, because a float holds only 24
    bits of a position. Accepts tensors and graph proxies.
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
