"""Translate a pulled-back mask into the mask language: ``j <= i`` is ``causal``, and a lookup at ``(b, j)`` is ``padding``."""

from __future__ import annotations

from functools import reduce
from typing import Any, NamedTuple

import sympy
import torch

from sparse_compile.masks import (
    Captured,
    Mask,
    causal,
    chunked,
    coarse,
    dilated,
    document,
    documents,
    explicit,
    full,
    of_queries,
    padding,
    periodic,
    prefix,
    repeated,
    shifted,
    sink,
    sliding_window,
    strided,
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
        return self._compared(self._to_positions(relation.gap), relation.equal)

    def _compared(self, gap: sympy.Expr, equal: bool) -> Mask:
        """``gap >= 0``, or ``gap == 0`` if ``equal``, over positions or over the numbers of tiles."""
        around = self._around(gap, equal)
        if around is not None:
            return around
        if equal:
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
        last, first = sympy.expand(gap + QUERY), sympy.expand(QUERY - gap)
        if last.is_Integer:  # i <= last
            return of_queries(sink(int(last) + 1)) if last >= 0 else ~full
        if first.is_Integer:  # i >= first
            return ~of_queries(sink(int(first))) if first > 0 else full
        return self._by_cases(gap)

    def _by_cases(self, gap: sympy.Expr) -> Mask:
        """``gap >= 0`` with a minimum, a maximum or a distance among its terms: all, or one, of two comparisons without it."""
        for term in sorted(gap.atoms(sympy.Max, sympy.Min, sympy.Abs), key=sympy.default_sort_key):
            rest = sympy.expand(gap - term), sympy.expand(gap + term)
            added = not rest[0].has(term)
            if not added and rest[1].has(term):
                continue  # it has another factor
            sides = (term.args[0], -term.args[0]) if isinstance(term, sympy.Abs) else term.args
            cases = [self._relation_of(rest[0] + side if added else rest[1] - side) for side in sides]
            one = added != isinstance(term, sympy.Min)  # a + max(x, y) >= 0 needs one of the two, and a - max(x, y) >= 0 both
            return reduce(lambda a, b: a | b if one else a & b, cases)
        raise NotLiftable(f"a mask compares {gap} with 0, which no pattern expresses")

    def _relation_of(self, gap: sympy.Expr) -> Mask:
        gap = sympy.expand(gap)
        return (full if gap >= 0 else ~full) if gap.is_number else self._compared(gap, equal=False)

    def _around(self, gap: sympy.Expr, equal: bool) -> Mask | None:
        """The mask of ``gap`` if it reads queries and keys only as ``i // n`` and ``j // m``, or both modulo n; else None."""
        parts = [term for term in gap.atoms(sympy.floor, sympy.Mod) if term.has(QUERY, KEY)]
        if len(parts) == 1 and parts[0].has(QUERY) and parts[0].has(KEY):
            return self._of_distance(gap, parts[0], equal)
        known = [_part_of(term) for term in parts]
        if equal and len(known) == 1 and known[0] is not None and not known[0].is_tile:
            return _every(known[0], gap)
        number, free = sympy.Dummy("i"), sympy.Dummy("j")
        inner = gap.subs({part.term: number if part.axis == QUERY else free for part in known if part is not None})
        if not known or None in known or len({part.axis for part in known if part}) != len(known):
            return None
        sizes = {part.axis: part for part in known if part is not None}
        kinds = {part.is_tile for part in sizes.values()}
        if len(kinds) > 1 or any(inner.has(axis) and axis in sizes for axis in (QUERY, KEY)):
            return None
        if kinds == {False} and (any(inner.has(axis) for axis in (QUERY, KEY)) or len({x.size for x in sizes.values()}) > 1):
            return None
        query, key = sizes.get(QUERY), sizes.get(KEY)
        mask = self._compared(sympy.expand(inner.subs({number: QUERY, free: KEY})), equal)
        if kinds == {True} and mask == chunked(1) and query and key and query.size == key.size:
            return chunked(key.size)
        if kinds == {True}:
            return coarse(mask, q=query.size if query else 1, kv=key.size if key else 1)
        offsets = {"q": -query.offset if query else 0, "kv": -key.offset if key else 0}
        once = repeated(mask, next(iter(sizes.values())).size)
        return shifted(once, **offsets) if any(offsets.values()) else once

    def _of_distance(self, gap: sympy.Expr, term: sympy.Expr, equal: bool) -> Mask | None:
        """The mask of ``(i - j) % n == 0`` or ``(i - j) % n <= last``; None for another one."""
        if not isinstance(term, sympy.Mod) or term.args[0] not in (QUERY - KEY, KEY - QUERY) or not term.args[1].is_Integer:
            return None
        distance, size = term.args
        if equal and gap in (term, -term):
            return periodic(chunked(1), int(size))
        last = sympy.expand(gap + term)
        if equal or not last.is_Integer or last < 0:
            return None
        return periodic(causal & sliding_window(int(last) + 1), int(size)) if distance == QUERY - KEY else None

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
        if gap in (QUERY - KEY, KEY - QUERY):
            return chunked(1)
        for axis in (QUERY, KEY):
            at = sympy.expand(gap + axis) if sympy.expand(gap + axis).is_Integer else sympy.expand(axis - gap)
            if at.is_Integer:
                here = ~full if at < 0 else sink(int(at) + 1) & ~sink(int(at)) if at > 0 else sink(1)
                return here if axis == KEY else of_queries(here)
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
            return self._same_id(floors)
        raise NotLiftable(f"a mask compares {gap} with 0, which no pattern expresses")

    def _same_id(self, terms: list[sympy.Expr]) -> Mask:
        """``ids[b, i] == ids[b, j]``, of one tensor or of two. Raises ``NotLiftable`` for other terms."""
        read = {term.args[-1]: (self.pull.atoms.node(term), term.args) for term in terms if term.args}
        (query, q_at), (key, k_at) = (read.get(axis, (None, ())) for axis in (QUERY, KEY))
        leads = {at[:-1] for at in (q_at, k_at)}
        if query is None or key is None or not leads <= {(BATCH,), (sympy.Integer(0),), ()}:
            raise NotLiftable(f"a mask compares {terms[0]} with {terms[1]}, which no pattern expresses")
        q_ids = self.capture(Element(query, q_at), (BATCH, QUERY))
        return document(q_ids) if query is key else documents(q_ids, self.capture(Element(key, k_at), (BATCH, KEY)))

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


class _Part(NamedTuple):
    """A term that reads one axis: the number of its tile, or ``(axis + offset) % size``."""

    term: sympy.Expr
    axis: sympy.Symbol
    size: int
    is_tile: bool
    offset: int = 0


def _part_of(term: sympy.Expr) -> _Part | None:
    """The part of ``i // n`` or ``(i + c) % n``, and of the same for ``j``; None for other terms."""
    axis = QUERY if term.has(QUERY) else KEY
    if isinstance(term, sympy.floor):
        size = sympy.simplify(axis / term.args[0])
        return _Part(term, axis, int(size), True) if size.is_Integer and size > 0 else None
    inner, size = term.args
    offset = sympy.expand(inner - axis)
    known = size.is_Integer and size > 0 and offset.is_Integer
    return _Part(term, axis, int(size), False, int(offset) % int(size)) if known else None


def _every(part: _Part, gap: sympy.Expr) -> Mask | None:
    """The mask of ``(j + c) % n == rest``, or of the same for ``i``; None if ``gap`` has other terms."""
    rest = sympy.expand(part.term - gap) if sympy.expand(part.term - gap).is_Integer else sympy.expand(part.term + gap)
    if not rest.is_Integer:
        return None
    seen = strided(part.size, offset=(int(rest) - part.offset) % part.size) if 0 <= rest < part.size else ~full
    return seen if part.axis == KEY else of_queries(seen)


def _look_ahead(distance: int) -> Mask:
    """``j <= i + distance``."""
    if distance == 0:
        return causal
    return causal | dilated(distance + 1, 1) if distance > 0 else ~sliding_window(-distance)
