"""The passes, in order: unfuse, read, lift, assign, keep, lower, clean. They work in place and account for every call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import reduce

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import GraphModule, Node

from sparse_compile.masks import Mask, causal, full
from sparse_compile.masks.budget import check_budget, check_pages
from sparse_compile.masks.selectors import has_selector, selector_of
from sparse_compile.passes.ancestry import is_self_attention
from sparse_compile.passes.cache_ops import SparseCacheError
from sparse_compile.passes.call import AttentionCall, Left, Refused
from sparse_compile.passes.graph import Order, erase_dead, hint_of, op_name
from sparse_compile.passes.kept_ops import in_one_launch
from sparse_compile.passes.kv import find_cache, keep
from sparse_compile.passes.lift import lift_call
from sparse_compile.passes.lower import lower_call
from sparse_compile.passes.parts import parts_of
from sparse_compile.passes.rewrite import Part, Pass, Rewrite, phase_of
from sparse_compile.passes.sdpa import read_sdpa
from sparse_compile.passes.spelled_out import read_spelled_out
from sparse_compile.passes.tables import BLOCK
from sparse_compile.passes.target import Target
from sparse_compile.passes.unfuse import unfuse_modules


def unfuse(rewrite: Rewrite) -> int:
    """Write out the fused modules of ``torch.nn`` around their attention, so that the next pass can read it."""
    return unfuse_modules(rewrite.gm)


def read_attention(rewrite: Rewrite) -> int:
    """Find every attention call and read it into an ``AttentionCall``."""
    results = _calls(rewrite.gm)
    for user, body in _bodies(rewrite.gm):
        results += [
            Left(call.node, f"inside {user}: the passes do not rewrite the bodies of such ops") for call in _calls(body)
        ]
    rewrite.keep(results)
    return 0


def _calls(gm: GraphModule) -> list[AttentionCall | Left]:
    order = Order(gm.graph)
    results: list[AttentionCall | Left] = []
    for node in gm.graph.nodes:
        name = op_name(node)
        if name == "scaled_dot_product_attention":
            results.append(read_sdpa(node, order))
        elif name in OPAQUE:
            results.append(Left(node, OPAQUE[name]))
        elif (found := read_spelled_out(node, order)) is not None:
            results.append(found)
    return results


def _bodies(gm: GraphModule) -> Iterator[tuple[str, GraphModule]]:
    """The graphs that higher-order ops such as activation checkpointing and ``torch.cond`` run, with the name of the op."""
    for node in gm.graph.nodes:
        body = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(body, GraphModule):
            yield op_name(next(iter(node.users), None)), body
            yield from _bodies(body)


def lift_masks(rewrite: Rewrite) -> int:
    """Recover the mask, the score mod and the positions of every call."""
    order = Order(rewrite.gm.graph)
    calls = [replace(call, is_self_attention=is_self_attention(call)) for call in rewrite.calls]
    rewrite.keep([find_cache(_settled(lift_call(call, order))) for call in calls])
    return 0


def _settled(call: AttentionCall | Left) -> AttentionCall | Left:
    """Attention that compares query and key positions is over one text, wherever its operands come from."""
    if isinstance(call, AttentionCall) and call.mask is not None and call.mask.implies(causal):
        return replace(call, is_self_attention=True)
    return call


def assign_policy(rewrite: Rewrite) -> int:
    """Give every call the mask that the policy has for it. The model's own mask stays a conjunct.

    Raises ``ValueError`` for a mask written for another number of heads.
    """
    results: list[AttentionCall | Left] = []
    for call in rewrite.calls:
        mask = rewrite.assign(call)
        if mask is None or mask == full:
            results.append(call)
        elif not call.is_self_attention:
            results.append(replace(call, policy_reason="cross-attention: its keys have no place in the text of the queries"))
        else:
            mask.for_heads(call.heads)  # a head count that fits neither query nor KV heads is an error now, not at run time
            if phase_of(call) != "decode":
                _check_selectors(call, mask)
            results.append(replace(call, policy=mask))
    rewrite.keep(results)
    return 0


def _check_selectors(call: AttentionCall, mask: Mask) -> None:
    """Raise ``ValueError`` for selectors that no prefill can follow."""
    group = call.heads // call.kv_heads
    for first in range(0, call.heads if has_selector(mask) else 0, group):
        whole = reduce(lambda a, b: a | b, dict.fromkeys(mask.for_head(h, call.heads) for h in range(first, first + group)))
        selector = selector_of(whole)
        if selector is not None:
            check_pages(selector, BLOCK, prefill=True)
            with unset_fake_temporarily(), torch.device("cpu"):
                check_budget(selector, whole, hint_of(call.size("k", 2)))


def keep_in_cache(rewrite: Rewrite) -> int:
    """Cut calls over a ``SparseCache`` into one for each way its heads are kept, and write the new tokens there.

    Raises ``Refused`` if the cache is used by anything but attention that was read, or does not fit the model.
    """
    try:
        rewrite.calls, rewrite.cache_uses = keep(rewrite.gm, rewrite.calls, rewrite.left, phase_of)
    except (SparseCacheError, ValueError) as error:
        raise Refused(error) from error
    for call in rewrite.calls:
        if not call.pieces and call.policy is not None and has_selector(call.policy) and phase_of(call) == "decode":
            raise Refused(
                SparseCacheError(
                    f"decode steps choose among the pages of a SparseCache, and {call.module or call.node.name} under "
                    f"{call.policy} has none: pass past_key_values=SparseCache(config, policy, max_length=...), or give decode "
                    "steps another mask with Policy(decode=...)"
                )
            )
    return sum(len(call.pieces) for call in rewrite.calls)


def lower_attention(rewrite: Rewrite) -> int:
    """Replace every call by a module that runs it, with tables shared between calls of equal mask and shape."""
    shared: dict[object, Node] = {}
    lowered: list[AttentionCall] = []
    for call in rewrite.calls:
        done: list[Part] = []
        outs: list[Node] = []
        for piece in call.pieces or (call,):
            parts = parts_of(piece, rewrite.target)
            run = parts_of(piece, Target(inner="eager")) if rewrite.dry else parts
            result = lower_call(rewrite.gm, piece, run, rewrite.target, shared)
            if isinstance(result, Left):
                rewrite.left.append(result)
                break
            done += parts
            outs.append(result)
            rewrite.replaced.append(piece.node)
        else:
            rewrite.parts[call.node] = done
            in_one_launch(call, outs)
            rewrite.replaced.append(call.node)
            lowered.append(call)
    rewrite.calls = lowered
    return len(lowered)


def remove_dead_code(rewrite: Rewrite) -> int:
    """Erase what the replaced calls alone needed: dense masks, repeated keys and values."""
    erased = erase_dead(rewrite.gm, rewrite.replaced)
    if rewrite.replaced:
        rewrite.gm.graph.lint()
        rewrite.gm.recompile()
    return erased


UNDERSTAND: tuple[Pass, ...] = (unfuse, read_attention, lift_masks, assign_policy)
REPLACE: tuple[Pass, ...] = (keep_in_cache, lower_attention, remove_dead_code)

OPAQUE = {
    "multi_head_attention_forward": "nn.MultiheadAttention is asked for its attention weights, or is unbatched or extended",
    "_native_multi_head_attention": "the fused inference path of nn.MultiheadAttention hides its attention",
    "_transformer_encoder_layer_fwd": "the fused inference path of nn.TransformerEncoderLayer gets nested tensors",
    "flex_attention": "FlexAttention written by the model",
    "_scaled_dot_product_flash_attention": "attention already lowered to a kernel: the pass came too late",
    "_scaled_dot_product_efficient_attention": "attention already lowered to a kernel: the pass came too late",
}


def run_passes(rewrite: Rewrite, between: Sequence[Pass] = ()) -> Rewrite:
    """Run all passes over the graph, in place; those of ``between`` once calls are understood and before they are replaced."""
    for run in (*UNDERSTAND, *between, *REPLACE):
        run(rewrite)
    return rewrite
