"""A graph on its way through the passes: its attention calls, and what became of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import sympy
from torch.fx import GraphModule, Node

from sparse_compile.masks import Mask, causal
from sparse_compile.passes.ir.attention_call import AttentionCall, Left, Phase
from sparse_compile.passes.ir.fx_nodes import expr_of, is_one
from sparse_compile.passes.ir.target import Kernel, Target


@dataclass(frozen=True)
class Part:
    """Some heads of a call, what they see, and their kernel. ``heads`` and ``kv_heads`` are None for all of them."""

    mask: Mask
    kernel: Kernel
    heads: tuple[int, ...] | None = None
    kv_heads: tuple[int, ...] | None = None


@dataclass(frozen=True)
class CacheUse:
    """What one run of a graph does to a cache, for its books on the host.

    ``argument`` is the number of the graph input that counts the columns; ``batch`` and ``tokens`` are the sizes of the new
    keys: a number, or the input and axis they can be read from (no axis: the input is the number). An ``empty`` cache is
    what the graph was traced for.
    """

    argument: int
    batch: int | tuple[int, int | None]
    tokens: int | tuple[int, int | None]
    layers: tuple[int, ...]
    last: bool
    empty: bool


Assign = Callable[[AttentionCall], Mask | None]


@dataclass
class Rewrite:
    """A graph on its way through the passes: its attention calls in order, and what became of them."""

    gm: GraphModule
    assign: Assign
    target: Target = field(default_factory=Target)
    dry: bool = False  # choose kernels for the report, and run the dense reference
    calls: list[AttentionCall] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    parts: dict[Node, list[Part]] = field(default_factory=dict)
    replaced: list[Node] = field(default_factory=list)
    cache_uses: list[CacheUse] = field(default_factory=list)

    def keep(self, results: list[AttentionCall | Left]) -> None:
        """Sort what a pass made of the calls into calls and calls that stay."""
        self.calls = [r for r in results if isinstance(r, AttentionCall)]
        self.left += [r for r in results if isinstance(r, Left)]


Pass = Callable[[Rewrite], int]


def phase_of(call: AttentionCall) -> Phase:
    """Prefill or decode for causal self-attention, other for everything else."""
    if not call.is_self_attention:
        return "other"
    q_len = call.size("q", 2)
    if call.cache is not None:
        return "decode" if is_one(q_len) else "prefill"
    if isinstance(q_len, int) and q_len == 1 and expr_of(call.size("k", 2)) != sympy.Integer(1):
        return "decode"
    return "prefill" if call.mask is not None and call.mask.implies(causal) else "other"
