"""Check that the tensors of a policy fit the batch and the lengths of every call, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import GraphModule

from sparse_compile.masks import Mask
from sparse_compile.masks.selection.page_topk import offered
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_nodes import expr_of, value_of
from sparse_compile.passes.ir.kv_source import Cached
from sparse_compile.passes.ir.left import Refused
from sparse_compile.passes.ir.rewrite import Rewrite
from sparse_compile.passes.torch_private import real_tensors

Place = tuple[int, int | None]  # an input of the graph and an axis of it; without an axis, the input is the number


@dataclass
class ShapeCheck:
    """The check of one policy against sizes that are known when the graph runs.

    ``sizes`` are the batch, the queries, the keys and the position of the first query as expressions. ``places`` says where
    their symbols can be read. ``passed`` holds the values for which the check has passed.
    """

    policy: Mask
    heads: int
    sizes: tuple[sympy.Expr, ...]
    places: dict[sympy.Symbol, Place]
    passed: set[tuple[int, ...]] = field(default_factory=set)

    def __call__(self, inputs: Sequence[Any]) -> None:
        """Raise ``ValueError`` if the policy does not fit a run with these inputs."""
        values = tuple(int(inputs[n] if axis is None else inputs[n].shape[axis]) for n, axis in self.places.values())
        if values in self.passed:
            return
        known = dict(zip(self.places, values, strict=True))
        batch, q_len, kv_len, q_start = (int(size.subs(known)) for size in self.sizes)
        self.policy.check(batch, self.heads, q_len, kv_len, q_start)
        self.passed.add(values)


def check_shapes(rewrite: Rewrite) -> int:
    """Check every policy whose sizes are static; returns how many must be checked when the graph runs.

    Raises ``Refused`` for a policy whose tensors are too short, or were built for another batch.
    """
    for call in rewrite.calls:
        if all(captured.is_symbol for captured in call.policy.captures()):
            continue
        sizes = _sizes(call)
        symbols = sorted({symbol for size in sizes for symbol in size.free_symbols}, key=str)
        check = ShapeCheck(offered(call.policy), call.heads, sizes, _places(rewrite.gm, symbols))
        if len(check.places) < len(symbols):
            continue  # a size that depends on values; nothing is known before the graph runs
        if symbols:
            rewrite.checks.append(check)
            continue
        try:
            with real_tensors():
                check(())
        except ValueError as error:
            raise Refused(error) from error
    return len(rewrite.checks)


def _sizes(call: Attention) -> tuple[sympy.Expr, ...]:
    """The sizes that a policy must fit. Only the batch is checked over a cache, whose slots may exceed the text."""
    batch, at = expr_of(call.batch), call.positions
    if isinstance(call.kv, Cached):
        return batch, sympy.S.Zero, sympy.S.Zero, sympy.S.Zero
    q_start = sympy.S.Zero if at.q_shift is not None else at.q_start  # what the shift adds is known on the device only
    return batch, expr_of(call.q_len), sympy.expand(at.kv_start + expr_of(call.kv_len)), q_start


def _places(gm: GraphModule, symbols: Sequence[sympy.Symbol]) -> dict[sympy.Symbol, Place]:
    """Where the symbols can be read from the inputs of the graph."""
    places: dict[sympy.Symbol, Place] = {}
    inputs = [value_of(node) for node in gm.graph.nodes if node.op == "placeholder"]
    for number, value in enumerate(inputs):
        if isinstance(value, torch.SymInt):
            places.setdefault(value.node.expr, (number, None))
        for axis, size in enumerate(getattr(value, "shape", ())):
            places.setdefault(expr_of(size), (number, axis))
    return {symbol: places[symbol] for symbol in symbols if symbol in places}
