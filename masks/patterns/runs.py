"""The smallest and largest values of a tensor over runs of positions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def over_runs(values: Tensor, lo: Tensor, hi: Tensor, reduce: Literal["amin", "amax"]) -> Tensor:
    """Return the minimum or maximum of ``values`` ``[B, N, ...]`` over each run of positions ``lo..hi``: ``[B, rows, ...]``.

    No run starts before the one before it ends. Two neighbors may share a position, so both ends of a run are read apart.
    """
    last = values.shape[1] - 1
    first = values[:, lo.clamp(0, last)]
    if lo is hi:
        return first
    both = torch.minimum if reduce == "amin" else torch.maximum
    ends = both(first, values[:, hi.clamp(0, last)])
    position = torch.arange(last + 1, device=values.device)
    row = torch.searchsorted((lo + 1).contiguous(), position, right=True) - 1
    inside = (row >= 0) & (position < hi[row.clamp(min=0)])
    row = torch.where(inside, row, lo.numel())  # all other positions go to a row of their own
    room = torch.cat([ends, ends[:, :1]], dim=1)
    index = row.view(1, -1, *[1] * (values.dim() - 2)).expand_as(values)
    return room.scatter_reduce_(1, index, values, reduce)[:, :-1]
