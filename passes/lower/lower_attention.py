"""Replace every attention call by calls of the kernels that run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from sparse_compile.passes.choose.head_groups import head_groups
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_emit import fake_mode_of
from sparse_compile.passes.ir.fx_nodes import value_of
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.rewrite import Rewrite, StorageGroup
from sparse_compile.passes.ir.rows.head_slices import join_heads
from sparse_compile.passes.ir.target import HeadGroup, Target
from sparse_compile.passes.lower.kernel import Kernel
from sparse_compile.passes.lower.kernels import KERNELS
from sparse_compile.passes.lower.nodes.emitter import Emitter
from sparse_compile.passes.lower.nodes.scene import Scene, Shared

Group = HeadGroup[Kernel]


def lower_attention(rewrite: Rewrite) -> int:
    """Replace every call; returns how many were replaced. Calls with equal masks and shapes share their tables."""
    shared: Shared = {}
    lowered: list[Attention] = []
    for call in rewrite.calls:
        storage_groups = rewrite.storage_groups.get(call.node) or (StorageGroup(call, tuple(range(call.heads))),)
        chosen = [head_groups(group.call, rewrite.target, KERNELS) for group in storage_groups]
        run = [head_groups(group.call, Target(inner="eager"), KERNELS) for group in storage_groups] if rewrite.dry else chosen
        out = _lower(rewrite, call, storage_groups, run, shared)
        if isinstance(out, Left):
            rewrite.left.append(out)
            continue
        out.meta = dict(call.node.meta)
        call.node.replace_all_uses_with(out)
        rewrite.head_groups[call.node] = [group for groups in chosen for group in groups]
        rewrite.replaced.append(call.node)
        lowered.append(call)
    rewrite.calls = lowered
    return len(lowered)


def _lower(
    rewrite: Rewrite, call: Attention, storage_groups: Sequence[StorageGroup], run: Sequence[list[Group]], shared: Shared
) -> Node | Left:
    """Write the kernels of ``call``; returns its output, joined from the outputs of all head groups."""
    emitters: list[tuple[Emitter, Kernel, tuple[int, ...]]] = []
    for storage_group, groups in zip(storage_groups, run, strict=True):
        reads_mask = any(group.call.plain_form is None or group.choice.kernel.reads_mask for group in groups)
        scene = Scene.of(rewrite.gm, storage_group.call, rewrite.target, shared, reads_mask=reads_mask)
        if isinstance(scene, Left):
            return scene
        for group in groups:
            emitter = Emitter(scene, group.call, group.heads, group.kv_heads, realized=group.choice.kernel.realizes_captures)
            places = range(len(storage_group.heads)) if group.heads is None else group.heads
            emitters.append((emitter, group.choice.kernel, tuple(storage_group.heads[place] for place in places)))
    together = _together(emitters, call.q)
    if together is not None:
        return together
    outs: list[Node] = []
    for emitter, kernel, heads in emitters:
        out = kernel.lower(emitter.call, emitter)
        if isinstance(out, Left):
            return out
        _give_value(out, call.node, len(heads))
        outs.append(out)
    return outs[0] if len(outs) == 1 else join_heads(call.node, [heads for *_, heads in emitters], outs)


def _together(emitters: Sequence[tuple[Emitter, Kernel, tuple[int, ...]]], q: Node) -> Node | None:
    """The output of one launch for all groups; None if their kernels have no such launch."""
    kernels = {kernel for _, kernel, _ in emitters}
    if len(emitters) < 2 or len(kernels) > 1:
        return None
    return next(iter(kernels)).lower_together([emitter for emitter, *_ in emitters], q)


def _give_value(out: Node, like: Node, heads: int) -> None:
    """Give an output the example value that ``join_heads`` needs."""
    if "example_value" not in out.meta:
        with fake_mode_of(out.graph):
            value: Any = value_of(like)[:, :heads]
            out.meta["example_value"] = value
