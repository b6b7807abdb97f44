"""Give every attention call the mask that the policy has for it."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

from sparse_compile.masks import Mask, full
from sparse_compile.masks.selection.budget import check_budget, check_pages
from sparse_compile.masks.selection.page_topk import has_selector, selector_of
from sparse_compile.passes.ir.attention_call import AttentionCall, Left
from sparse_compile.passes.ir.fx_nodes import hint_of
from sparse_compile.passes.ir.rewrite import Rewrite, phase_of
from sparse_compile.passes.ops.block_tables import BLOCK
from sparse_compile.passes.torch_private import real_tensors


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
            with real_tensors():
                check_budget(selector, whole, hint_of(call.size("k", 2)))
