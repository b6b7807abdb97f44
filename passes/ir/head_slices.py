"""Pick some heads of a tensor of a graph, and put the outputs of several groups of heads together again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from sparse_compile.masks.patterns.per_head import consecutive
from sparse_compile.passes.ir.fx_emit import inline


def pick_heads(point: Node, x: Node, heads: Sequence[int] | None) -> Node:
    """Some heads of ``x`` ``[B, H, N, D]``, before ``point``; a view where they are neighbours."""
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
    """The outputs of all groups as one tensor ``[B, H, N, D]``, heads in ascending order, before ``point``.

    Nodes need example values: without one AOTAutograd takes a method call for something that it cannot cache.

    In memory heads lie inside positions, as kernels leave them: a model may ask for a view of ``[B, Q, H * D]``.
    """
    place = {head: (k, at) for k, heads in enumerate(groups) for at, head in enumerate(heads)}
    pieces: list[list[int]] = []  # group, first head of it, end
    for head in sorted(place):
        group, at = place[head]
        if pieces and pieces[-1][0] == group and pieces[-1][2] == at:
            pieces[-1][2] = at + 1
        else:
            pieces.append([group, at, at + 1])

    def join(*outs: Any) -> Any:
        by_position = [out.transpose(1, 2) for out in outs]
        return torch.cat([by_position[group][:, :, start:stop] for group, start, stop in pieces], dim=2).transpose(1, 2)

    joined: Node = inline(point, join, *outs)
    return joined
