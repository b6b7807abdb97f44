"""Give every attention call the mask that the policy has for it."""

from __future__ import annotations

from dataclasses import replace

from sparse_compile.masks import Mask, full
from sparse_compile.masks.patterns.per_head import unions_by_kv_head
from sparse_compile.masks.selection.budget import check_budget, check_pages
from sparse_compile.masks.selection.page_topk import has_selector, selector_of
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_nodes import hint_of
from sparse_compile.passes.ir.rewrite import Rewrite
from sparse_compile.passes.ops.block_tables import BLOCK
from sparse_compile.passes.torch_private import real_tensors


def assign_policy(rewrite: Rewrite) -> int:
    """Give every call the mask that the policy has for it. The model's own mask stays a conjunct.

    Returns how many calls got one. Raises ``ValueError`` for a mask written for another number of heads.
    """
    rewrite.calls = [_assigned(call, rewrite.assign(call)) for call in rewrite.calls]
    return sum(call.policy != full for call in rewrite.calls)


def _assigned(call: Attention, mask: Mask | None) -> Attention:
    if mask is None or mask == full:
        return call
    if not call.is_self_attention:
        return replace(call, note="cross-attention: its keys have no place in the text of the queries")
    mask.for_heads(call.heads)  # a head count that fits neither query nor KV heads is an error now, not at run time
    if call.phase != "decode" and has_selector(mask):
        _check_selectors(call, mask)
    return replace(call, policy=mask)


def _check_selectors(call: Attention, mask: Mask) -> None:
    """Raise ``ValueError`` for selectors that no prefill can follow."""
    for whole in unions_by_kv_head(mask, call.heads, call.kv_heads):
        selector = selector_of(whole)
        if selector is not None:
            check_pages(selector, BLOCK, prefill=True)
            with real_tensors():
                check_budget(selector, whole, hint_of(call.kv_len))
