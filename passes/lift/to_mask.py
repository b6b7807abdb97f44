"""Translate a pulled-back mask into the mask language: ``j <= i`` is ``causal``, and a lookup at ``(b, j)`` is ``padding``."""

from __future__ import annotations

from functools import reduce
from typing import Any

import sympy
import torch

from sparse_compile.masks import (
    Captured,
    Mask,
    causal,
    chunked,
    dilated,
    document,
    explicit,
    full,
    padding,
    prefix,
    sink,
    sliding_window,
)
from sparse_compile.passes.ir.captured_source import Source
from sparse_compile.passes.ir.fx_nodes import expr_of, value_of
from sparse_compile.passes.ir.positions import Positions
from sparse_compile.passes.lift.packed import by_index
from sparse_compile.passes.lift.pullback import Pullback
from sparse_compile.passes.lift.symbolic_element import (
    AXES,
    BATCH,
    KEY,
    QUERY,
    All,
    Element,
    Negation,
    Relation,
    Some,
    Truth,
    Value,
    Where,
    conjunction,
    disjunction,
    negation,
)
from sparse_compile.passes.ops.block_tables import KV_START, Q_START


class NotLiftable(Exception):
    """A part of a mask cannot be expressed in the mask language."""


class Words:
    """Translates the masks of one call. ``sources`` collects the tensors that they read, by name."""

    def __init__(self, pull: Pullback, positions: Positions, kv_len: Any) -> None:
        self.pull, self.positions, self.kv_len = pull, positions, kv_len
        self.sources: dict[str, Source] = {}

    def mask(self, value: Value) -> Mask:
        """The mask of ``value``. Raises ``NotLiftable`` if a part of it cannot be expressed in the mask language."""
        if isinstance(value, Truth):
            return full if value.value else ~full
        if isinstance(value, All):
            parts = by_index(value.parts, self.pull.atoms)
            # The report is easier to read with causal in front.
            masks = sorted((self.mask(part) for part in parts), key=lambda mask: mask != causal)
            return reduce(lambda a, b: a & b, masks)
        if isinstance(value, Some):
            return reduce(lambda a, b: a | b, [self.mask(part) for part in value.parts])
        if isinstance(value, Negation):
            return ~self.mask(value.part)
        if isinstance(value, Relation):
            return self._relation(value)
        if isinstance(value, Element):
            return self._lookup(value)
        if isinstance(value, Where):
            yes, no = conjunction([value.condition, value.yes]), conjunction([negation(value.condition), value.no])
            return self.mask(disjunction([yes, no]))
        raise NotLiftable("a mask is a number where a bool is needed")

    def _relation(self, relation: Relation) -> Mask:
        gap = self._to_positions(relation.gap)
        if relation.equal:
            return self._equality(gap)
        if not gap.has(QUERY, KEY, BATCH):
            raise NotLiftable(f"a mask depends on {gap} alone, and on no position of a query or key")
        distance = sympy.expand(gap - QUERY + KEY)
        if distance.is_Integer:  # j <= i + distance
            return _look_ahead(int(distance))
        distance = sympy.expand(gap + QUERY - KEY)
        if distance.is_Integer:  # j >= i - distance
            return sliding_window(int(distance) + 1) if distance >= 0 else ~_look_ahead(-int(distance) - 1)
        spread = sympy.expand(gap + sympy.Abs(QUERY - KEY))
        if spread.is_Integer:
            return dilated(int(spread) + 1, 1) if spread >= 0 else ~full
        last = sympy.expand(gap + KEY)
        if not last.has(QUERY, KEY):  # j <= last
            return self._up_to(last)
        first = sympy.expand(KEY - gap)
        if first.is_Integer:  # j >= first
            return ~sink(int(first)) if first > 0 else full
        raise NotLiftable(f"a mask compares {gap} with 0, which no pattern expresses")

    def _up_to(self, last: sympy.Expr) -> Mask:
        beyond = sympy.expand(last - self.positions.kv_start - expr_of(self.kv_len) + 1)
        if beyond.is_nonnegative:
            return full
        if last.is_Integer:
            return sink(int(last) + 1) if last >= 0 else ~full
        lengths = sympy.expand(last + 1)
        node = self.pull.atoms.node(lengths)
        if node is not None and lengths.args == (BATCH,):
            return prefix(self.capture(Element(node, (BATCH,)), (BATCH,)))
        raise NotLiftable(f"a mask shows keys up to {last}, which no pattern expresses")

    def _equality(self, gap: sympy.Expr) -> Mask:
        """``i // n == j // n``, ``ids[b, i] == ids[b, j]``, or ``valid[b, j] == 0``."""
        terms = sympy.Add.make_args(gap)
        alone = self.pull.atoms.node(abs(gap) if gap.is_number else -gap if gap.could_extract_minus_sign() else gap)
        if alone is not None and KEY in gap.atoms() and gap.atoms(sympy.Symbol) <= {BATCH, KEY}:
            args = (-gap if gap.could_extract_minus_sign() else gap).args
            if all(x == 0 or x in AXES for x in args):
                return ~padding(self.capture(Element(alone, args), (BATCH, KEY)))
        if len(terms) == 2:
            floors = [abs(t) if t.is_number else (-t if t.could_extract_minus_sign() else t) for t in terms]
            sides = {t.args[0] for t in floors if isinstance(t, sympy.floor)}
            for n in {sympy.fraction(side)[1] for side in sides}:
                if sides == {QUERY / n, KEY / n} and n.is_Integer:
                    return chunked(int(n))
            nodes = {self.pull.atoms.node(t) for t in floors}
            if len(nodes) == 1 and None not in nodes and {t.args for t in floors} == {(BATCH, QUERY), (BATCH, KEY)}:
                (node,) = nodes
                assert node is not None
                return document(self.capture(Element(node, (BATCH, QUERY)), (BATCH, QUERY)))
        raise NotLiftable(f"a mask compares {gap} with 0, which no pattern expresses")

    def _lookup(self, element: Element) -> Mask:
        at = tuple(self._to_positions(x) for x in element.index)
        axes = [x for x in at if x != 0]
        if value_of(element.node).dtype == torch.bool and KEY in axes and set(axes) <= {BATCH, KEY}:
            return padding(self.capture(Element(element.node, at), (BATCH, KEY)))
        if all(x == 0 or x in AXES for x in element.index):
            return self.explicit(element)
        raise NotLiftable(f"a mask reads {element.node.name} at {element.index}, which no pattern expresses")

    def explicit(self, element: Element) -> Mask:
        """The mask whose values are a tensor of the graph."""
        return explicit(self.capture(element), Q_START, KV_START)

    def capture(self, element: Element, layout: tuple[sympy.Symbol, ...] = AXES) -> Captured:
        """A symbol for the tensor that ``element`` reads, permuted to the axes of ``layout``; missing axes get size 1."""
        axes = [x for x in element.index if x != 0]
        if any(x not in layout for x in axes) or len(set(axes)) != len(axes):
            raise NotLiftable(f"a mask reads {element.node.name} at {element.index}, which are not axes of the scores")
        order = tuple(axes.index(axis) for axis in sorted(axes, key=AXES.index))
        drop = tuple(0 if x == 0 else slice(None) for x in element.index)
        add = tuple(slice(None) if axis in axes else None for axis in layout)
        source = Source(element.node, drop, order, add)
        name = element.node.name
        while self.sources.setdefault(name, source) != source:
            name += "_"
        return Captured.symbol(name)

    def _to_positions(self, expr: sympy.Expr) -> sympy.Expr:
        """``expr`` rewritten over text positions: in the result, ``i`` and ``j`` are positions instead of indices."""
        at = self.positions
        shift = self.pull.atoms.term(Element(at.q_shift, ())) if at.q_shift is not None else 0
        return sympy.expand(expr.subs({QUERY: QUERY - at.q_start - shift, KEY: KEY - at.kv_start}, simultaneous=True))


def _look_ahead(distance: int) -> Mask:
    """``j <= i + distance``."""
    if distance == 0:
        return causal
    return causal | dilated(distance + 1, 1) if distance > 0 else ~sliding_window(-distance)
