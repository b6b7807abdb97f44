"""Check that a ``per_head`` of a policy is written for the heads of a call."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from sparse_compile.masks import Mask
from sparse_compile.masks.patterns.per_head import PerHead
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_nodes import op_name, value_of
from sparse_compile.passes.ir.left import Refused

# Projections, each with the index of its input. What lies above the input belongs to another layer.
INPUTS = {"linear": 0, "matmul": 0, "mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}
UNSHARDED = "use one mask for all heads, or a model that is not sharded"


def check_heads(call: Attention, mask: Mask, model_heads: tuple[int, int] | None) -> None:
    """Raise ``Refused`` for a ``per_head`` that does not have one mask for each query head or for each KV head of ``call``.

    Under tensor parallelism a call has the heads of one device, and the list those of the model. ``model_heads`` are the
    numbers of query heads and KV heads in the config of the model, or None if they are not known.
    """
    lists = sorted({len(node.masks) for node in mask.walk() if isinstance(node, PerHead)})
    if not lists:
        return
    found = f"per_head has {lists[0]} masks, but the attention {call.name}"
    has = f"{call.heads} query heads and {call.kv_heads} KV heads"
    if _is_sharded(call.q):
        raise _refused(f"{found} is sharded over several devices, and the list cannot be sharded yet: {UNSHARDED}")
    if model_heads is not None and call.heads != model_heads[0]:
        of_model = "{} query heads and {} KV heads".format(*model_heads)
        raise _refused(f"{found} has {has} where the model has {of_model}, as under tensor parallelism: {UNSHARDED}")
    fitting = {call.heads, call.kv_heads, *(model_heads or ())}
    for length in lists:
        if length not in fitting:
            found = f"per_head has {length} masks, but the attention {call.name}"
            raise _refused(f"{found} has {has}: give one mask per query head or one per KV head")


def _refused(message: str) -> Refused:
    return Refused(ValueError(message))


def _is_sharded(q: Node) -> bool:
    """Whether queries, or the weights of their projection, are sharded over several devices."""
    seen: set[Node] = set()
    queue = [q]
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        shards = _shards(value_of(node))
        if shards > 1:
            return True
        if shards == 1:  # the same on every device, however it was made
            continue
        at = INPUTS.get(op_name(node), len(node.args))
        queue += [above for above in node.all_input_nodes if above not in node.args[at : at + 1]]
    return False


def _shards(value: Any) -> int:
    """The number of devices that have another part of a tensor each; 0 for a tensor that is no DTensor."""
    from torch import distributed

    if not distributed.is_available():
        return 0
    from torch.distributed.tensor import DTensor

    if not isinstance(value, DTensor):
        return 0
    mesh = value.device_mesh
    return max(mesh.size(axis) if placement.is_shard() else 1 for axis, placement in enumerate(value.placements))
