"""Self-attention or cross-attention: do queries and keys come from the same hidden states?"""

from __future__ import annotations

from torch.fx import Node

from sparse_compile.passes.ir.fx_nodes import hint_of, is_in_place, op_name
from sparse_compile.passes.ir.written_call import WrittenCall

PROJECTIONS = {"linear", "addmm", "conv1d", "conv2d", "mm", "matmul", "einsum", "embedding"}
REARRANGED = {"transpose", "permute", "view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "contiguous", "to"}
# Two projections cover queries and keys that pass through a low-rank bottleneck (multi-head latent attention); a third
# would reach an encoder through the previous layer's cross-attention.
DEPTH = 2


def is_self_attention(call: WrittenCall) -> bool:
    """Whether queries and keys are projected from one common input; of bare graph inputs, whether they are equally many."""
    q, k = _sources(call.q, call.node), _sources(call.k, call.node)
    if not q and not k:
        return hint_of(call.q_len) == hint_of(call.kv_len)
    return bool(q & k)


def _sources(node: Node, call: Node) -> set[Node]:
    """The inputs of the nearest projections above ``node``, through at most ``DEPTH`` of them."""
    found: set[Node] = set()
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
            while (
                isinstance(source, Node) and op_name(source) in REARRANGED
            ):  # nn.MultiheadAttention transposes what it projects, once for each projection
                source = source.args[0]
            if isinstance(source, Node):
                found.add(source)
                if left > 1:
                    queue.append((source, left - 1))
            continue
        # A static cache is written in place: what it was given counts as where it comes from.
        writers = [user for user in at.users if is_in_place(user) and user.args[0] is at]
        queue += [(above, left) for above in (*at.all_input_nodes, *writers)]
    return found
