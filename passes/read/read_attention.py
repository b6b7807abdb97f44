"""Find the attention calls of a graph, and read each one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch.fx import GraphModule, Node

from sparse_compile.passes.ir.fx_nodes import Order, op_name
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.rewrite import Rewrite
from sparse_compile.passes.ir.written_call import WrittenCall
from sparse_compile.passes.read.sdpa import read_sdpa
from sparse_compile.passes.read.self_attention import is_self_attention
from sparse_compile.passes.read.softmax_sites import softmax_sites
from sparse_compile.passes.read.spelled_out import read_spelled_out


def read_attention(rewrite: Rewrite) -> int:
    """Find every attention call and read it into a ``WrittenCall``. Returns 0, because reading changes nothing."""
    results = _calls(rewrite.gm)
    for op, body in _bodies(rewrite.gm):
        reason = rewrite.closed.get(op, "the passes do not rewrite the bodies of such ops")
        results += [Left(call.node, f"it is inside {op_name(op)}: {reason}") for call in _calls(body)]
    calls = [result for result in results if isinstance(result, WrittenCall)]
    rewrite.written = [replace(call, is_self_attention=is_self_attention(call)) for call in calls]
    rewrite.left += [result for result in results if isinstance(result, Left)]
    return 0


def _calls(gm: GraphModule) -> list[WrittenCall | Left]:
    sites = {site.softmax: site for site in softmax_sites(gm.graph)}
    results: list[WrittenCall | Left] = []
    order = Order(gm.graph)
    for node in list(gm.graph.nodes):
        name, size = op_name(node), len(gm.graph.nodes)
        if name == "scaled_dot_product_attention":
            results.append(read_sdpa(node, order))
        elif name in OPAQUE:
            results.append(Left(node, OPAQUE[name]))
        elif node in sites:
            results.append(read_spelled_out(sites[node], order))
        if len(gm.graph.nodes) != size:  # reading a call wrote views of its operands
            order = Order(gm.graph)
    return results


def _bodies(gm: GraphModule) -> Iterator[tuple[Node, GraphModule]]:
    """The bodies that higher-order ops still have, each with the outermost op that it is in."""
    for node in gm.graph.nodes:
        body = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(body, GraphModule):
            op = next(iter(node.users), node)
            yield op, body
            yield from ((op, inner) for _, inner in _bodies(body))


def has_attention(body: GraphModule) -> bool:
    """Whether a body, or a body inside it, has an attention call."""
    return bool(_calls(body)) or any(_calls(inner) for _, inner in _bodies(body))


OPAQUE = {
    "multi_head_attention_forward": (
        "nn.MultiheadAttention returns its attention weights, has no batch axis, or adds keys (add_bias_kv, add_zero_attn): "
        "call it on a batch with need_weights=False"
    ),
    "_native_multi_head_attention": "the fused inference path of nn.MultiheadAttention is a single op that hides its attention",
    "_transformer_encoder_layer_fwd": "the fused inference path of nn.TransformerEncoderLayer runs on nested tensors here",
    "flex_attention": "the model calls FlexAttention itself, and the passes do not rewrite that",
    "_scaled_dot_product_flash_attention": "the call is already lowered to a kernel, which the passes cannot rewrite",
    "_scaled_dot_product_efficient_attention": "the call is already lowered to a kernel, which the passes cannot rewrite",
}
