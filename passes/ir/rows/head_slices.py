"""Select heads of a tensor in a graph, and join the outputs of head groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from sparse_compile.masks.patterns.per_head import consecutive
from sparse_compile.passes.ir.fx_emit import inline


def pick_heads(point: Node, x: Node, heads: Sequence[int] | None) -> Node:
    """Select ``heads`` of ``x`` ``[B, H, N, D]`` before ``point`` (None: all); a view if they are consecutive."""
    if heads is None:
        return x
    runs = consecutive(heads)
    picked: Node = inline(
        point,
        lambda x: x[:, slice(*runs[0])] if len(runs) == 1 else torch.cat([x[:, slice(*run)] for run in runs], dim=1),
        x,
    )
    return picked


def join_heads(point: Node, groups: Sequence[Sequence[int]], outs: Sequence[Node]) -> Node:
    """Join the outputs of all groups into one tensor ``[B, H, N, D]`` with heads in ascending order, before ``point``.

    The nodes get example values, because AOTAutograd cannot cache a method call without one.

    In memory, all heads of a position lie together, as kernels write them, because a model may take a view
    ``[B, Q, H * D]`` of the result.
    """
    place = {head: (k, at) for k, heads in enumerate(groups) for at, head in enumerate(heads)}
    runs: list[list[int]] = []  # group, and the first and end place of a run of heads in it
    for head in sorted(place):
        group, at = place[head]
        if runs and runs[-1][0] == group and runs[-1][2] == at:
            runs[-1][2] = at + 1
        else:
            runs.append([group, at, at + 1])

    def join(*outs: Any) -> Any:
        by_position = [out.transpose(1, 2) for out in outs]
        return torch.cat([by_position[group][:, :, start:stop] for group, start, stop in runs], dim=2).transpose(1, 2)

    joined: Node = inline(point, join, *outs)
    return joined
