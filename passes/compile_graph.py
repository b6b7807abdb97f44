"""Compile a rewritten graph: in pieces, so that equal layers are compiled once, or as a whole."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from sparse_compile.passes.inner_compiler import CUDA_GRAPHS, Compiled, compile_inner, needs_whole, records_cuda_graphs
from sparse_compile.passes.ir.rewrite import Rewrite
from sparse_compile.passes.pieces.cut import Whole, cut
from sparse_compile.passes.pieces.record_steps import RecordedSteps, can_record, static_inputs
from sparse_compile.passes.pieces.run_pieces import run_pieces


def compile_graph(
    rewrite: Rewrite, inputs: Sequence[Any], *, inner: str, mode: str | None, config: dict[str, Any] | None
) -> Compiled:
    """Compile the graph of ``rewrite`` as ``compile_inner`` does, but each kind of layer once.

    Inductor takes seconds for every layer, and the layers of a model differ in their weights only. The graph is therefore cut
    at its layers, each distinct piece is compiled, and a run calls the pieces in order. A graph that cannot be cut is compiled
    as a whole.
    """
    try:
        return _in_pieces(rewrite, inputs, inner, mode, config)
    except Whole:
        return compile_inner(rewrite.gm, inputs, inner=inner, mode=mode, config=config)


def _in_pieces(
    rewrite: Rewrite, inputs: Sequence[Any], inner: str, mode: str | None, config: dict[str, Any] | None
) -> Compiled:
    if inner != "inductor":
        raise Whole("only Inductor takes long for every layer")
    if rewrite.target.gradients:
        # The backward pass of a piece would be a graph of its own too, and what is saved for it would pass between pieces.
        raise Whole("it has gradients")
    if reason := needs_whole(mode, config):
        raise Whole(reason)
    placeholders = list(rewrite.gm.graph.find_nodes(op="placeholder"))
    records = records_cuda_graphs(inputs, mode, config)
    if records:  # once around all pieces, because Inductor would record each piece of each layer
        if not (rewrite.cache_uses and can_record(placeholders)):
            raise Whole("Inductor records it as a CUDA graph")
        config = {**(config or {}), CUDA_GRAPHS: False}
    pieces = cut(rewrite.gm, [call.module for call in rewrite.calls])
    compiled: dict[Hashable, Compiled] = {}
    for piece in pieces:
        if piece.key not in compiled:
            compiled[piece.key] = compile_inner(piece.gm, piece.values, inner=inner, mode=mode, config=config)
    notes = [each.note for each in compiled.values() if each.note]
    run = run_pieces(rewrite.gm, pieces, [compiled[piece.key].run for piece in pieces])
    if records:
        run = RecordedSteps(run, static_inputs(placeholders))
    return Compiled(run, notes[0] if notes else "")
