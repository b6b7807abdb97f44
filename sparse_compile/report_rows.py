"""Turn what the passes did to a graph into rows of the report."""

from __future__ import annotations

from sparse_compile.masks.selection.page_topk import has_selector
from sparse_compile.masks.unknown_tensors import without_symbols
from sparse_compile.passes.ir.attention_call import AttentionCall, Left
from sparse_compile.passes.ir.fx_nodes import hint_of, layer_index, module_path
from sparse_compile.passes.ir.rewrite import Rewrite, phase_of
from sparse_compile.passes.ops.block_tables import BLOCK
from sparse_compile.report import Site

NAMES = {
    "flash": "FlexAttention FLASH",
    "triton": "FlexAttention",
    "pages": "page attention",
    "cpp": "FlexAttention",
    "sdpa": "SDPA",
    "reference": "dense reference",
}


def describe(rewrite: Rewrite, graph: int) -> list[Site]:
    """One row per attention call, in the order of the graph."""
    rows = [_rewritten(call, rewrite, graph) for call in rewrite.calls] + [_left(call, graph) for call in rewrite.left]
    return rows


def _rewritten(call: AttentionCall, rewrite: Rewrite, graph: int) -> Site:
    assert call.mask is not None and call.positions is not None
    kernels = [part.kernel for part in rewrite.parts[call.node]]
    q_len, kv_len = call.size("q", 2), call.size("k", 2)
    at = call.positions
    mask = call.mask if call.policy is None else call.mask & call.policy
    start = hint_of(kv_len) - hint_of(q_len) if at.q_shift is not None or not at.q_start.is_Integer else int(at.q_start)
    estimates = call.policy is not None and has_selector(call.policy) and phase_of(call) != "decode"
    lossy = "lossy: blocks of queries choose keys by their mean (page_topk in a prefill)" if estimates else ""
    held, dense, tokens = call.cache_nbytes or ((), None, 0)
    return Site(
        module=call.module,
        layer=call.layer,
        phase=phase_of(call),
        q_len=str(q_len),
        kv_len=str(kv_len),
        model_mask=str(call.mask),
        policy_mask=str(call.policy) if call.policy is not None else "",
        kernel=" + ".join(dict.fromkeys(NAMES[kernel.name] for kernel in kernels)),
        action="sparse" if call.policy is not None else "exact",
        reason="; ".join(
            text for text in dict.fromkeys([call.policy_reason, lossy, *(kernel.why for kernel in kernels)]) if text
        ),
        graph=graph,
        score_mod=str(call.score_mod) if call.score_mod is not None else "",
        heads=call.heads,
        kv_heads=call.kv_heads,
        traced=(hint_of(q_len), hint_of(kv_len), start),
        kv_nbytes=sum(held) if held else None,
        kv_head_nbytes=held,
        kv_dense_nbytes=dense,
        kv_tokens=tokens,
        block=_block(call),
        mask=without_symbols(mask),
    )


def _block(call: AttentionCall) -> tuple[int, int]:
    """Which queries choose keys together, and by how many."""
    sizes = [piece.scored.selecting.page_size for piece in call.pieces if piece.scored is not None]
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
