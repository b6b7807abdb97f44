"""Replace a call by what runs it: one module for the attention, and tables or a dense mask shared by calls of equal mask."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.functional import scaled_dot_product_attention

from sparse_compile.masks import Captured, Mask
from sparse_compile.masks.json_format import to_json
from sparse_compile.masks.patterns.per_head import PerHead
from sparse_compile.masks.patterns.tensor import Explicit
from sparse_compile.masks.selection.page_topk import has_selector, offered
from sparse_compile.passes.choose.block_layout import layout_of
from sparse_compile.passes.choose.kernel_choice import FLEX
from sparse_compile.passes.ir.attention_call import AttentionCall, Left, plain_form
from sparse_compile.passes.ir.captured_source import Source
from sparse_compile.passes.ir.fx_emit import attach, emit_int, fake_mode_of, inline
from sparse_compile.passes.ir.fx_nodes import Order, expr_of, hint_of, op_name, value_of
from sparse_compile.passes.ir.head_slices import join_heads, pick_heads
from sparse_compile.passes.ir.rewrite import Part
from sparse_compile.passes.ir.target import Target
from sparse_compile.passes.lower.page_choice import Choices
from sparse_compile.passes.lower.paged import pages_of, ring_of
from sparse_compile.passes.ops.block_tables import KV_START, Q_START, block_tables_op, given
from sparse_compile.passes.ops.flex_attention import FlexAttention, Spec
from sparse_compile.passes.ops.materialize import realise
from sparse_compile.passes.ops.opaque_attention import attention_op, to_text
from sparse_compile.passes.ops.paged_decode import attend_kept
from sparse_compile.passes.ops.reference_attention import DenseMask, ListedPairs, ReferenceAttention
from sparse_compile.passes.torch_private import overload, real_tensors

KEPT_TABLE_BYTES = 16 << 20


def lower_call(
    gm: GraphModule, call: AttentionCall, parts: list[Part], target: Target, shared: dict[object, Node]
) -> Node | Left:
    """Emit the replacement of ``call`` and hand its users over; or the reason why it cannot be emitted."""
    return _Lowering(gm, call, target, shared).run(parts)


class _Lowering:
    def __init__(self, gm: GraphModule, call: AttentionCall, target: Target, shared: dict[object, Node]) -> None:
        self.gm, self.call, self.target, self.shared = gm, call, target, shared
        self.graph = gm.graph
        self.order = Order(gm.graph)
        self.point = call.node
        assert call.mask is not None and call.positions is not None
        self.positions = call.positions
        shift = self.positions.q_shift
        self._read = {source.node for source in call.sources.values()} | ({shift} if shift is not None else set())
        # What a mask or bias reads as it is, is read by the call, with all that was written to it by then.
        deeper = self._read - set(call.mask_nodes)
        self._overwritten = {node for node in deeper if self.order.written(node, since=node, until=call.node)}

    def run(self, parts: list[Part]) -> Node | Left:
        plain = all(part.kernel.name == "sdpa" and plain_form(self.call, part.mask) for part in parts)
        point = self.call.node if plain else self._point()
        if isinstance(point, Left):
            return point
        outs: list[Node] = []
        for part in parts:
            self.point = point
            out = self._lower(part)
            if isinstance(out, Left):
                return out
            if "example_value" not in out.meta:
                with fake_mode_of(self.graph):
                    heads = self.call.heads if part.heads is None else len(part.heads)
                    out.meta["example_value"] = value_of(self.call.node)[:, :heads]
            outs.append(out)
        out = outs[0] if len(outs) == 1 else join_heads(self.call.node, [part.heads or () for part in parts], outs)
        out.meta = dict(self.call.node.meta)
        self.call.node.replace_all_uses_with(out)
        return out

    def _lower(self, part: Part) -> Node | Left:
        q = pick_heads(self.call.node, self.call.q, part.heads)
        k, v = (pick_heads(self.call.node, x, part.kv_heads) for x in (self.call.k, self.call.v))
        form = plain_form(self.call, part.mask) if part.kernel.name == "sdpa" else None
        if form is not None:
            return self._sdpa(q, k, v, form == "causal")
        self.kernel = part.kernel
        self.mask, self.constants = _name_constants(part.mask)
        self.heads = (self.call.heads if part.heads is None else len(part.heads)) if self._per_head() else 1
        self.layout = layout_of(self.call, self.mask, self.heads, part.kernel, self.target)
        with self.graph.inserting_before(self.point):
            named = {name: self._capture(name) for name in given(self.mask)}
            if has_selector(self.mask):
                prepared = self._select(q, k, named)
            else:
                prepared = [] if part.kernel.name == "pages" else self._prepare(named, self.point)
        if isinstance(prepared, Left):
            return prepared
        captures = [named[name] for name in given(self.mask)]
        scores = [self._capture_scores(name, self.point) for name in _score_names(self.call)]
        with self.graph.inserting_before(self.call.node):
            return self._attend(q, k, v, prepared, captures, scores)

    def _sdpa(self, q: Node, k: Node, v: Node, is_causal: bool) -> Node:
        """SDPA without a mask tensor, over the un-repeated KV heads."""
        grouped = self.call.heads != self.call.kv_heads

        def attend(q: Any, k: Any, v: Any) -> Any:
            return scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=self.call.scale, enable_gqa=grouped)

        out: Node = inline(self.call.node, attend, q, k, v)
        return out

    def _per_head(self) -> bool:
        for node in self.mask.walk():
            if isinstance(node, PerHead):
                return True
            if isinstance(node, Explicit):
                visible = Captured.of(node.visible)
                source = self.call.sources.get(visible.name)
                shape = self.constants[visible.name].shape if source is None else source.shape
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
        # The same place for all calls under this mask: what one of them put there, the next one finds before it.
        return self.shared.setdefault(("after", last), last.next)

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

    def _prepare(self, captures: dict[Captured, Node], point: Node) -> Node | list[Node] | Left:
        call, at, tables = self.call, self.positions, self.layout
        dense = self.kernel.name not in FLEX
        q_len, kv_len = expr_of(call.size("q", 2)), expr_of(call.size("k", 2))
        cut = () if dense else (tables.mask, tables.heads, tables.block, tables.split, tables.width)
        key = (self.mask if dense else None, self.heads, cut, q_len, kv_len, at, call.device, str(call.sources))
        if key in self.shared and self._is_fresh(self.shared[key], self._read):
            return self.shared[key]
        if not dense and self._is_constant(captures):
            return self._constant_tables(int(q_len), int(kv_len), int(at.q_start))
        numbers = [emit_int(self.graph, expr, point) for expr in (q_len, kv_len, at.q_start, at.kv_start)]
        if any(n is None for n in numbers):
            return Left(
                call.node, f"its lengths or positions ({q_len}, {kv_len}, {at}) cannot be had where its mask is computed"
            )
        if dense:
            name = self._submodule("dense_mask", DenseMask(self.mask, self.heads))
            prepared = self.graph.call_module(name, (*numbers, at.q_shift, call.device, *captures.values()))
        else:
            width = self._blocks(numbers[1]) if tables.width is None else tables.width
            read = [captures[name] for name in given(tables.mask)]
            where = (*numbers, at.q_shift, read, *tables.block, width, tables.split, call.device)
            prepared = self.graph.call_function(overload(block_tables_op), (to_json(tables.mask), tables.heads, *where))
        self.shared[key] = prepared
        return prepared

    def _select(self, q: Node, k: Node, captures: dict[Captured, Node]) -> Node | list[Node] | Left:
        """Tables of what selectors choose. From then on the mask is what they could choose from: no other block is visited."""
        read = [captures[name] for name in given(self.layout.mask)]
        where = (self.graph, self.call, self.layout, self.kernel, self.point, self.shared)
        choices = Choices(*where, lambda found: self._is_fresh(found, self._read))
        chosen: Node | list[Node] | Left
        if self.call.scored is not None:
            chosen = choices.pages(self.call.scored, q, read)
        else:
            kv_len = emit_int(self.graph, expr_of(self.call.size("k", 2)), self.point)
            if kv_len is None:
                return Left(self.call.node, "its length cannot be had where its blocks are chosen")
            width = self._blocks(kv_len) if self.layout.width is None else self.layout.width
            chosen = choices.blocks(q, k, read, width)
        self.mask = offered(self.mask)
        if isinstance(chosen, Left) or self.kernel.name in (*FLEX, "pages"):
            return chosen
        dense = self._prepare({name: captures[name] for name in given(self.mask)}, self.point)
        if isinstance(dense, Left):
            return dense
        assert isinstance(dense, Node)
        first_query, first_key, visible = (choices.item(dense, n) for n in range(3))
        name = self._submodule("listed_pairs", ListedPairs(self.layout.block))
        heads = self.call.heads if q is self.call.q else value_of(q).shape[1]
        tables = [choices.item(chosen, n) for n in (2, 3)] if isinstance(chosen, Node) else chosen[2:]
        return [first_query, first_key, self.graph.call_module(name, (visible, *tables, heads))]

    def _is_constant(self, captures: dict[Captured, Node]) -> bool:
        """Whether shapes alone decide the tables, and they are small enough to keep."""
        tables = self.layout
        if tables.width is None or captures:
            return False
        rows = -(-hint_of(self.call.size("q", 2)) // tables.block[0])
        return 2 * 4 * tables.heads * rows * tables.width <= KEPT_TABLE_BYTES

    def _constant_tables(self, q_len: int, kv_len: int, q_start: int) -> list[Node]:
        """The tables as buffers of the graph: a short prompt should not wait for the launches that build them."""
        call, tables = self.call, self.layout
        shape: tuple[Any, ...] = (tables.heads, q_len, kv_len, q_start, 0, None, [], *tables.block, tables.width, tables.split)
        name = f"tables_{hashlib.sha256(repr((str(tables.mask), shape, call.device)).encode()).hexdigest()[:16]}"
        count = 6 if tables.split else 4
        if hasattr(self.gm, f"{name}_0"):
            return [self.graph.get_attr(f"{name}_{k}") for k in range(count)]
        with real_tensors():
            made = block_tables_op(to_json(tables.mask), *shape, torch.device(call.device))
        return [self._constant(f"{name}_{k}", table) for k, table in enumerate(made)]

    def _blocks(self, length: int | Node | None) -> int | Node:
        """The number of blocks that cover ``length`` keys."""
        size = self.layout.block[1]
        if not isinstance(length, Node):
            assert length is not None
            return -(-length // size)
        return self.graph.call_function(operator.floordiv, (self.graph.call_function(operator.add, (length, size - 1)), size))

    def _attend(self, q: Node, k: Node, v: Node, prepared: Node | list[Node], captures: list[Node], scores: list[Node]) -> Node:
        call, tables = self.call, self.layout
        if self.kernel.name == "pages":
            assert isinstance(prepared, list)
            read = ring_of(call, k, v) if call.ring is not None else pages_of(call, k, v, prepared[2:])
            return self.graph.call_function(overload(attend_kept), (q, *read))
        if self.kernel.name not in FLEX:
            name = self._submodule("attention", ReferenceAttention(call.scale, call.score_mod))
            return self.graph.call_module(name, (q, k, v, prepared, *scores))
        k, v = self._as_buffer(k, others=()), self._as_buffer(v, others=(k,))
        spec = Spec(
            mask=self.mask,
            heads=self.heads,
            scale=call.scale,
            score_mod=call.score_mod,
            block=tables.block,
            options=tables.options,
            group=tables.group,
            starts=tables.starts,
            gradients=self.target.gradients,
        )
        if self.target.inner != "inductor":
            operands = (q, k, v, prepared, tuple(captures), tuple(scores), to_text(spec))
            return self.graph.call_function(overload(attention_op), operands)
        name = self._submodule("attention", FlexAttention(spec))
        return self.graph.call_module(name, (q, k, v, prepared, tuple(captures), *scores))

    def _as_buffer(self, node: Node, *, others: tuple[Node, ...]) -> Node:
        """Keys or values as the kernel may read them.

        The C++ template takes the pointer of the buffer behind a view and forgets where the view begins: for ``v`` of
        ``qkv.split(...)`` it silently reads ``q`` (torch 2.13). A cache, and what was appended to one, is a buffer of its own,
        unless it serves as keys and values both (torch 2.11 refuses that).
        """
        its_own = node.op == "placeholder" or op_name(node) == "cat"
        if self.call.device.type != "cpu" or (its_own and node not in others):
            return node
        return self.graph.call_function(overload(realise), (node,))

    def _capture(self, name: Captured) -> Node:
        if name.name in self.constants:
            return self._constant(name.name, self.constants[name.name])
        source: Source = self.call.sources[name.name]
        key = (self.kernel.name in FLEX, self._is_early(), str(source))
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
        dense = self.kernel.name not in FLEX
        copies = self._is_early() and dense
        node: Node = inline(self.point, lambda x: source.read(x).clone() if copies else source.read(x), source.node)
        if dense or (node.op == "placeholder" and not self._is_early()):
            return node
        return self.graph.call_function(overload(realise), (node,))

    def _constant(self, name: str, tensor: Tensor) -> Node:
        """A tensor that a policy brings along, as a buffer of the graph."""
        attach(self.gm, name, tensor.to(self.call.device))
        return self.graph.get_attr(name)

    def _submodule(self, prefix: str, module: torch.nn.Module) -> str:
        count = sum(1 for name, _ in self.gm.named_children() if name.startswith(f"sparse_{prefix}_"))
        name = f"sparse_{prefix}_{count}"
        self.gm.add_submodule(name, module)
        return name


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
