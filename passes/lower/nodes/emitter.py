"""Write the nodes of one head group. Kernels request nodes; the emitter places them, and shares them between calls."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.fx import Node

from sparse_compile.masks import Mask
from sparse_compile.masks.captured import Captured
from sparse_compile.passes.choose.named_mask import NamedMask
from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_emit import attach, emit_int, inline
from sparse_compile.passes.ir.region import regions_around
from sparse_compile.passes.ir.rows.head_slices import pick_heads
from sparse_compile.passes.lower.nodes.cache_writes import dense_tensors
from sparse_compile.passes.lower.nodes.scene import Scene
from sparse_compile.passes.ops.block_tables import KV_START, Q_START, tensor_names
from sparse_compile.passes.ops.materialize import materialize
from sparse_compile.passes.ops.structured import StructuredOp
from sparse_compile.passes.torch_private import overload


class Emitter:
    """Writes the nodes of one head group of the call of ``scene``.

    ``call`` has the masks of the group. ``heads`` and ``kv_heads`` are the places of the group among the heads of the storage;
    None means all. ``realized`` says that the kernel captures tensors, so that each of them must be materialized as a buffer
    that the compiler cannot fuse away.
    """

    def __init__(
        self,
        scene: Scene,
        call: Attention,
        heads: tuple[int, ...] | None,
        kv_heads: tuple[int, ...] | None,
        *,
        realized: bool,
    ) -> None:
        self.scene, self.call, self.heads, self.kv_heads, self.realized = scene, call, heads, kv_heads, realized
        self.graph, self.node, self.point = scene.gm.graph, scene.call.node, scene.point

    @cached_property
    def seen(self) -> NamedMask:
        """The mask of the group, with a name in the place of every tensor."""
        return NamedMask.of(self.call, self.call.heads if self.heads is None else len(self.heads))

    # -- operands ---------------------------------------------------------------------------------------------------

    def query(self) -> Node:
        """The queries of the group, ``[B, heads, Q, D]``."""
        return pick_heads(self.node, self.call.q, self.heads)

    def keys_values(self) -> tuple[Node, Node]:
        """The keys and values of the group as dense tensors. This also writes new tokens to the cache."""
        k, v = dense_tensors(self.node, self.call, self.scene.shared)
        return pick_heads(self.node, k, self.kv_heads), pick_heads(self.node, v, self.kv_heads)

    def captures(self, mask: Mask) -> list[Node]:
        """The tensors that the names in ``mask`` stand for, in order, as they are at the point where tables are computed."""
        return [self._capture(name, self.point) for name in tensor_names(mask)]

    def score_captures(self) -> list[Node]:
        """The tensors that the score mod reads. They are read at the call, unless they are overwritten before it."""
        names = self.call.score_mod.captures() if self.call.score_mod is not None else ()
        tensors = []
        for name in names:
            if name not in (Q_START, KV_START):
                overwritten = self.call.sources[name.name].node in self.scene.overwritten
                tensors.append(self._capture(name, self.point if overwritten else self.node))
        return tensors

    def _capture(self, name: Captured, point: Node) -> Node:
        if name.name in self.seen.constants:
            return self.constant(point, name.name, self.seen.constants[name.name])
        source = self.call.sources[name.name]
        overwritten = source.node in self.scene.overwritten
        key = (self.realized, overwritten, str(source))

        def fetch() -> Node:
            copies = overwritten and not self.realized
            node: Node = inline(point, lambda x: source.read(x).clone() if copies else source.read(x), source.node)
            if not self.realized or (node.op == "placeholder" and not overwritten):
                return node
            return self.call_function(point, overload(materialize), node)

        return self.share(key, {source.node}, fetch, until=point)

    # -- nodes ------------------------------------------------------------------------------------------------------

    def share(self, key: object, read: Iterable[Node], make: Callable[[], Node], *, until: Node | None = None) -> Node:
        """Return the node that an earlier call made under ``key`` if it is still valid at ``until``; else call ``make``.

        The node is valid while none of the nodes in ``read`` is overwritten. ``until`` is by default the point where tables are
        computed.
        """
        # A node in a region can be read in that region only.
        shared, key = self.scene.shared, (key, regions_around(until or self.point))
        if key not in shared or not self.scene.is_fresh(shared[key], read, until or self.point):
            shared[key] = make()
        made: Node = shared[key]
        return made

    def call_function(self, point: Node, function: Callable[..., Any], *args: Any) -> Node:
        """Add one node ``function(*args)`` before ``point``."""
        with self.graph.inserting_before(point):
            return self.graph.call_function(function, args)

    def call_op(self, point: Node, op: StructuredOp[Any], operands: Any) -> Node:
        """Add one node that calls an op of this library before ``point``."""
        return self.call_function(point, op.target, *op.arguments(operands))

    def call_module(self, point: Node, prefix: str, module: nn.Module, *args: Any) -> Node:
        """Add ``module`` to the graph, and one node that calls it before ``point``."""
        gm = self.scene.gm
        count = sum(1 for name, _ in gm.named_children() if name.startswith(f"sparse_{prefix}_"))
        name = f"sparse_{prefix}_{count}"
        gm.add_submodule(name, module)
        with self.graph.inserting_before(point):
            return self.graph.call_module(name, args)

    def item(self, point: Node, node: Node, number: int) -> Node:
        """Output ``number`` of a node that has several outputs."""
        return self.call_function(point, operator.getitem, node, number)

    def integer(self, point: Node, expr: sympy.Expr) -> int | Node | None:
        """The integer ``expr`` as an int, or a node that can be used before ``point``; None if it cannot be computed there."""
        with self.graph.inserting_before(point):
            return emit_int(self.graph, expr, point)

    def blocks(self, point: Node, length: int | Node, size: int) -> int | Node:
        """The number of blocks of ``size`` that cover ``length``, as an int or a node."""
        if not isinstance(length, Node):
            return -(-length // size)
        return self.call_function(point, operator.floordiv, self.call_function(point, operator.add, length, size - 1), size)

    def constant(self, point: Node, name: str, tensor: Tensor) -> Node:
        """A constant tensor, such as one in a policy, as a buffer of the graph."""
        attach(self.scene.gm, name, tensor.to(self.call.device))
        with self.graph.inserting_before(point):
            return self.graph.get_attr(name)

    def constants(self, point: Node, name: str, count: int, make: Callable[[], list[Tensor]]) -> list[Node]:
        """``count`` constant tensors as buffers of the graph; ``make`` runs only if no buffer ``{name}_0`` exists yet."""
        if hasattr(self.scene.gm, f"{name}_0"):
            with self.graph.inserting_before(point):
                return [self.graph.get_attr(f"{name}_{k}") for k in range(count)]
        return [self.constant(point, f"{name}_{k}", tensor) for k, tensor in enumerate(make())]

    @property
    def device(self) -> torch.device:
        """The device of the call."""
        return self.call.device
