"""The operators ``&``, ``|`` and ``~`` as tree nodes, which keep the structure of a mask, and their simplification."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, ClassVar

from torch import Tensor

from sparse_compile.masks.bounds import Bounds
from sparse_compile.masks.captured import Captured
from sparse_compile.masks.intervals import Intervals
from sparse_compile.masks.mask import Index, Mask, view


@dataclass(frozen=True, repr=False)
class Full(Mask):
    """Every query sees every key."""

    name: ClassVar[str] = "full"

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        return kv_idx == kv_idx

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        everything = Intervals.everything(lo)
        return Bounds(everything, everything)

    def implied_by(self, other: Mask) -> bool:
        return True


@dataclass(frozen=True, repr=False, eq=False)
class And(Mask):
    """Show the pairs that all of ``masks`` show. Written ``a & b``; the order does not matter for equality."""

    masks: tuple[Mask, ...]
    name: ClassVar[str] = "and"
    tightness: ClassVar[int] = 2

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        visible = self.masks[0].__call__(b, h, q_idx, kv_idx)
        for mask in self.masks[1:]:
            visible = visible & mask.__call__(b, h, q_idx, kv_idx)
        return visible

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        bounds = self.masks[0].bounds(lo, hi)
        for mask in self.masks[1:]:
            bounds = bounds & mask.bounds(lo, hi)
        return bounds

    def children(self) -> tuple[Mask, ...]:
        return self.masks

    def rebuild(self, children: Sequence[Mask]) -> Mask:
        return both(*children)

    def implies(self, other: Mask) -> bool:
        return super().implies(other) or any(m.implies(other) for m in self.masks)

    def implied_by(self, other: Mask) -> bool:
        return all(other.implies(m) for m in self.masks)

    def text(self, tensor: Callable[[Captured], str]) -> str:
        return " & ".join(_inside(self, m, tensor) for m in self.masks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, And) and frozenset(self.masks) == frozenset(other.masks)

    def __hash__(self) -> int:
        return hash((And, frozenset(self.masks)))


@dataclass(frozen=True, repr=False, eq=False)
class Or(Mask):
    """Show the pairs that at least one of ``masks`` shows. Written ``a | b``; the order does not matter for equality."""

    masks: tuple[Mask, ...]
    name: ClassVar[str] = "or"
    tightness: ClassVar[int] = 1

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        visible = self.masks[0].__call__(b, h, q_idx, kv_idx)
        for mask in self.masks[1:]:
            visible = visible | mask.__call__(b, h, q_idx, kv_idx)
        return visible

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        bounds = self.masks[0].bounds(lo, hi)
        for mask in self.masks[1:]:
            bounds = bounds | mask.bounds(lo, hi)
        return bounds

    def children(self) -> tuple[Mask, ...]:
        return self.masks

    def rebuild(self, children: Sequence[Mask]) -> Mask:
        return either(*children)

    def implies(self, other: Mask) -> bool:
        return super().implies(other) or all(m.implies(other) for m in self.masks)

    def implied_by(self, other: Mask) -> bool:
        return any(other.implies(m) for m in self.masks)

    def text(self, tensor: Callable[[Captured], str]) -> str:
        return " | ".join(_inside(self, m, tensor) for m in self.masks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Or) and frozenset(self.masks) == frozenset(other.masks)

    def __hash__(self) -> int:
        return hash((Or, frozenset(self.masks)))


@dataclass(frozen=True, repr=False)
class Not(Mask):
    """Show the pairs that ``mask`` hides. Written ``~a``."""

    mask: Mask
    name: ClassVar[str] = "not"
    tightness: ClassVar[int] = 3

    def __post_init__(self) -> None:
        selector = next((node for node in self.mask.walk() if node.selects), None)
        if selector is not None:
            raise ValueError(f"{selector} selects pages and cannot be negated: remove the ~")

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        visible = self.mask.__call__(b, h, q_idx, kv_idx)
        return not visible if isinstance(visible, bool) else ~visible

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        return ~self.mask.bounds(lo, hi)

    def children(self) -> tuple[Mask, ...]:
        return (self.mask,)

    def rebuild(self, children: Sequence[Mask]) -> Mask:
        return ~children[0]

    def implies(self, other: Mask) -> bool:
        if isinstance(self.mask, Full):
            return True
        return super().implies(other) or (isinstance(other, Not) and other.mask.implies(self.mask))

    def __invert__(self) -> Mask:
        return self.mask

    def text(self, tensor: Callable[[Captured], str]) -> str:
        return f"~{_inside(self, self.mask, tensor)}"


@view
def negated(mask: Mask) -> Mask:
    """Return ``~mask``."""
    return Not(mask)


full = Full()
nothing = ~full


def conjuncts(mask: Mask) -> tuple[Mask, ...]:
    """Return the masks that ``mask`` is the conjunction of; ``mask`` itself if it is none."""
    return mask.masks if isinstance(mask, And) else (mask,)


@view
def both(*masks: Mask) -> Mask:
    """Return the simplified conjunction: masks that another one implies are dropped, so that printed masks stay readable."""
    return _combine(And, masks, dropped_by=lambda a, b: b.implies(a), absorbing=nothing)


@view
def either(*masks: Mask) -> Mask:
    """Return the simplified disjunction: masks that imply another one are dropped."""
    return _combine(Or, masks, dropped_by=lambda a, b: a.implies(b), absorbing=full)


def union(masks: Iterable[Mask]) -> Mask:
    """Return the union of several masks. Equal masks count once."""
    return reduce(lambda a, b: a | b, dict.fromkeys(masks))


def _combine(
    node: type[And] | type[Or],
    masks: Sequence[Mask],
    *,
    dropped_by: Callable[[Mask, Mask], bool],
    absorbing: Mask,
) -> Mask:
    def joined(parts: Sequence[Mask]) -> Mask:
        return parts[0] if len(parts) == 1 else node(tuple(parts))

    flat = [part for mask in masks for part in (mask.masks if isinstance(mask, node) else (mask,))]
    if absorbing in flat:
        return absorbing
    kept = dict(enumerate([part for part in flat if part != ~absorbing] or [~absorbing]))
    # Of masks that imply each other, the largest tree goes first, so that the order of operands does not matter.
    for at, part in sorted(kept.items(), key=lambda item: (sum(1 for _ in item[1].walk()), item[0]), reverse=True):
        others = [other for place, other in kept.items() if place != at]
        if others and dropped_by(part, joined(others)):
            del kept[at]
    whole = joined(list(kept.values()))
    if any(isinstance(part, Not) and dropped_by(part.mask, whole) for part in kept.values()):
        return absorbing  # for a & ~a and a | ~a
    return whole


def _inside(node: Mask, child: Mask, tensor: Callable[[Captured], str]) -> str:
    """Write a child inside an operator, in parentheses unless it binds more tightly."""
    written = child.text(tensor)
    return f"({written})" if child.tightness <= node.tightness else written
