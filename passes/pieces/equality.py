"""Decide whether two pieces of a graph are equal, so that one compiled function can run both.

A false "equal" would be silently wrong. Two values that this file does not understand are therefore equal only if they are the
same object.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from sparse_compile.passes.ir.fx_nodes import expr_of
from sparse_compile.passes.ops.block_tables import KV_START, Q_START
from sparse_compile.passes.storage.graph_text import to_text
from sparse_compile.passes.torch_private import storage_id

CONSTANTS = (bool, int, str, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout, torch.memory_format)


def piece_key(gm: GraphModule, inputs: Sequence[Any]) -> Hashable:
    """Return a value that only pieces share which compute the same from inputs of the same kind.

    It holds the ops with their constants, the contents of modules, and of every input what a compiler may rely on: shape,
    strides and offset with their symbols, dtype, device, and which inputs share memory. ``inputs`` are the fake inputs.
    """
    numbers = {node: number for number, node in enumerate(gm.graph.nodes)}
    modules = dict(gm.named_children())
    nodes = tuple(
        (node.op, _target(node, modules), _argument(node.args, numbers), _argument(node.kwargs, numbers))
        for node in gm.graph.nodes
        if node.op != "placeholder"
    )
    storages = [storage_id(x) if isinstance(x, Tensor) else None for x in inputs]
    return nodes, tuple((_kind(x), storages.index(at)) for x, at in zip(inputs, storages, strict=True))


def _kind(value: Any) -> Hashable:
    if not isinstance(value, Tensor):
        return type(value).__name__, _size(value)
    sizes = tuple(_size(n) for n in (*value.shape, *value.stride(), value.storage_offset()))
    flags = value.requires_grad, value.is_conj(), value.is_neg(), value.is_inference()
    return type(value), value.dim(), sizes, value.dtype, value.device, value.layout, flags


def _size(value: Any) -> str:
    written: str = sympy.srepr(expr_of(value))
    return written


def _target(node: Node, modules: Mapping[str, nn.Module]) -> Hashable:
    """What a node calls: a method by its name, a function as itself, and a module by its contents."""
    if node.op != "call_module":
        return str(node.target) if isinstance(node.target, str) else _Same(node.target)
    module = modules[str(node.target)]
    fields = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    symbols: dict[str, str] = {name.name: name.name for name in (Q_START, KV_START)}
    return type(module), tuple((name, _content(value, symbols)) for name, value in sorted(fields.items()))


def _content(value: Any, symbols: dict[str, str]) -> Hashable:
    """A field of a module as text in which the tensors that it reads are numbered.

    In a module, their names only say which argument is which tensor, and the arguments come in the order of the names' first
    uses. Names differ between layers that each read a tensor of their own, such as the logits of attention sinks.
    """
    try:
        written = json.loads(to_text(value))
    except TypeError:  # no value that a graph may carry
        return _Same(value)
    return json.dumps(_numbered(written, symbols))


def _numbered(written: Any, symbols: dict[str, str]) -> Any:
    match written:
        case {"symbol": str(name), **rest} if not rest:
            return {"symbol": symbols.setdefault(name, f"tensor {len(symbols)}")}
        case dict():
            return {key: _numbered(item, symbols) for key, item in written.items()}
        case list():
            return [_numbered(item, symbols) for item in written]
        case _:
            return written


def _argument(value: Any, numbers: Mapping[Node, int]) -> Hashable:
    match value:
        case Node():
            return "node", numbers[value]
        case float():
            return "float", value.hex()  # 0.0 is not -0.0, and nan is nan
        case tuple() | list():
            kind = "list" if isinstance(value, list) else "tuple"
            return kind, tuple(_argument(item, numbers) for item in value)
        case dict():
            return "dict", tuple((_argument(k, numbers), _argument(v, numbers)) for k, v in value.items())
        case slice():
            return "slice", *(_argument(part, numbers) for part in (value.start, value.stop, value.step))
        case _ if isinstance(value, CONSTANTS):
            return type(value).__name__, value
        case _:
            return _Same(value)


class _Same:
    """Equal only to the same object, which it keeps alive."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)
