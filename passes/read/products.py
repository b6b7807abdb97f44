"""Read the two products of attention: queries with keys, and weights with values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from sparse_compile.passes.ir.fx_nodes import argument, op_name, sizes_of
from sparse_compile.passes.read.contents import Unread
from sparse_compile.passes.read.operands import Operand, operand


@dataclass(frozen=True)
class Scores:
    """``node`` holds ``q @ k^T``, with ``q`` ``[*lead, Q, D]`` and ``k`` ``[*lead, KV, D]``.

    ``baddbmm`` also multiplies the product by ``alpha``, and adds ``beta * added``.
    """

    node: Node
    q: Operand
    k: Operand
    alpha: Any = 1
    added: Node | None = None
    beta: Any = 1


@dataclass(frozen=True)
class Output:
    """``node.permute(order)`` is ``weights @ v``, ``[*lead, Q, Dv]``."""

    node: Node
    weights: Node
    v: Operand
    order: tuple[int, ...]


def read_scores(node: Node) -> Scores:
    """Read the product that makes scores. Raises ``Unread`` for an einsum of another kind."""
    if op_name(node) == "einsum":
        return _scores_of_einsum(node)
    q, k = _factors(node)
    scores = Scores(node, operand(q), operand(k, transposed=True))
    if op_name(node) != "baddbmm":
        return scores
    added = argument(node, 0, "input")
    alpha, beta = node.kwargs.get("alpha", 1), node.kwargs.get("beta", 1)
    return Scores(node, scores.q, scores.k, alpha, added if beta != 0 else None, beta)


def read_output(node: Node, weights: frozenset[Node]) -> Output:
    """Read the product that consumes one of ``weights``. Raises ``Unread`` if that is not its left operand."""
    if op_name(node) == "einsum":
        return _output_of_einsum(node, weights)
    left, v = _factors(node)
    if left not in weights or v in weights or op_name(node) == "baddbmm":
        raise Unread(f"the attention weights are not the left operand of {op_name(node)}")
    value = operand(v)
    return Output(node, left, value, tuple(range(len(sizes_of(node)))))


def _factors(node: Node) -> tuple[Any, Any]:
    """The two factors of a product that is no einsum."""
    if op_name(node) == "baddbmm":
        return argument(node, 1, "batch1"), argument(node, 2, "batch2")
    second = {"matmul": "other", "bmm": "mat2", "mm": "mat2"}[op_name(node)]
    return argument(node, 0, "input"), argument(node, 1, second)


def _einsum(node: Node) -> tuple[list[str], str, list[Any]]:
    """The axes of both operands and of the result, one letter each, and the operands."""
    equation, *rest = node.args
    operands: list[Any] = list(rest[0]) if len(rest) == 1 and isinstance(rest[0], list | tuple) else list(rest)
    text = equation.replace(" ", "") if isinstance(equation, str) else ""
    for given in operands[:1] if text.count("...") == 3 else []:  # all three have the same further axes
        letters = len(text.partition(",")[0].replace("...", ""))
        text = text.replace("...", "ABCDE"[: max(len(sizes_of(given)) - letters, 0)])
    inputs, arrow, result = text.partition("->")
    axes = inputs.split(",")
    ranks = [len(sizes_of(x)) for x in operands]
    plain = (
        arrow
        and [len(x) for x in axes] == ranks
        and len(ranks) == 2
        and all(len(set(x)) == len(x) and x.isalpha() for x in (*axes, result))
    )
    if not plain:
        raise Unread(f"einsum {equation!r} is no product of two tensors with named axes")
    return axes, result, operands


def _scores_of_einsum(node: Node) -> Scores:
    (a, b), result, operands = _einsum(node)
    summed = set(a) & set(b) - set(result)
    lead, query, key = result[:-2], result[-2:-1], result[-1:]
    for (q, at_q), (k, at_k) in (((a, 0), (b, 1)), ((b, 1), (a, 0))):
        if len(summed) == 1 and set(q) == {*lead, query, *summed} and set(k) == {*lead, key, *summed}:
            channels = next(iter(summed))
            return Scores(
                node, _labelled(operands[at_q], q, lead + query + channels), _labelled(operands[at_k], k, lead + key + channels)
            )
    raise Unread(f"einsum {node.args[0]!r} is no product of queries with keys whose result ends in queries and keys")


def _output_of_einsum(node: Node, weights: frozenset[Node]) -> Output:
    (a, b), result, operands = _einsum(node)
    for (w, at_w), (v, at_v) in (((a, 0), (b, 1)), ((b, 1), (a, 0))):
        lead, query, key = w[:-2], w[-2:-1], w[-1:]
        channels = set(v) - {*lead, key}
        fits = len(channels) == 1 and set(v) == {*lead, key, *channels} and set(result) == {*lead, query, *channels}
        if fits and operands[at_w] in weights and operands[at_v] not in weights:
            (channel,) = channels
            order = tuple(result.index(axis) for axis in lead + query + channel)
            return Output(node, operands[at_w], _labelled(operands[at_v], v, lead + key + channel), order)
    raise Unread(f"einsum {node.args[0]!r} is no product of weights that end in queries and keys with values")


def _labelled(node: Any, axes: str, wanted: str) -> Operand:
    return Operand(operand(node).node, tuple(axes.index(axis) for axis in wanted))
