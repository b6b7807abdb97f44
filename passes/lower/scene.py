"""Where one attention call is lowered: the graph, what calls share, and the place where its tables can be computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from sparse_compile.passes.ir.attention import Attention
from sparse_compile.passes.ir.fx_nodes import Order
from sparse_compile.passes.ir.left import Left
from sparse_compile.passes.ir.target import Target

Shared = dict[object, Any]


@dataclass(frozen=True)
class Scene:
    """The surroundings of ``call``. Tables go before ``point``: the call itself, unless its mask has to be read earlier.

    ``reads`` are the nodes that its mask and score mod are made of, and ``overwritten`` those among them that are written to
    before the call. ``shared`` holds what calls of equal mask share.
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
        """The scene of ``call``, or why there is no place for its tables. Without ``reads_mask`` it needs none."""
        order, shift = Order(gm.graph), call.positions.q_shift
        reads = frozenset({source.node for source in call.sources.values()} | ({shift} if shift is not None else set()))
        # What a mask or bias reads as it is, is read by the call, with all that was written to it by then.
        deeper = reads - set(call.mask_nodes)
        overwritten = frozenset(node for node in deeper if order.written(node, since=node, until=call.node))
        point = _point(call, order, reads, overwritten, shared) if reads_mask else call.node
        return point if isinstance(point, Left) else Scene(gm, call, target, shared, order, point, reads, overwritten)

    @property
    def is_early(self) -> bool:
        """Whether what the mask reads is overwritten before the call, so that it has to be copied."""
        return self.point is not self.call.node

    def is_fresh(self, earlier: Node, read: Iterable[Node], until: Node) -> bool:
        """Whether ``earlier``, computed for another call, stands before ``until`` and still says what the nodes it read say."""
        if not self.order.knows(earlier):
            return True  # of this call
        return self.order.before(earlier, until) and not any(
            self.order.written(node, since=earlier, until=until) for node in read
        )


def _point(call: Attention, order: Order, reads: frozenset[Node], overwritten: frozenset[Node], shared: Shared) -> Node | Left:
    """Before which node tables are computed: the call, or what follows its mask if that reads what is overwritten by then.

    A static cache adds to its length before it attends; the model's mask was computed from the length before.
    """
    if not overwritten:
        return call.node
    last = order.last(call.mask_nodes)
    late = [n for n in overwritten if last is None or order.before(last, n) or order.written(n, since=n, until=last)]
    if last is None or late:
        return Left(call.node, "the tensors its mask reads are overwritten before the mask is complete")
    if any(order.written(node, since=last, until=call.node) for node in set(call.mask_nodes) & reads):
        return Left(call.node, "its mask is overwritten, and so is what it was computed from")
    # The same place for all calls under this mask: what one of them put there, the next one finds before it.
    point: Node = shared.setdefault(("after", last), last.next)
    return point
