"""A mask in which names replace all tensors, as kernels and ops need it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from sparse_compile.masks import Captured, Mask
from sparse_compile.masks.patterns.per_head import PerHead
from sparse_compile.masks.patterns.tensor import Explicit
from sparse_compile.passes.ir.attention import Attention


@dataclass(frozen=True)
class NamedMask:
    """``mask`` with a name in the place of each tensor of a policy, and these tensors by name in ``constants``.

    ``heads`` is the number of query heads if the mask differs between them; else 1.
    """

    mask: Mask
    constants: Mapping[str, Tensor]
    heads: int

    @staticmethod
    def of(call: Attention, heads: int) -> NamedMask:
        """The named mask of ``call``, which has ``heads`` query heads."""
        constants: dict[str, Tensor] = {}
        names: dict[Captured, Captured] = {}
        for captured in call.visible.captures():
            if not captured.is_symbol:
                name = f"policy_{captured.digest()}"
                constants[name], names[captured] = captured.tensor, Captured.symbol(name)
        mask = call.visible.bind(names)
        return NamedMask(mask, constants, heads if _differs_by_head(mask, call, constants) else 1)

    @property
    def tells_heads_apart(self) -> bool:
        """Whether the mask differs between heads."""
        return self.heads > 1


def _differs_by_head(mask: Mask, call: Attention, constants: Mapping[str, Tensor]) -> bool:
    for node in mask.walk():
        if isinstance(node, PerHead):
            return True
        if isinstance(node, Explicit):
            name = Captured.of(node.visible).name
            source = call.sources.get(name)
            shape = constants[name].shape if source is None else source.shape
            if shape[1] != 1:
                return True
    return False
