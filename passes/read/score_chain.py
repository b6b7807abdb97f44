"""Walk from a softmax back to the product of queries and keys, and collect what is done to the scores on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from sparse_compile.passes.ir.fx_nodes import Order, argument, hint_of, is_one, op_name, sizes_of, value_of
from sparse_compile.passes.ir.scalars import CASTS, number
from sparse_compile.passes.read.contents import Unread, content, operation
from sparse_compile.passes.read.operands import VIEWS, same
from sparse_compile.passes.read.products import Scores, read_scores
from sparse_compile.passes.read.softmax_sites import PRODUCTS, leads_to_product

# Hiding keys with a larger number than this would be no mask, but a bias.
HIDDEN = -1e4


Kind = Literal["scale", "tanh", "clamp", "add", "hide"]
# After these, the same number added to all scores of a query makes a difference.
BENDS = ("tanh", "clamp")


@dataclass(frozen=True)
class Change:
    """One change to scores with ``rank`` axes, at the node ``at``.

    ``scale`` multiplies by ``factor``, or by the tensor ``node`` (with ``unless``, it divides). ``add`` adds ``factor * node``.
    ``hide`` replaces scores by ``factor`` where ``node`` is true (with ``unless``, where it is false). ``clamp`` cuts scores
    off below ``factor`` and above ``high``.
    """

    kind: Kind
    at: Node
    rank: int
    factor: float = 1.0
    node: Node | None = None
    unless: bool = False
    high: float = torch.inf


@dataclass
class Chain:
    """The changes between a product and its softmax, from the softmax backwards, and every tensor of scores on the way.

    ``has_least`` says that no score is -inf, because smaller ones were raised to the smallest float. ``is_bent`` says that the
    scores are bent behind the last node of the chain, in another chain.
    """

    order: Order
    changes: list[Change] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    has_least: bool = False
    is_bent: bool = False

    @property
    def bends(self) -> bool:
        """Whether the scores are bent on the way from here to the softmax."""
        return self.is_bent or any(change.kind in BENDS for change in self.changes)

    def walk(self, node: Any, at: Node) -> Scores:
        """Return the product that ``node``, as it is when ``at`` runs, comes from. Raises ``Unread``."""
        node = content(node, at, self.order)
        self.nodes.append(node)
        name = operation(node)
        if name in PRODUCTS:
            return self._product(node)
        if name in CASTS | {"clone", "detach"}:
            return self.walk(node.args[0], node)
        if name in VIEWS:
            return self._view(node)
        rule = RULES.get(name)
        if rule is None:
            raise unknown(node)
        return rule(self, node)

    def _product(self, node: Node) -> Scores:
        scores = read_scores(node)
        if scores.added is not None:
            self._note("add", node, factor=float(_known(scores.beta, node)), node=scores.added)
        if scores.alpha != 1:
            self._note("scale", node, factor=float(_known(scores.alpha, node)))
        return scores

    def _view(self, node: Node) -> Scores:
        """A view that keeps the axes of queries and keys, and only merges or splits the axes before them."""
        if not same(sizes_of(node)[-2:], sizes_of(node.all_input_nodes[0])[-2:]):
            raise unknown(node)
        return self.walk(node.args[0], node)

    def _note(self, kind: Kind, at: Node, **values: Any) -> None:
        self.changes.append(Change(kind, at, len(sizes_of(at)), **values))

    def _same_shape(self, node: Node, scores: Any) -> Any:
        """``scores``, if the result of ``node`` has their shape."""
        shapes = [tuple(hint_of(s) for s in sizes_of(x)) for x in (node, scores)]
        if shapes[0] != shapes[1]:
            raise Unread(f"{op_name(node)} broadcasts the scores to another shape")
        return scores


def unknown(node: Node) -> Unread:
    """The reason that names an operation on scores that is not understood."""
    return Unread(f"scores pass through {op_name(node) or node.name}, which the passes do not recognize")


def _known(value: Any, node: Node) -> float:
    known = number(value)
    if known is None:
        raise unknown(node)
    return known


def _tensor_of(node: Node, candidates: tuple[Any, ...]) -> Any:
    """The operand that leads back to a product."""
    for candidate in candidates:
        if isinstance(candidate, Node) and leads_to_product([candidate]):
            return candidate
    raise unknown(node)


def _scale(chain: Chain, node: Node) -> Scores:
    a, b = node.args[:2]
    name = operation(node)
    scores = a if name != "mul" else _tensor_of(node, (a, b))
    other = b if scores is a else a
    factor = number(other)
    chain._same_shape(node, scores)
    if factor is not None:
        chain._note("scale", node, factor=factor if name == "mul" else 1 / factor)
    elif isinstance(other, Node) and (
        not isinstance(value_of(other), Tensor) or not sizes_of(other) or is_one(sizes_of(other)[-1])
    ):
        chain._note("scale", node, node=other, unless=name != "mul")
    else:
        raise Unread(f"{op_name(node)} multiplies each score by another number: use a boolean mask, or scale queries or keys")
    return chain.walk(scores, node)


def _add(chain: Chain, node: Node) -> Scores:
    """A sum. The summand that leads back to a product is the scores; the other one is added to them."""
    sign = 1.0 if operation(node) == "add" else -1.0
    if node.kwargs.get("alpha", 1) != 1:
        raise unknown(node)
    pairs = (tuple(node.args[:2]), tuple(node.args[1::-1]))
    failed: Unread | None = None
    for scores, term in pairs if sign > 0 else pairs[:1]:
        if not isinstance(scores, Node) or not leads_to_product([scores]):
            continue
        if not isinstance(term, Node) or not isinstance(value_of(term), Tensor):
            return _shift(chain, node, scores, term)
        attempt = Chain(chain.order, is_bent=chain.bends)
        try:
            product = attempt.walk(chain._same_shape(node, scores), node)
        except Unread as reason:
            failed = failed or reason
            continue
        if sign > 0 or chain.bends or not is_maximum(term, scores):
            chain._note("add", node, factor=sign, node=term)
        chain.changes += attempt.changes
        chain.nodes += attempt.nodes
        chain.has_least |= attempt.has_least
        return product
    raise failed or unknown(node)


def _shift(chain: Chain, node: Node, scores: Node, term: Any) -> Scores:
    """A number added to every score, which changes no softmax. Below a soft cap or a clamp, it would."""
    if number(term) is None or (number(term) != 0 and chain.bends):
        raise unknown(node)
    return chain.walk(scores, node)


def is_maximum(node: Any, of: Node) -> bool:
    """Whether ``node`` is the maximum of ``of`` along its last axis. Subtracting it does not change a softmax."""
    while op_name(node) == "detach":
        node = node.args[0]
    if op_name(node) == "values" or (op_name(node) == "getitem" and node.args[1] == 0):
        node = node.args[0]
    last = (-1, len(sizes_of(of)) - 1)
    return op_name(node) in ("max", "amax") and node.args[0] is of and argument(node, 1, "dim") in last


def _hide(chain: Chain, node: Node) -> Scores:
    if len(node.args) != 3:
        raise unknown(node)
    hides = operation(node) == "masked_fill"
    if hides or node.op == "call_method":
        scores, condition, fill = node.args
    else:
        condition, scores, fill = node.args
    if not hides and number(scores) is not None:  # where(hidden, -inf, scores)
        scores, fill, hides = fill, scores, True
    filled = number(fill)
    if filled is None or filled > HIDDEN or not isinstance(condition, Node):
        raise unknown(node)
    chain._note("hide", node, factor=filled, node=condition, unless=not hides)
    return chain.walk(chain._same_shape(node, scores), node)


def _tanh(chain: Chain, node: Node) -> Scores:
    chain._note("tanh", node)
    return chain.walk(node.args[0], node)


def _clamp(chain: Chain, node: Node) -> Scores:
    """``max(scores, smallest)`` changes -inf only, which hides a key either way. Other ends change scores."""
    scores, name = node.args[0], operation(node)
    if name in ("clamp", "clip"):
        ends = argument(node, 1, "min"), argument(node, 2, "max")
    else:
        end = argument(node, 1, {"clamp_min": "min", "clamp_max": "max"}.get(name, "other"))
        ends = (end, None) if name in ("max", "maximum", "clamp_min") else (None, end)
    low, high = (side if end is None else _known(end, node) for end, side in zip(ends, (-torch.inf, torch.inf), strict=True))
    dtype = value_of(node).dtype if isinstance(value_of(node), Tensor) else torch.float64
    if not low < high:
        raise unknown(node)
    if high != torch.inf or low > torch.finfo(dtype).min:
        chain._note("clamp", node, factor=low, high=high)
    elif low != -torch.inf:
        chain.has_least = True
    return chain.walk(scores, node)


RULES: dict[str, Callable[[Chain, Node], Scores]] = {
    **dict.fromkeys(("mul", "div", "truediv"), _scale),
    **dict.fromkeys(("add", "sub"), _add),
    **dict.fromkeys(("masked_fill", "where"), _hide),
    "tanh": _tanh,
    **dict.fromkeys(("max", "maximum", "min", "minimum", "clamp", "clamp_min", "clamp_max", "clip"), _clamp),
}


def in_front(changes: list[Change]) -> list[Change]:
    """The changes from the product on, with scales before masks and biases: ``(s + b) * c`` becomes ``s * c + b * c``.

    Neighboring scales become one. A scale that cannot move stays: a tensor or a negative number after any other change, and a
    scale after a soft cap or a clamp of masked or biased scores.
    """
    done: list[Change] = []
    for change in changes:
        if change.kind != "scale":
            done.append(change)
            continue
        first = next((n for n, earlier in enumerate(done) if earlier.kind in ("add", "hide")), len(done))
        bent = [earlier.kind in BENDS or _stays(earlier) for earlier in done]
        moves = first < len(done) or any(bent)
        if any(bent[first:]) or (moves and _stays(change)):
            done.append(change)
            continue
        behind = [replace(b, factor=b.factor * change.factor) if b.kind == "add" else b for b in done[first:]]
        before = done[:first]
        if before and before[-1].kind == "scale" and before[-1].node is None is change.node:
            change = replace(change, factor=change.factor * before.pop().factor)
        done = [*before, change, *behind]
    return done


def _stays(change: Change) -> bool:
    """Whether a change is a scale that keeps its place among other changes."""
    return change.kind == "scale" and (change.node is not None or change.factor <= 0)
