"""Read attention that a model writes as product, softmax and product (GPT-2, T5, Bloom, eager attention, MPT, gpt-oss)."""

from __future__ import annotations

import operator
from itertools import takewhile
from typing import Any

import torch
from torch.fx import Node

from sparse_compile.passes.ir.fx_emit import inline
from sparse_compile.passes.ir.fx_nodes import Order, argument, op_name, shape_of, value_of
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.scalars import fixed
from sparse_compile.passes.ir.score_steps import Add, Clamp, Hide, Scale, ScaleBy, Step, Tanh
from sparse_compile.passes.ir.written_call import Unseeing, WrittenCall
from sparse_compile.passes.read.contents import Unread
from sparse_compile.passes.read.four_axes import Axes, axes_of
from sparse_compile.passes.read.products import Output, Scores, read_output
from sparse_compile.passes.read.score_chain import Chain, Change, in_front
from sparse_compile.passes.read.sdpa import build_call
from sparse_compile.passes.read.softmax_sites import SOFTMAXES, Site
from sparse_compile.passes.read.weights_chain import Weights, split_sink


def read_spelled_out(site: Site, order: Order) -> WrittenCall | Left:
    """Read the attention around a softmax, or return the reason why it cannot be read."""
    consumer = site.consumers[0]
    try:
        if len(site.consumers) > 1:
            names = ", ".join(node.name for node in site.consumers)
            raise Unread(f"the attention weights are used by several products: {names}")
        return _read(site, consumer, order)
    except Unread as reason:
        return Left(consumer, str(reason))


def _read(site: Site, consumer: Node, order: Order) -> WrittenCall | Left:
    if op_name(site.softmax) not in SOFTMAXES:
        raise Unread("the softmax is written with exp, which the passes do not read: use softmax")
    output = read_output(consumer, site.way)
    weights = Weights(order)
    softmax = weights.walk(output.weights, consumer)
    chain, sink = Chain(order), None
    inner, at = argument(softmax, 0, "input"), softmax
    if weights.has_sink:
        inner, at, sink = split_sink(inner, softmax, order)
    scores = chain.walk(inner, at)
    _check(weights, chain, scores, consumer, order)
    return _build(output, scores, chain, sink, _unseeing(weights, chain))


def _check(weights: Weights, chain: Chain, scores: Scores, consumer: Node, order: Order) -> None:
    """Raise ``Unread`` for weights that are used elsewhere or zeroed, and for operands that are written before the output."""
    if others := weights.used_elsewhere(consumer):
        raise Unread(f"the attention weights are also used by {', '.join(others)}")
    hidden = [change.node for change in chain.changes if change.kind == "hide" and not change.unless]
    if any(condition not in hidden for condition in weights.zeroed):
        raise Unread("the attention weights pass through masked_fill, whose mask does not hide scores before the softmax")
    operands = [(scores.q.node, scores.node), (scores.k.node, scores.node)]
    operands += [(change.node, change.at) for change in chain.changes if change.node is not None]
    if any(order.written(node, since=since, until=consumer) for node, since in operands):
        raise Unread("its scores, weights or operands are overwritten in place before the output is computed")


def _build(output: Output, scores: Scores, chain: Chain, sink: Node | None, unseeing: Unseeing) -> WrittenCall | Left:
    """Write what the call needs as tensors with four axes, and read them as a call."""
    consumer = output.node
    heads = _heads(chain, consumer)
    axes = axes_of(scores.q, scores.k, heads=heads)
    steps = in_front(chain.changes[::-1])
    terms = {change: _term(change, axes, heads, scores.node, consumer) for change in steps if change.node is not None}
    values = axes.of_rank(len(output.v.order), heads)
    tensor = axes.tensor(consumer, scores.q)
    leading = list(takewhile(lambda change: change.kind == "scale", steps))
    for change in leading:
        if change in terms:
            tensor = _scaled(consumer, tensor, terms[change], inverse=change.unless)
    k, v = axes.tensor(consumer, scores.k), values.tensor(consumer, output.v)
    done = [_step(change, terms.get(change), consumer) for change in steps if change not in leading or change not in terms]
    node = values.result(consumer, output.order)
    read = {"score_steps": tuple(done), "sink": sink, "unseeing": unseeing, "in_parts": axes.lead == "batches"}
    return build_call(node, tensor, k, v, scale=1.0, order=Order(node.graph), **read)


def _scaled(point: Node, q: Node, factor: Node, *, inverse: bool) -> Node:
    """Queries times a factor of their scores, in the dtype of the queries."""
    dtype = value_of(q).dtype

    def scale(q: Any, factor: Any) -> Any:
        return (q / factor if inverse else q * factor).to(dtype)

    result: Node = inline(point, scale, q, factor)
    return result


def _unseeing(weights: Weights, chain: Chain) -> Unseeing:
    """What the model computes for a query that sees no key: a softmax of equal scores, or of nothing but -inf."""
    masks = [change for change in chain.changes if change.kind in ("add", "hide")]
    if weights.zeroed and len(masks) == 1:
        return Unseeing("zeros", "zeros")
    if chain.has_least:
        return Unseeing(infinite=Unseeing.finite)
    return Unseeing(infinite="zeros" if weights.without_nan else "NaN")


def _heads(chain: Chain, consumer: Node) -> int | None:
    """The number of heads, if scores or weights have four axes anywhere on their way, or the output is split into heads."""
    for node in [*chain.nodes, *consumer.users]:
        sizes = shape_of(node) or ()
        if len(sizes) == 4 and (node in chain.nodes or op_name(node) in ("view", "reshape", "unflatten")):
            return fixed(sizes[1])
    return None


def _term(change: Change, axes: Axes, heads: int | None, like: Node, point: Node) -> Node:
    """The tensor of a change, so that it fits scores with four axes."""
    assert change.node is not None
    if shape_of(change.node) is None:
        return change.node  # a number that is known at run time only
    return axes.of_rank(change.rank, heads).term(point, change.node, change.rank, like)


def _step(change: Change, term: Node | None, point: Node) -> Step:
    if change.kind == "scale":
        if term is None:
            return Scale(change.factor)
        return ScaleBy(inline(point, torch.reciprocal, term) if change.unless else term)
    if change.kind == "clamp":
        return Clamp(change.factor, change.high)
    if term is None:
        return Tanh()
    if change.kind == "hide":
        return Hide(term, change.unless, change.factor)
    if change.factor != 1:
        term = inline(point, operator.mul, term, change.factor)
    return Add(term)
