"""Packed texts: within one text, a comparison of positions is a comparison of places in the batch.

For packed texts, transformers compares ``position_ids[b, i]`` with ``position_ids[b, j]``, and shows pairs of one text only. A
text begins where a position is not one more than the position before it. Within a text, two positions are as far apart as their
places, so ``position_ids[b, j] <= position_ids[b, i]`` is ``j <= i`` there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch.fx import Node

from sparse_compile.passes.ir.fx_nodes import argument, memory_of, op_name, value_of
from sparse_compile.passes.lift.symbolic_element import BATCH, KEY, QUERY, Atoms, Relation, Value


def by_index(parts: Sequence[Value], atoms: Atoms) -> list[Value]:
    """The parts of a conjunction, with positions replaced by places in all parts that hold within a packed text."""
    texts = [at for part in parts if (at := _positions_of_texts(part, atoms)) is not None]
    return [_replaced(part, texts, atoms) for part in parts]


def _positions_of_texts(part: Value, atoms: Atoms) -> Node | None:
    """The positions whose texts ``part`` keeps apart, if it is ``texts[b, i] == texts[b, j]``; else None."""
    if not (isinstance(part, Relation) and part.equal):
        return None
    pair = _pair(part.gap, atoms)
    return None if pair is None else _counted(pair[0])


def _pair(gap: sympy.Expr, atoms: Atoms) -> tuple[Node, sympy.Expr, sympy.Expr] | None:
    """The tensor that ``gap`` reads at ``(b, i)`` and at ``(b, j)``, and these two terms; None if it reads anything else."""
    read = [term for term in gap.atoms(sympy.Function) if atoms.node(term) is not None]
    by_args = {term.args: term for term in read}
    if len(read) != 2 or set(by_args) != {(BATCH, QUERY), (BATCH, KEY)}:
        return None
    nodes = {atoms.node(term) for term in read}
    node = nodes.pop()
    return None if nodes or node is None else (node, by_args[BATCH, QUERY], by_args[BATCH, KEY])


def _counted(texts: Node) -> Node | None:
    """The positions from which ``(positions.diff(...) != 1).cumsum(-1)`` counts texts; None if ``texts`` is anything else."""
    chain: list[Node] = []
    step: Any = texts
    for name in ("cumsum", "ne", "diff"):
        if not (isinstance(step, Node) and op_name(step) == name):
            return None
        chain.append(step)
        step = step.args[0]
    count, new, change = chain
    last = (-1, len(value_of(texts).shape) - 1)
    by_place = argument(count, 1, "dim") in last and argument(change, 2, "dim", -1) in last
    first = argument(change, 3, "prepend")  # without it, a change would stand one place before its token
    has_first = isinstance(first, Node) and value_of(first).shape[-1] == 1
    one_step = argument(change, 1, "n", 1) == 1 and argument(change, 4, "append") is None and new.args[1:] == (1,)
    return memory_of(step) if isinstance(step, Node) and by_place and has_first and one_step else None


def _replaced(part: Value, texts: Sequence[Node], atoms: Atoms) -> Value:
    """The comparison ``part`` over places, if it reads positions of ``texts`` only in their difference."""
    if not isinstance(part, Relation) or part.equal:
        return part
    pair = _pair(part.gap, atoms)
    if pair is None or memory_of(pair[0]) not in texts:
        return part
    _, query, key = pair
    gap = sympy.expand(part.gap.subs(query, key + QUERY - KEY))
    return part if gap.has(key) else Relation(gap, part.equal)
