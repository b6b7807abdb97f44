"""Read ``scaled_dot_product_attention`` in any of its argument forms, and undo the repetition of KV heads."""

from __future__ import annotations

import math
import operator
from typing import Any

from torch import Tensor
from torch.fx import Node

from sparse_compile.passes.ir.fx_emit import inline
from sparse_compile.passes.ir.fx_nodes import Order, argument, expr_of, hint_of, op_name, shape_of, value_of
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.scalars import fixed, number
from sparse_compile.passes.ir.written_call import WrittenCall
from sparse_compile.passes.read.contents import Unread
from sparse_compile.passes.read.four_axes import axes_of
from sparse_compile.passes.read.operands import operand


def read_sdpa(node: Node, order: Order) -> WrittenCall | Left:
    """Read ``scaled_dot_product_attention`` in any of its argument forms."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    defaults = (None, None, None, None, 0.0, False, None, False)
    q, k, v, attn_mask, dropout, causal, scale, gqa = (
        argument(node, at, name, default) for at, (name, default) in enumerate(zip(names, defaults, strict=True))
    )
    if (dropout := number(dropout)) is None:
        return Left(node, "dropout_p is a value of the graph: pass a Python number")
    if dropout > 0:
        return Left(node, f"dropout_p={dropout}: FlexAttention has no dropout")
    if not isinstance(causal, bool) or not isinstance(gqa, bool):
        return Left(node, "is_causal or enable_gqa is a value of the graph: pass True or False")
    known = number(scale)
    if scale is not None and known is None:
        q, known = inline(node, operator.mul, q, scale), 1.0  # decided at run time
    try:
        operands = [operand(x) for x in (q, k, v)]
        axes = axes_of(operands[0], operands[1], grouped=gqa)
    except Unread as reason:
        return Left(node, str(reason))
    if axes.lead != "plain":
        rank = len(operands[0].order)
        attn_mask = axes.term(node, attn_mask, rank, q) if attn_mask is not None else None
        q, k, v = (axes.tensor(node, x) for x in operands)
        node = axes.result(node, tuple(range(rank)))
        order = Order(node.graph)
    read = {"attn_mask": attn_mask, "is_causal": causal, "in_parts": axes.lead == "batches"}
    return build_call(node, q, k, v, scale=known, order=order, **read)


def build_call(node: Node, q: Node, k: Node, v: Node, *, scale: float | None, order: Order, **read: Any) -> WrittenCall | Left:
    """A ``WrittenCall`` over keys and values before they are repeated, or the reason why the shapes do not allow one."""
    for name, x in (("query", q), ("key", k), ("value", v)):
        value = value_of(x)
        if not isinstance(value, Tensor):
            return Left(node, f"the {name} has no recorded shape")
        if value.dim() != 4:
            return Left(node, f"the {name} has {value.dim()} axes, not [batch, heads, length, head_dim]")
        if not value.dtype.is_floating_point:
            return Left(node, f"the {name} has dtype {value.dtype}, but attention needs a floating-point dtype")
    k, v = peel_repeats(k, v, node, order)
    shapes = [shape_of(x) for x in (q, k, v)]
    (batch, heads, _, dim), (k_batch, k_heads, k_len, _), (v_batch, v_heads, v_len, _) = (s or () for s in shapes)
    # Compare the sizes of the traced example: equal sizes may have different symbols, and attention itself requires equality.
    batches, lengths = [hint_of(size) for size in (batch, k_batch, v_batch)], [hint_of(size) for size in (k_len, v_len)]
    if len(set(batches)) > 1:
        return Left(node, "query, key and value need one batch size, not {}, {} and {}".format(*batches))
    # Kernels need the numbers of heads and channels while compiling. If they are symbols, the graph gets a guard on them.
    counts = [count for size in (heads, k_heads, v_heads, dim) if (count := fixed(size)) is not None]
    if len(counts) < 4:
        return Left(node, "the numbers of heads and channels are known at run time only")
    q_heads, kv_heads, value_heads, channels = counts
    if kv_heads != value_heads or q_heads % kv_heads:
        return Left(node, f"the numbers of heads do not fit: {heads} of queries, {k_heads} of keys and {v_heads} of values")
    if len(set(lengths)) > 1:
        return Left(node, "keys and values need one length, not {} and {}".format(*lengths))
    scale = float(scale) if scale is not None else 1 / math.sqrt(channels)
    return WrittenCall(node, q, k, v, scale, **read)


def peel_repeats(k: Node, v: Node, call: Node, order: Order) -> tuple[Node, Node]:
    """The keys and values before each head was repeated for its query heads, if both were repeated equally often."""
    bare_k, bare_v = unrepeated(k, call, order), unrepeated(v, call, order)
    if bare_k is None or bare_v is None or (shape_of(bare_k) or ())[1] != (shape_of(bare_v) or ())[1]:
        return k, v
    return bare_k, bare_v


def unrepeated(node: Node, call: Node, order: Order) -> Node | None:
    """``x`` if ``node`` is ``repeat_kv(x)``, as ``repeat_interleave`` over heads or as expand and reshape; else None.

    It is also None if ``x`` is written to between its repetition and the call.
    """
    while op_name(node) in ("contiguous", "clone") and isinstance(node.args[0], Node):
        node = node.args[0]
    source = None
    if op_name(node) == "repeat_interleave":
        repeats, dim = argument(node, 1, "repeats"), argument(node, 2, "dim")
        source = node.args[0] if isinstance(repeats, int) and dim in (1, -3) else None
    elif op_name(node) in ("reshape", "view", "flatten"):
        source = _expanded_groups(node)
    if not isinstance(source, Node) or len(shape_of(source) or ()) != 4:
        return None
    return None if order.written(source, since=node, until=call) else source


def _expanded_groups(node: Node) -> Node | None:
    """``x`` if ``node`` is ``x[:, :, None].expand(B, Hkv, n, S, D).reshape(B, Hkv * n, S, D)``; else None."""
    wide = node.args[0]
    if not isinstance(wide, Node) or op_name(wide) not in ("expand", "broadcast_to"):
        return None
    narrow = wide.args[0]
    if not isinstance(narrow, Node) or op_name(narrow) not in ("getitem", "unsqueeze", "view", "reshape"):
        return None
    source = narrow.args[0]
    if not isinstance(source, Node):
        return None
    shapes = [shape_of(n) for n in (source, narrow, wide, node)]
    if any(s is None for s in shapes) or [len(s or ()) for s in shapes] != [4, 5, 5, 4]:
        return None
    b, h, s, d = shapes[0] or ()
    repeats = (shapes[2] or ())[2]
    expected = ([b, h, 1, s, d], [b, h, repeats, s, d], [b, h * repeats, s, d])
    for shape, wanted in zip(shapes[1:], expected, strict=True):
        if [expr_of(x) for x in shape or ()] != [expr_of(x) for x in wanted]:
            return None
    return source
