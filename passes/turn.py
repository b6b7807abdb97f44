"""Turn keys and queries by a number of positions: what rotary position embeddings do, done once more."""

from __future__ import annotations

from typing import Any

import torch


def turn(x: Any, by: Any, frequencies: Any, *, interleaved: bool) -> Any:
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
