"""Assign the mask of the policy to every attention call."""

from __future__ import annotations

from dataclasses import replace

from sparse_compile.masks import Mask, full
from sparse_compile.masks.patterns.per_head import unions_by_kv_head
from sparse_compile.masks.selection.budget import check_budget, check_pages
from sparse_compile.masks.selection.page_topk import has_selector, selector_of
from sparse_compile.passes.choose.check_heads import check_heads
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_nodes import hint_of
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.rewrite import Rewrite
from sparse_compile.passes.ops.block_tables import BLOCK
from sparse_compile.passes.torch_private import real_tensors


def assign_policy(rewrite: Rewrite) -> int:
    """Assign the mask of the policy to every call. The model's own mask still applies as well.

    Beside a text decoder, attention in both directions is that of an encoder, such as a vision tower. A policy is for the
    decoder, and reaches an encoder by the path of its modules only.

    Returns the number of calls that got a mask. Raises ``Refused`` for a mask that was written for other heads, and
    ``ValueError`` for a ``page_topk`` that no prefill can follow.
    """
    has_decoder = rewrite.has_decoder or any(_decodes(call) for call in rewrite.calls)
    rewrite.keep([_with_policy(call, rewrite, has_decoder) for call in rewrite.calls])
    return sum(call.policy != full for call in rewrite.calls)


def _decodes(call: Attention) -> bool:
    return call.is_self_attention and call.phase != "other"


def _with_policy(call: Attention, rewrite: Rewrite, has_decoder: bool) -> Attention | Left:
    if not (has_decoder and call.is_self_attention and call.phase == "other"):
        return _assigned(call, rewrite.assign(call, by_path=False), rewrite.model_heads)
    assigned = _assigned(call, rewrite.assign(call, by_path=True))
    if isinstance(assigned, Left) or assigned.has_policy or rewrite.assign(call, by_path=False) in (None, full):
        return assigned
    return replace(call, note="an encoder beside a text decoder: the policy reaches it by the path of its modules only")


def _assigned(call: Attention, mask: Mask | None, model_heads: tuple[int, int] | None = None) -> Attention | Left:
    if mask is None or mask == full:
        return call
    if not call.is_self_attention:
        return replace(call, note="cross-attention: no policy applies, because its keys are not in the text of the queries")
    if call.unplaced:
        return Left(call.node, f"{call.unplaced}, and a policy needs their positions")
    check_heads(call, mask, model_heads)
    if call.phase != "decode" and has_selector(mask):
        _check_selectors(call, mask)
    return replace(call, policy=mask)


def _check_selectors(call: Attention, mask: Mask) -> None:
    """Raise ``ValueError`` for a selector whose pages or budget do not work in a prefill."""
    for whole in unions_by_kv_head(mask, call.heads, call.kv_heads):
        selector = selector_of(whole)
        if selector is not None:
            check_pages(selector, BLOCK, prefill=True)
            with real_tensors():
                check_budget(selector, whole, hint_of(call.kv_len))
