"""Compute what every node of a rewritten graph returns, as tensors without memory, and which memory it writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import Argument, Target, map_arg

from sparse_compile.passes.ir.fx_emit import fake_mode_of
from sparse_compile.passes.ir.fx_nodes import is_in_place
from sparse_compile.passes.torch_private import flatten, storage_id, written_values

Values = dict[Node, Any]


def node_values(gm: GraphModule) -> Values:
    """Return the value of every node but the output.

    The passes replaced calls and did not write the metadata of what follows them, so the whole graph is computed again. Views
    share their storage with the tensor that they view.
    """
    inputs = [node.meta["example_value"] for node in gm.graph.nodes if node.op == "placeholder"]
    with fake_mode_of(gm.graph) as mode, torch.no_grad():
        run = _Record(gm, mode)
        run.run(*inputs)
    return run.values


class _Record(Interpreter):
    def __init__(self, gm: GraphModule, mode: Any) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: Values = {}
        self._mode = mode

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n.op != "output":
            self.values[n] = result
        return result

    def get_attr(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        # With dynamic lengths, a mode would otherwise invent symbols for the sizes of a constant, which no input explains.
        return self._mode.from_tensor(super().get_attr(target, args, kwargs), static_shapes=True)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, which may be nested."""
    return (leaf for leaf in flatten(value)[0] if isinstance(leaf, Tensor))


def memory_read(node: Node, values: Values) -> set[int]:
    """The storages of the tensors that are arguments of a node."""
    return {storage_id(x) for each in node.all_input_nodes for x in tensors_in(values[each])}


def memory_written(node: Node, values: Values) -> set[int]:
    """The storages that a node writes."""
    if not is_in_place(node):
        return set()
    args: Any = map_arg(node.args, values.__getitem__)
    kwargs: Any = map_arg(node.kwargs, values.__getitem__)
    written = written_values(node.target, args, kwargs)
    if written is None:  # a function or method, which writes its first argument or ``out``
        written = [*args[:1], kwargs.get("out")]
    return {storage_id(x) for x in tensors_in(written)}
