"""Tell self-attention from cross-attention: do queries and keys come from the same hidden states?"""

from __future__ import annotations

from torch.fx import Node

from sparse_compile.passes.ir.fx_nodes import hint_of, is_in_place, op_name
from sparse_compile.passes.ir.written_call import WrittenCall

PROJECTIONS = {"linear", "addmm", "conv1d", "conv2d", "mm", "matmul", "einsum", "embedding"}
REARRANGED = {"transpose", "permute", "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous", "to"}
# Two projections cover queries and keys that pass through a low-rank bottleneck (multi-head latent attention). A third would
# reach an encoder through the previous layer's cross-attention.
DEPTH = 2


def is_self_attention(call: WrittenCall) -> bool:
    """Whether queries and keys are projected from a common input. If both are graph inputs, whether their lengths are equal."""
    q, k = _sources(call.q, call.node), _sources(call.k, call.node)
    if not q and not k:
        return hint_of(call.q_len) == hint_of(call.kv_len)
    return bool(q & k)


def _sources(node: Node, call: Node) -> set[Node]:
    """The inputs of the nearest projections above ``node``, through at most ``DEPTH`` of them."""
    sources: set[Node] = set()
    seen: set[tuple[Node, int]] = set()
    queue = [(node, DEPTH)]
    while queue:
        at, left = queue.pop()
        if (at, left) in seen or at is call:
            continue
        seen.add((at, left))
        name = op_name(at)
        if name == "scaled_dot_product_attention":
            continue
        if name in PROJECTIONS:
            source = at.args[1] if name == "addmm" else at.args[0]
            # nn.MultiheadAttention transposes its input, once for each projection.
            while isinstance(source, Node) and op_name(source) in REARRANGED:
                source = source.args[0]
            if isinstance(source, Node):
                sources.add(source)
                if left > 1:
                    queue.append((source, left - 1))
            continue
        # A static cache is written in place: the sources of the tensors written to it count as its own.
        writers = [user for user in at.users if is_in_place(user) and user.args[0] is at]
        queue += [(above, left) for above in (*at.all_input_nodes, *writers)]
    return sources
