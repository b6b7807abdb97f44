"""Mix full and streaming attention: ``gate * full + (1 - gate) * streaming``, with a gate for each KV head.

The gates are autograd leaves. DuoAttention trains them to find the heads that need every key (arXiv:2410.10819).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.fx import Node

from sparse_compile.masks import Mask
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_emit import attach
from sparse_compile.passes.ir.left import Refused
from sparse_compile.passes.ir.rewrite import Rewrite


class Mix(nn.Module):
    """Mix two outputs ``[B, Hq, Q, Dv]`` by the gates of a layer."""

    def __init__(self, group: int) -> None:
        super().__init__()
        self.group = group

    def forward(self, everything: Tensor, streaming: Tensor, gates: Tensor) -> Tensor:
        """Return the mixture. ``gates`` ``[Hkv]`` are between 0 and 1.

        Gates begin at 1, where ``clamp`` has no gradient in torch 2.15, so they are not clamped here.
        """
        share = gates.repeat_interleave(self.group).view(1, -1, 1, 1)
        return (share * everything + (1 - share) * streaming).to(everything.dtype)


def mix_gates(rewrite: Rewrite, *, gates: Sequence[nn.Parameter], streaming: Mask) -> int:
    """Split every causal call of a layer into an unchanged call and one under ``streaming``, and mix their outputs.

    ``gates[layer]`` is ``[Hkv]``. Raises ``Refused`` for a layer or a number of heads that has no gates, and for a layer
    that attends twice.
    """
    calls: list[Attention] = []
    layers: set[int] = set()
    for call in rewrite.calls:
        calls.append(call)
        if call.phase != "prefill":
            continue
        layer = call.layer
        if layer is None or layer >= len(gates) or layer in layers or gates[layer].numel() != call.kv_heads:
            have = [gate.numel() for gate in gates]
            raise Refused(
                ValueError(
                    f"{call.name} has {call.kv_heads} KV heads, and gates are {have} by layer, one causal attention each: "
                    "train gates for a decoder whose layers are numbered modules with one attention each"
                )
            )
        layers.add(layer)
        calls.append(_mixed(rewrite, call, gates[layer], streaming))
    rewrite.calls = calls
    return len(layers)


def _mixed(rewrite: Rewrite, call: Attention, gates: nn.Parameter, streaming: Mask) -> Attention:
    """Replace the output of ``call`` by the mixture; returns the streaming call."""
    graph, node = rewrite.gm.graph, call.node
    rewrite.gm.add_submodule(f"sparse_mix_{call.layer}", Mix(call.group))
    attach(rewrite.gm, f"sparse_gates_{call.layer}", gates)
    with graph.inserting_after(node):
        twin: Node = graph.node_copy(node)
    with graph.inserting_after(twin):
        read = graph.get_attr(f"sparse_gates_{call.layer}")
    with graph.inserting_after(read):
        mixed = graph.call_module(f"sparse_mix_{call.layer}", (node, twin, read))
    mixed.meta = dict(node.meta)
    node.replace_all_uses_with(mixed, delete_user_cb=lambda user: user is not mixed)
    return replace(call, node=twin, policy=streaming)
