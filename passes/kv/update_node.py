"""The node of a graph that updates a layer of a SparseCache, read into named arguments."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch.fx import Node

from sparse_compile.passes.storage.codec import Codes
from sparse_compile.passes.storage.layer_plan import Choice, LayerPlan, Pages, codes_of


class Update(NamedTuple):
    """The arguments of a ``cache_update`` of a graph: nodes, lists of nodes, and the plan."""

    k: Node
    v: Node
    columns: Node
    texts: Node
    page_texts: Node | None
    rings: list[Node]
    buffers: list[Node]
    stream: list[Node]
    anchor: Node | None
    selection: list[Node]
    codes: list[Node]
    plan: LayerPlan

    @staticmethod
    def of(node: Node) -> Update:
        """Read the node of an update."""
        arguments: Any = (*node.args[:-1], LayerPlan.from_text(str(node.args[-1])))
        return Update(*arguments)

    def choice_of(self, number: int) -> Choice[Node]:
        """What storage ``number``, which selects, chooses by."""
        rest, found = list(self.selection), None
        for storage in self.plan.storages[: number + 1]:
            selecting = storage.selecting if isinstance(storage, Pages) else None
            if selecting is not None:
                leads, by_keys = selecting.leader == self.plan.layer, selecting.by_keys
                count = 1 if by_keys else 4 if leads else 3
                found, rest = Choice(*rest[:count]), rest[count:]
        assert found is not None
        return found

    def codes_of(self, number: int) -> tuple[Codes[Node], Codes[Node]]:
        """What is kept of the keys and of the values of storage ``number``, in fewer bits."""
        keys, values = codes_of(self.plan, self.codes, number)
        return keys, values
