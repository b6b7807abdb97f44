"""Where in the graph a tensor comes from that a mask or score mod reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from sparse_compile.passes.ir.fx_nodes import value_of


@dataclass(frozen=True)
class Source:
    """A tensor that a lifted mask reads: ``node[drop].permute(order)[add]``, axes dropped, put in order, size 1 added."""

    node: Node
    drop: tuple[Any, ...]
    order: tuple[int, ...]
    add: tuple[Any, ...]

    def read(self, tensor: Any) -> Any:
        """The tensor as the mask reads it."""
        if any(k != slice(None) for k in self.drop):
            tensor = tensor[self.drop]
        if self.order != tuple(range(len(self.order))):
            tensor = tensor.permute(self.order)
        return tensor[self.add] if any(k != slice(None) for k in self.add) else tensor

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape of what is read."""
        return tuple(self.read(value_of(self.node)).shape)
