"""The source in the graph of a tensor that a mask or score mod reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from sparse_compile.passes.ir.fx_nodes import value_of


@dataclass(frozen=True)
class Source:
    """A tensor that a lifted mask reads, ``node[drop].permute(order)[add]``: drop axes, reorder them, add axes of size 1."""

    node: Node
    drop: tuple[Any, ...]
    order: tuple[int, ...]
    add: tuple[Any, ...]

    def read(self, tensor: Any) -> Any:
        """``tensor``, the value of ``node``, with the axes that the mask reads."""
        if any(k != slice(None) for k in self.drop):
            tensor = tensor[self.drop]
        if self.order != tuple(range(len(self.order))):
            tensor = tensor.permute(self.order)
        return tensor[self.add] if any(k != slice(None) for k in self.add) else tensor

    @property
    def shape(self) -> tuple[Any, ...]:
        """The shape of the tensor as the mask reads it."""
        return tuple(self.read(value_of(self.node)).shape)
