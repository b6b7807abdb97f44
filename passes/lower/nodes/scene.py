"""The surroundings in which one attention call is lowered: the graph, shared nodes, and where its tables are computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_nodes import Order
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.region import regions_around
from sparse_compile.passes.ir.target import Target

Shared = dict[object, Any]


@dataclass(frozen=True)
class Scene:
    """The surroundings of ``call``. Tables go before ``point``: the call itself, unless its mask must be read earlier.

    For a call in a region, ``point`` is outside of the region if its mask is known there, so that tables are computed once for
    all layers, and are not computed again for gradients.

    ``reads`` are the nodes that its mask, score mod and positions read. ``overwritten`` are those among them that are written
    to before the call. ``shared`` holds the nodes that calls with equal masks share.
    """

    gm: GraphModule
    call: Attention
    target: Target
    shared: Shared
    order: Order
    point: Node
    reads: frozenset[Node]
    overwritten: frozenset[Node]

    @staticmethod
    def of(gm: GraphModule, call: Attention, target: Target, shared: Shared, *, reads_mask: bool) -> Scene | Left:
        """The scene of ``call``, or the reason why its tables can go nowhere. Without ``reads_mask``, it needs no tables."""
        order, shift = Order(gm.graph), call.positions.q_shift
        reads = frozenset({source.node for source in call.sources.values()} | ({shift} if shift is not None else set()))
        # A tensor that is itself the mask or bias is read by the call, with everything that was written to it by then.
        deeper = reads - set(call.mask_nodes)
        overwritten = frozenset(node for node in deeper if order.written(node, since=node, until=call.node))
        point = _point(call, order, reads, overwritten, shared) if reads_mask else call.node
        return point if isinstance(point, Left) else Scene(gm, call, target, shared, order, point, reads, overwritten)

    def is_fresh(self, earlier: Node, read: Iterable[Node], until: Node) -> bool:
        """Whether ``earlier``, made for another call, runs before ``until``, and none of ``read`` is overwritten in between."""
        if not self.order.holds(earlier):
            return True  # made for this call
        return self.order.before(earlier, until) and not any(
            self.order.written(node, since=earlier, until=until) for node in read
        )


def _point(call: Attention, order: Order, reads: frozenset[Node], overwritten: frozenset[Node], shared: Shared) -> Node | Left:
    """The node before which tables are computed: the call, or the node after its mask if the mask reads overwritten tensors.

    A static cache, for example, advances its length before attention, but the model's mask was computed from the old length.
    """
    if not overwritten:
        known = (begin for begin in regions_around(call.node) if _is_known(reads, order, begin, call.node))
        return next(known, call.node)
    last = order.last(call.mask_nodes)
    late = [n for n in overwritten if last is None or order.before(last, n) or order.written(n, since=n, until=last)]
    if last is None or late:
        return Left(call.node, "the tensors that its mask reads are overwritten before the mask is complete")
    if any(order.written(node, since=last, until=call.node) for node in set(call.mask_nodes) & reads):
        return Left(call.node, "its mask is overwritten in place, and so are the tensors it was computed from")
    # All calls under this mask share the place, so that each call can use the nodes that an earlier call put there.
    point: Node = shared.setdefault(("after", last), last.next)
    return point


def _is_known(reads: frozenset[Node], order: Order, at: Node, until: Node) -> bool:
    """Whether all tensors that a mask reads are complete ``at`` a node, and not overwritten from there to the call."""
    return all(order.before(node, at) and not order.written(node, since=at, until=until) for node in reads)
