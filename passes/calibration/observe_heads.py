"""Observe attention: sum up, for every head, where its weights go while a compiled graph runs.

The weights are computed again from queries and keys, one block of queries at a time, so no N x N matrix is ever held.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_emit import attach
from sparse_compile.passes.ir.fx_nodes import expr_of, hint_of
from sparse_compile.passes.ir.kv_source import Dense
from sparse_compile.passes.ir.left import Refused
from sparse_compile.passes.ir.rewrite import Rewrite
from sparse_compile.passes.ops.attention_stats import Look, Watch, add_weights
from sparse_compile.passes.ops.block_tables import tensor_names
from sparse_compile.passes.storage.graph_text import to_text
from sparse_compile.passes.torch_private import overload


def watch_attention(rewrite: Rewrite, *, look: Look, sums: Callable[[int, int, int], tuple[Tensor, Tensor]]) -> int:
    """Before every causal call of a layer, add the statistics of its heads to the tensors ``sums(layer, heads, keys)``.

    These tensors are float64: totals ``[Hq, len(STATISTICS), 2]`` and pages ``[Hq, pages, 2]``, each a sum and the number of
    queries in it. Returns the number of calls. Raises ``Refused`` for a call that continues a text, or whose weights depend on
    tensors other than queries and keys.
    """
    seen = 0
    for call in rewrite.calls:
        if call.phase != "prefill":
            continue
        try:
            _check(call)
            totals_and_pages = sums(call.layer or 0, call.heads, hint_of(call.kv_len))
        except ValueError as error:
            raise Refused(error) from error
        assert call.layer is not None and isinstance(call.kv, Dense)
        text = to_text(Watch(look, call.mask, call.score_mod, call.scale))
        names = []
        for name, tensor in zip(("totals", "pages"), totals_and_pages, strict=True):
            names.append(f"sparse_{name}_{call.layer}")
            attach(rewrite.gm, names[-1], tensor)
        with rewrite.gm.graph.inserting_before(call.node):
            totals, pages = (rewrite.gm.graph.get_attr(name) for name in names)
            rewrite.gm.graph.call_function(overload(add_weights), (call.q, call.kv.k, totals, pages, text))
        seen += 1
    return seen


def _check(call: Attention) -> None:
    where = call.name
    if call.layer is None:
        raise ValueError(f"{where} needs to be in a numbered layer, because a head is named by its layer and number")
    at = call.positions
    if expr_of(at.q_start) != 0 or expr_of(at.kv_start) != 0 or at.q_shift is not None:
        raise ValueError(f"{where} continues a text ({at}): observe whole texts, without a cache")
    captures = (*tensor_names(call.mask), *(call.score_mod.captures() if call.score_mod is not None else ()))
    if captures:
        raise ValueError(
            f"the attention of {where} reads {', '.join(str(c) for c in captures)} beside queries and keys: observe texts "
            "without padding, and models without learned biases or sinks"
        )
