"""Replace a call by what runs it: one module for the attention, and tables or a dense mask shared by calls of equal mask."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch.fx import GraphModule, Node

from sparse_compile.masks import Captured, Mask
from sparse_compile.masks.given import Explicit
from sparse_compile.masks.heads import PerHead
from sparse_compile.masks.serial import to_json
from sparse_compile.passes.attention import DenseMask, FlexAttention, ReferenceAttention, realise
from sparse_compile.passes.call import AttentionCall, Left
from sparse_compile.passes.graph import Order, emit_int, expr_of, inline, op_name, value_of
from sparse_compile.passes.kernels import BLOCK, Kernel
from sparse_compile.passes.tables import KV_START, Q_START, block_tables_op, given
from sparse_compile.passes.words import Source


def lower_call(gm: GraphModule, call: AttentionCall, kernel: Kernel, shared: dict[object, Node]) -> Node | Left:
    """Emit the replacement of ``call`` and hand its users over; or the reason why it cannot be emitted."""
    return _Lowering(gm, call, kernel, shared).run()


class _Lowering:
    def __init__(self, gm: GraphModule, call: AttentionCall, kernel: Kernel, shared: dict[object, Node]) -> None:
        self.gm, self.call, self.kernel, self.shared = gm, call, kernel, shared
        self.graph = gm.graph
        self.order = Order(gm.graph)
        self.point = call.node
        assert call.mask is not None and call.positions is not None
        self.positions = call.positions
        self.mask, self.constants = _name_constants(call.mask if call.policy is None else call.mask & call.policy)
        self.heads = call.heads if self._per_head() else 1
        shift = self.positions.q_shift
        self._read = {source.node for source in call.sources.values()} | ({shift} if shift is not None else set())
        # What a mask or bias reads as it is, is read by the call, with all that was written to it by then.
        deeper = self._read - set(call.mask_nodes)
        self._overwritten = {node for node in deeper if self.order.written(node, since=node, until=call.node)}

    def run(self) -> Node | Left:
        point = self._point()
        if isinstance(point, Left):
            return point
        self.point = point
        with self.graph.inserting_before(point):
            captures = [self._capture(name) for name in given(self.mask)]
            prepared = self._prepare(captures, point)
        if isinstance(prepared, Left):
            return prepared
        scores = [self._capture_scores(name, point) for name in _score_names(self.call)]
        with self.graph.inserting_before(self.call.node):
            out = self._attend(prepared, captures, scores)
        out.meta = dict(self.call.node.meta)
        self.call.node.replace_all_uses_with(out)
        return out

    def _per_head(self) -> bool:
        for node in self.mask.walk():
            if isinstance(node, PerHead):
                return True
            if isinstance(node, Explicit):
                visible = Captured.of(node.visible)
                source = self.call.sources.get(visible.name)
                shape = self.constants[visible.name].shape if source is None else source_shape(source)
                if shape[1] != 1:
                    return True
        return False

    def _point(self) -> Node | Left:
        """Before which node tables are computed: the call, or what follows its mask if that reads what is overwritten by then.

        A static cache adds to its length before it attends; the model's mask was computed from the length before.
        """
        call, order = self.call, self.order
        if not self._overwritten:
            return call.node
        last = order.last(call.mask_nodes)
        late = [n for n in self._overwritten if last is None or order.before(last, n) or order.written(n, since=n, until=last)]
        if last is None or late:
            return Left(call.node, "the tensors its mask reads are overwritten before the mask is complete")
        if any(order.written(node, since=last, until=call.node) for node in set(call.mask_nodes) & self._read):
            return Left(call.node, "its mask is overwritten, and so is what it was computed from")
        return last.next

    def _is_early(self) -> bool:
        """Whether what the mask reads is overwritten before the call, so that it has to be copied."""
        return self.point is not self.call.node

    def _is_fresh(self, found: Node, read: Iterable[Node]) -> bool:
        """Whether ``found``, computed for an earlier call, is there in time and still says what the nodes it read say."""
        if not self.order.knows(found):
            return True  # of this call
        return self.order.before(found, self.point) and not any(
            self.order.written(node, since=found, until=self.point) for node in read
        )

    def _prepare(self, captures: list[Node], point: Node) -> Node | Left:
        call, at = self.call, self.positions
        q_len, kv_len = expr_of(call.size("q", 2)), expr_of(call.size("k", 2))
        key = (self.mask, self.kernel.name, self.heads, q_len, kv_len, at, call.device, str(call.sources))
        if key in self.shared and self._is_fresh(self.shared[key], self._read):
            return self.shared[key]
        numbers = [emit_int(self.graph, expr, point) for expr in (q_len, kv_len, at.q_start, at.kv_start)]
        if any(n is None for n in numbers):
            return Left(
                call.node, f"its lengths or positions ({q_len}, {kv_len}, {at}) cannot be had where its mask is computed"
            )
        if self.kernel.name == "reference":
            name = self._submodule("dense_mask", DenseMask(self.mask, self.heads))
            prepared = self.graph.call_module(name, (*numbers, at.q_shift, call.device, *captures))
        else:
            width = self._blocks(numbers[1])
            prepared = self.graph.call_function(
                block_tables_op._opoverload,
                (to_json(self.mask), self.heads, *numbers, at.q_shift, captures, BLOCK, BLOCK, width, call.device),
            )
        self.shared[key] = prepared
        return prepared

    def _blocks(self, length: int | Node | None) -> int | Node:
        """The number of blocks that cover ``length`` keys."""
        if not isinstance(length, Node):
            assert length is not None
            return -(-length // BLOCK)
        return self.graph.call_function(operator.floordiv, (self.graph.call_function(operator.add, (length, BLOCK - 1)), BLOCK))

    def _attend(self, prepared: Node, captures: list[Node], scores: list[Node]) -> Node:
        call = self.call
        if self.kernel.name == "reference":
            name = self._submodule("attention", ReferenceAttention(call.scale, call.score_mod))
            return self.graph.call_module(name, (call.q, call.k, call.v, prepared, *scores))
        k, v = self._as_buffer(call.k, others=()), self._as_buffer(call.v, others=(call.k,))
        module = FlexAttention(self.mask, self.heads, call.scale, call.score_mod, BLOCK)
        name = self._submodule("attention", module)
        return self.graph.call_module(name, (call.q, k, v, prepared, tuple(captures), *scores))

    def _as_buffer(self, node: Node, *, others: tuple[Node, ...]) -> Node:
        """Keys or values as the kernel may read them.

        The C++ template takes the pointer of the buffer behind a view and forgets where the view begins: for ``v`` of
        ``qkv.split(...)`` it silently reads ``q`` (torch 2.13). A cache, and what was appended to one, is a buffer of its own,
        unless it serves as keys and values both (torch 2.11 refuses that).
        """
        its_own = node.op == "placeholder" or op_name(node) == "cat"
        if self.call.device.type != "cpu" or (its_own and node not in others):
            return node
        return self.graph.call_function(realise._opoverload, (node,))

    def _capture(self, name: Captured) -> Node:
        if name.name in self.constants:
            return self._constant(name.name, self.constants[name.name])
        source: Source = self.call.sources[name.name]
        key = (self.kernel.name, self._is_early(), str(source))
        if key not in self.shared or not self._is_fresh(self.shared[key], [source.node]):
            self.shared[key] = self._fetch(source)
        return self.shared[key]

    def _capture_scores(self, name: Captured, point: Node) -> Node:
        """What a score mod reads, which may be there only after the mask is complete."""
        self.point = point if self.call.sources[name.name].node in self._overwritten else self.call.node
        with self.graph.inserting_before(self.point):
            return self._capture(name)

    def _fetch(self, source: Source) -> Node:
        """What ``source`` describes, as a kernel may capture it: a graph input, or the output of an op nobody can fuse."""
        copies = self._is_early() and self.kernel.name == "reference"
        node: Node = inline(self.point, lambda x: source.read(x).clone() if copies else source.read(x), source.node)
        if self.kernel.name == "reference" or (node.op == "placeholder" and not self._is_early()):
            return node
        return self.graph.call_function(realise._opoverload, (node,))

    def _constant(self, name: str, tensor: Tensor) -> Node:
        """A tensor that a policy brings along, as a buffer of the graph."""
        if not hasattr(self.gm, name):
            self.gm.register_buffer(name, tensor.to(self.call.device))
            # AOTAutograd asks for the source of every buffer it lifts; without one it refuses the graph.
            sources = getattr(self.gm, "_param_name_to_source", None)
            if sources is not None:
                sources[name] = ConstantSource(name)
        return self.graph.get_attr(name)

    def _submodule(self, prefix: str, module: torch.nn.Module) -> str:
        count = sum(1 for name, _ in self.gm.named_children() if name.startswith(f"sparse_{prefix}_"))
        name = f"sparse_{prefix}_{count}"
        self.gm.add_submodule(name, module)
        return name


def source_shape(source: Source) -> tuple[Any, ...]:
    """The shape of what a lifted mask reads."""
    return tuple(source.read(value_of(source.node)).shape)


def _score_names(call: AttentionCall) -> tuple[Captured, ...]:
    captures = call.score_mod.captures() if call.score_mod is not None else ()
    return tuple(c for c in captures if c not in (Q_START, KV_START))


def _name_constants(mask: Mask) -> tuple[Mask, dict[str, Tensor]]:
    """The mask with every tensor it holds replaced by a name, and the tensors by name."""
    constants: dict[str, Tensor] = {}
    names: dict[Captured, Captured] = {}
    for captured in mask.captures():
        if not captured.is_symbol:
            name = f"policy_{captured.digest()}"
            constants[name], names[captured] = captured.tensor, Captured.symbol(name)
    return mask.bind(names), constants
