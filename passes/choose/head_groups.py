"""Group the heads of a call by mask, so that each group runs the kernel that is fastest for it."""

from __future__ import annotations

from collections.abc import Sequence

from sparse_compile.masks import Mask
from sparse_compile.masks.captured import Captured
from sparse_compile.masks.patterns.per_head import PerHead
from sparse_compile.masks.patterns.tensor import Explicit
from sparse_compile.passes.choose.kernel_choice import choose_kernel
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.target import HeadGroup, K, Target

MOST_HEAD_GROUPS = 4  # in one call; each group compiles and launches a kernel of its own


def head_groups(call: Attention, target: Target, kernels: Sequence[K]) -> list[HeadGroup[K]]:
    """Return the head groups of ``call``: one group, unless the masks of heads differ in a prefill.

    Groups pay off because every head of a table costs as much as its densest head, and because a causal group needs no table.
    A decode step is never cut into groups, because its kernel reads a separate list for each KV head.
    """
    groups = _by_mask(call) if target.inner != "eager" and target.kernel != "reference" else {}
    if len(groups) > MOST_HEAD_GROUPS:
        groups = _merged(call, list(groups.values()), target, kernels)
    if len(groups) < 2:
        whole = call.of_heads(next(iter(groups.values()))) if groups else call
        return [HeadGroup(whole, choose_kernel(whole, target, kernels))]
    return [_group(call, heads, target, kernels) for heads in groups.values()]


def _group(call: Attention, heads: tuple[int, ...], target: Target, kernels: Sequence[K]) -> HeadGroup[K]:
    restricted = call.of_heads(heads)
    kv_heads = tuple(sorted({head // call.group for head in heads}))
    return HeadGroup(restricted, choose_kernel(restricted, target, kernels), heads, kv_heads)


def _by_mask(call: Attention) -> dict[Mask, tuple[int, ...]]:
    """The distinct masks and their query heads; empty if the call cannot be cut into groups."""
    if not any(isinstance(node, PerHead) for node in call.visible.walk()):
        return {}
    if call.is_step or call.score_mod is not None:
        return {}
    if any(isinstance(node, Explicit) and Captured.of(node.visible).is_symbol for node in call.visible.walk()):
        return {}  # the tensor of the graph may itself differ between heads
    groups = call.visible.head_groups(call.heads)
    kv_heads = [{head // call.group for head in heads} for heads in groups.values()]
    cuts_no_kv_head = sum(map(len, kv_heads)) == call.kv_heads
    return groups if cuts_no_kv_head else {}


def _merged(
    call: Attention, groups: Sequence[tuple[int, ...]], target: Target, kernels: Sequence[K]
) -> dict[Mask, tuple[int, ...]]:
    """Merge all groups that need a table into one group."""
    plain = [heads for heads in groups if not _group(call, heads, target, kernels).choice.kernel.reads_mask]
    rest = tuple(sorted(head for heads in groups if heads not in plain for head in heads))
    merged = [*plain, rest] if rest else plain
    return {call.of_heads(heads).visible: heads for heads in merged}
