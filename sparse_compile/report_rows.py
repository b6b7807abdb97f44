"""Turn the result of the passes over a graph into rows of the report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparse_compile.masks import Mask
from sparse_compile.masks.head_shares import head_shares
from sparse_compile.masks.patterns.remapped import Remapped
from sparse_compile.masks.selection.page_topk import has_selector
from sparse_compile.masks.unknown_tensors import without_symbols
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_nodes import hint_of, layer_index, module_path
from sparse_compile.passes.ir.kv_source import Cached, Selected
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.rewrite import HeldBytes, Rewrite
from sparse_compile.passes.ir.target import HeadGroup
from sparse_compile.passes.ops.block_tables import BLOCK
from sparse_compile.report import Site


def site_rows(rewrite: Rewrite, graph: int, held: int | None) -> list[Site]:
    """Return one row for each attention call: the rewritten calls in the order of the graph, then those that were left.

    ``held`` is the number of tokens in the cache of the graph, if it has one and that is known.
    """
    rows = [_rewritten(call, rewrite, graph, held) for call in rewrite.calls] + [_left(call, graph) for call in rewrite.left]
    return rows


def _rewritten(call: Attention, rewrite: Rewrite, graph: int, held_tokens: int | None) -> Site:
    groups = rewrite.head_groups[call.node]
    choices = [group.choice for group in groups]
    held = rewrite.held.get(call.node, HeldBytes())
    q_len, kv_len = hint_of(call.q_len), hint_of(call.kv_len)
    estimates = has_selector(call.policy) and call.phase != "decode"
    lossy = "lossy: in a prefill, page_topk selects keys for blocks of queries, by their mean query" if estimates else ""
    reasons = dict.fromkeys([call.note, lossy, call.caveat, *(choice.why for choice in choices)])
    return Site(
        module=call.module,
        layer=call.layer,
        phase=call.phase,
        q_len=str(call.q_len),
        kv_len=str(call.kv_len),
        model_mask=str(call.mask),
        policy_mask=str(_as_given(call.policy)) if call.has_policy else "",
        policy_shares=head_shares(_as_given(call.policy), call.heads, call.kv_heads) if call.has_policy else "",
        kernel=" + ".join(dict.fromkeys(choice.kernel.title for choice in choices)),
        action="sparse" if call.has_policy else "exact",
        reason="; ".join(reason for reason in reasons if reason),
        graph=graph,
        score_mod=str(call.score_mod) if call.score_mod is not None else "",
        heads=call.heads,
        kv_heads=call.kv_heads,
        traced=(q_len, kv_len, _first_query(call, held_tokens)),
        kv_nbytes=sum(held.heads) if held.heads else None,
        kv_head_nbytes=held.heads,
        kv_dense_nbytes=held.dense,
        kv_tokens=held.tokens,
        block=_block(groups),
        refused=tuple(dict.fromkeys((refusal.kernel, refusal.reason) for choice in choices for refusal in choice.refused)),
        mask=without_symbols(call.mask & _as_given(call.policy)),
    )


def _as_given(policy: Mask) -> Mask:
    """The policy of a call as it was given, where the passes apply it at text positions."""
    return policy.mask if isinstance(policy, Remapped) else policy


def _first_query(call: Attention, held: int | None) -> int:
    """The position of the first query in the traced example; where it is not known, the queries are taken for the last ones.

    A decode step over a cache counts as one over a full cache, because its graph runs until the cache is full.
    """
    at = call.positions
    if isinstance(call.kv, Cached) and call.phase == "prefill" and held is not None:
        return held
    if at.q_shift is None and at.q_start.is_Integer:
        return int(at.q_start)
    return hint_of(call.kv_len) - hint_of(call.q_len)


def _block(groups: Sequence[HeadGroup[Any]]) -> tuple[int, int]:
    """The number of queries that select keys together, and the number of keys in a page."""
    sources = [group.call.kv for group in groups if group.call.chooses_pages]
    sizes = [kv.selection.page_size for kv in sources if isinstance(kv, Selected)]
    return (1, max(sizes)) if sizes else (BLOCK, BLOCK)


def _left(call: Left, graph: int) -> Site:
    path = module_path(call.node)
    return Site(
        module=path,
        layer=layer_index(path),
        phase="other",
        q_len="",
        kv_len="",
        model_mask="",
        policy_mask="",
        kernel="",
        action="left",
        reason=call.reason,
        graph=graph,
    )
