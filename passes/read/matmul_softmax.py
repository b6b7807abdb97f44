"""Read attention that a model writes as matmul, softmax and matmul (GPT-2, T5, eager attention, MPT, gpt-oss)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Node

from sparse_compile.passes.ir.fx_nodes import Order, argument, hint_of, op_name, shape_of, value_of
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.score_steps import Add, Hide, Scale, Step, Tanh
from sparse_compile.passes.ir.written_call import WrittenCall
from sparse_compile.passes.read.scalars import CASTS, number
from sparse_compile.passes.read.sdpa import build_call

PRODUCTS = {"matmul", "bmm", "einsum"}
# Operations other than casts that models apply to attention weights. They are followed only to give the reason in the report.
CHANGES = set("mul __mul__ imul div truediv add iadd sub masked_fill nan_to_num clamp view reshape flatten getitem".split())
TRANSPOSES = {"transpose", "swapaxes", "permute", "mT"}


@dataclass
class Chain:
    """The operations between ``q @ k`` and the softmax, collected from the softmax back to the product."""

    steps: list[Step] = field(default_factory=list)
    sink: Node | None = None
    nodes: list[Node] = field(default_factory=list)  # every tensor of scores between the two


def read_spelled_out(node: Node, order: Order) -> WrittenCall | Left | None:
    """Read ``node`` as the product of attention weights and values; None if it is no such product."""
    if op_name(node) not in PRODUCTS or len(node.args) < 2:
        return None
    weights, v = node.args[-2:]
    if not isinstance(weights, Node) or not isinstance(v, Node) or len(shape_of(weights) or ()) < 3:
        return None
    softmax = _softmax_of(weights, node)
    if softmax is None or isinstance(softmax, Left):
        return softmax
    scores, had_sink = softmax
    chain = Chain(nodes=_between(weights, scores))
    if had_sink:
        split = _split_sink(scores)
        if split is None:
            return Left(node, "columns are cut off the weights after the softmax, but not as a learned attention sink")
        chain.nodes += _between(scores, split[0])
        scores, chain.sink = split
    product = _walk(scores, chain)
    if product is None and op_name(node) != "einsum":
        return Left(node, f"scores pass through {op_name(scores) or scores.name}, which the passes do not recognize")
    if product is None:
        return None  # the weights come from no product, as in a mixture of experts
    if "einsum" in (op_name(node), op_name(product)):
        return Left(node, "attention is written with einsum, which the passes do not read: write it with matmul")
    q, k = product.args[0], _untransposed(product.args[1])
    if not isinstance(q, Node) or k is None:
        return Left(node, "the scores are not a product of queries with transposed keys")
    if extra := [user.name for user in weights.users if user is not node]:
        return Left(node, f"the attention weights are also used by {', '.join(extra)}")
    operands = [q, k, v, *(step.node for step in chain.steps if isinstance(step, Add | Hide))]
    if _is_overwritten(chain.nodes, operands, product, node, order):
        return Left(node, "its scores, weights or operands are overwritten in place before the output is computed")
    chain.steps.reverse()
    return build_call(node, q, k, v, scale=1.0, score_steps=tuple(chain.steps), sink=chain.sink, order=order)


def _is_overwritten(way: list[Node], operands: list[Node], product: Node, node: Node, order: Order) -> bool:
    """Whether anything outside the chain writes to a tensor of the chain, or to an operand after the first product."""
    written = any(order.written(at, since=at, until=node, unless=way) for at in way)
    return written or any(order.written(operand, since=product, until=node) for operand in operands)


def _between(node: Node, source: Node) -> list[Node]:
    """The tensors from ``node`` back to ``source``, following first arguments; ``source`` itself is not included."""
    way = []
    while node is not source:
        way.append(node)
        first = argument(node, 0, "input", node.kwargs.get("tensors"))
        inner = first[0] if isinstance(first, list | tuple) else first
        assert isinstance(inner, Node)
        node = inner
    return way


def _softmax_of(weights: Node, product: Node) -> tuple[Node, bool] | Left | None:
    """The scores of the softmax that makes ``weights``, and whether its last column was cut off; None without a softmax."""
    cut, change = False, ""
    node: Any = weights
    while isinstance(node, Node):
        name = op_name(node)
        if name == "softmax":
            axis = argument(node, 1, "dim")
            last = len(shape_of(node) or ()) - 1
            scores = argument(node, 0, "input")
            if axis not in (-1, last) or not isinstance(scores, Node):
                return None
            if not change:
                return scores, cut
            reason = f"the attention weights pass through {change}, which the passes do not recognize"
            return Left(product, reason) if _walk(scores, Chain()) is not None else None
        if name == "dropout":
            p = argument(node, 1, "p", 0.5)
            if argument(node, 2, "training", True) and p != 0:
                return (
                    Left(product, f"dropout of attention weights with p={p}: FlexAttention has no dropout")
                    if _has_softmax(node)
                    else None
                )
        elif name == "getitem" and not cut and node.args[1] == (Ellipsis, slice(None, -1, None)):
            cut = True
        elif name in CHANGES:
            change = change or name
        elif name not in CASTS:
            return None
        node = node.args[0]
    return None


def _has_softmax(node: Node) -> bool:
    inner = node.args[0]
    while isinstance(inner, Node) and op_name(inner) in (*CASTS, "dropout", "getitem"):
        inner = inner.args[0]
    return op_name(inner) == "softmax"


def _split_sink(node: Node) -> tuple[Node, Node] | None:
    """The scores and the logits by head of ``cat([scores, sinks], -1)``, with or without its maximum subtracted."""
    while op_name(node) in CASTS and isinstance(node.args[0], Node):
        node = node.args[0]
    if op_name(node) == "sub" and isinstance(node.args[0], Node) and _is_maximum(node.args[1], node.args[0]):
        node = node.args[0]
    if op_name(node) != "cat":
        return None
    parts = argument(node, 0, "tensors")
    dim = argument(node, 1, "dim", 0)
    if len(parts) != 2 or dim not in (-1, 3) or op_name(parts[1]) != "expand":
        return None
    logits = parts[1].args[0]
    shape = shape_of(logits) if isinstance(logits, Node) else None
    if shape is None or len(shape) != 4 or [s for n, s in enumerate(shape) if n != 1] != [1, 1, 1]:
        return None
    return parts[0], logits


def _is_maximum(node: Any, of: Node) -> bool:
    """Whether ``node`` is the maximum of ``of`` along its last axis. Subtracting it does not change a softmax."""
    if op_name(node) == "values" or (op_name(node) == "getitem" and node.args[1] == 0):
        node = node.args[0]
    return op_name(node) in ("max", "amax") and node.args[0] is of and argument(node, 1, "dim") in (-1, 3)


def _walk(node: Node, chain: Chain) -> Node | None:
    """Collect the steps from the softmax back to the product of queries and keys; return the product, or None without one."""
    name = op_name(node)
    chain.nodes.append(node)
    if name in PRODUCTS:
        return node
    if name in CASTS and isinstance(node.args[0], Node):
        return _walk(node.args[0], chain)
    if name in ("mul", "div", "truediv"):
        return _walk_scale(node, chain, name)
    if name == "tanh" and isinstance(node.args[0], Node):
        chain.steps.append(Tanh())
        return _walk(node.args[0], chain)
    if name in ("add", "iadd", "add_") and node.kwargs.get("alpha", 1) == 1:
        return _walk_sum(node, chain)
    if name in ("masked_fill", "where"):
        return _walk_hide(node, chain, name)
    return None


def _walk_scale(node: Node, chain: Chain, name: str) -> Node | None:
    scores, factor = node.args[0], number(node.args[1])
    if factor is None and name in ("mul",):
        scores, factor = node.args[1], number(node.args[0])
    if factor is None or not isinstance(scores, Node):
        return None
    chain.steps.append(Scale(factor if "mul" in name else 1 / factor))
    return _walk(scores, chain)


def _walk_sum(node: Node, chain: Chain) -> Node | None:
    """Read a sum. The summand that leads back to the product is the scores; the other one is added to them."""
    for scores, term in (node.args[:2], node.args[1::-1]):
        if isinstance(scores, Node) and isinstance(term, Node) and isinstance(value_of(term), Tensor):
            attempt = Chain()
            product = _walk(scores, attempt)
            if product is not None:
                chain.steps += [Add(term), *attempt.steps]
                chain.nodes += attempt.nodes
                return product
    return None


def _walk_hide(node: Node, chain: Chain, name: str) -> Node | None:
    if len(node.args) != 3:
        return None
    if name == "masked_fill":
        scores, condition, fill = node.args
    else:
        condition, scores, fill = node.args
    hides = name == "masked_fill"
    if not hides and number(scores) is not None:  # where(hidden, -inf, scores)
        scores, fill, hides = fill, scores, True
    filled = number(fill)
    if filled is None or filled > -1e4 or not isinstance(scores, Node) or not isinstance(condition, Node):
        return None
    chain.steps.append(Hide(condition, unless=not hides))
    return _walk(scores, chain)


def _untransposed(node: Any) -> Node | None:
    """The keys ``k`` if ``node`` is ``k.transpose(-1, -2)`` in any spelling; else None."""
    if not isinstance(node, Node) or op_name(node) not in TRANSPOSES or not isinstance(node.args[0], Node):
        return None
    if op_name(node) in ("transpose", "swapaxes"):
        axes = {hint_of(a) % 4 for a in node.args[1:3]} if len(node.args) >= 3 else set()
        return node.args[0] if axes == {2, 3} else None
    if op_name(node) == "permute":
        order: Any = node.args[1:] if isinstance(node.args[1], int) else node.args[1]
        return node.args[0] if tuple(order) == (0, 1, 3, 2) else None
    return node.args[0]
