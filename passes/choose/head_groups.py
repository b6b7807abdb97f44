"""Cut a call into groups of heads that see the same, so that each group runs the kernel that is fastest for it."""

from __future__ import annotations

from sparse_compile.masks import Mask, per_head
from sparse_compile.masks.captured import Captured
from sparse_compile.masks.patterns.per_head import PerHead
from sparse_compile.masks.patterns.tensor import Explicit
from sparse_compile.passes.choose.kernel_choice import choose_kernel
from sparse_compile.passes.ir.attention_call import AttentionCall, is_decode_step
from sparse_compile.passes.ir.rewrite import Part
from sparse_compile.passes.ir.target import Kernel, Target

MOST_GROUPS = 4  # of one call: each is a kernel of its own to compile and launch


def parts_of(call: AttentionCall, target: Target) -> list[Part]:
    """The parts of ``call``: one, unless heads differ in a prefill.

    A table costs per head what the densest head costs, and a dense causal group needs none at all. A decode step stays whole:
    its kernel follows each KV head's own list.
    """
    assert call.mask is not None
    mask = call.mask if call.policy is None else call.mask & call.policy
    groups = _groups(call, mask) if target.inner != "eager" and target.kernel != "reference" else {}
    if len(groups) == 1:
        mask = next(iter(groups))
    if len(groups) < 2:
        return [Part(mask, choose_kernel(call, mask, target))]
    chosen = {mask: choose_kernel(call, mask, target) for mask in groups}
    if len(groups) > MOST_GROUPS:
        groups = _merged(call, groups, chosen)
        chosen = {mask: choose_kernel(call, mask, target) for mask in groups}
    if len(groups) < 2:
        return [Part(mask, chosen[next(iter(groups))])]
    group = call.heads // call.kv_heads
    kv_heads = [tuple(sorted({head // group for head in heads})) for heads in groups.values()]
    return [Part(mask, chosen[mask], heads, kv) for (mask, heads), kv in zip(groups.items(), kv_heads, strict=True)]


def _groups(call: AttentionCall, mask: Mask) -> dict[Mask, tuple[int, ...]]:
    """The distinct masks and their query heads; empty where the call cannot be cut into them."""
    if not any(isinstance(node, PerHead) for node in mask.walk()):
        return {}
    if is_decode_step(call) or call.score_mod is not None:
        return {}
    if any(isinstance(node, Explicit) and Captured.of(node.visible).is_symbol for node in mask.walk()):
        return {}  # a tensor of the graph that may differ between heads itself
    groups = mask.head_groups(call.heads)
    size = call.heads // call.kv_heads
    whole = all(set(range(h // size * size, h // size * size + size)) <= set(heads) for heads in groups.values() for h in heads)
    return groups if whole else {}


def _merged(
    call: AttentionCall, groups: dict[Mask, tuple[int, ...]], chosen: dict[Mask, Kernel]
) -> dict[Mask, tuple[int, ...]]:
    """The same with all groups that need a table in one."""
    merged = {mask: heads for mask, heads in groups.items() if chosen[mask].name == "sdpa"}
    rest = {head: mask for mask, heads in groups.items() if mask not in merged for head in heads}
    if rest:
        merged[per_head([rest[head] for head in sorted(rest)])] = tuple(sorted(rest))
    return merged
