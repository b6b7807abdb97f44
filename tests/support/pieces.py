"""Compile models in pieces and as a whole, with pieces that run uncompiled and are recorded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from torch.fx import GraphModule

from sparse_compile.passes import compile_graph
from sparse_compile.passes.inner_compiler import Compiled
from sparse_compile.passes.pieces.cut import Whole


class Recorder:
    """The graphs that reach Inductor, and why graphs were not cut. The graphs run uncompiled."""

    def __init__(self) -> None:
        self.compiled: list[GraphModule] = []
        self.whole: list[str] = []

    def compile(self, gm: GraphModule, inputs: Sequence[Any], **options: Any) -> Compiled:
        self.compiled.append(gm)
        return Compiled(gm.forward)

    @property
    def calls(self) -> int:
        """The number of attention calls in all graphs that were compiled."""
        nodes = (node for gm in self.compiled for node in gm.graph.nodes)
        return sum(node.op == "call_module" and "Attention" in type(_module(node)).__name__ for node in nodes)


def _module(node: Any) -> Any:
    return node.graph.owning_module.get_submodule(node.target)


@contextmanager
def recorded(*, cut: bool = True) -> Iterator[Recorder]:
    """Record what Inductor would compile. Without ``cut``, every graph stays whole."""
    recorder, in_pieces = Recorder(), compile_graph._in_pieces

    def tried(*args: Any) -> Any:
        try:
            if not cut:
                raise Whole("the test wants it whole")
            return in_pieces(*args)
        except Whole as why:
            recorder.whole.append(str(why))
            raise

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_graph, "compile_inner", recorder.compile)
        patch.setattr(compile_graph, "_in_pieces", tried)
        yield recorder
