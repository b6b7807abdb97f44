"""What masks that read another mask at other positions have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from sparse_compile.masks.bounds import Bounds
from sparse_compile.masks.mask import Mask
from sparse_compile.masks.unknown_tensors import without_tensors


@dataclass(frozen=True, repr=False)
class Wrapped(Mask):
    """A mask that shows what ``mask`` shows at other positions. Whatever ``mask`` shows more, it shows more, too."""

    mask: Mask

    def children(self) -> tuple[Mask, ...]:
        return (self.mask,)

    def rebuild(self, children: Sequence[Mask]) -> Mask:
        return replace(self, mask=children[0])

    def implies(self, other: Mask) -> bool:
        alike = isinstance(other, Wrapped) and type(other) is type(self) and replace(other, mask=self.mask) == self
        return super().implies(other) or (isinstance(other, Wrapped) and alike and self.mask.implies(other.mask))


def check_inner(outer: Wrapped) -> None:
    """Raise unless ``outer`` has a mask that can be read at other positions."""
    if not isinstance(outer.mask, Mask):
        raise TypeError(f"{outer.name} needs a mask, got {outer.mask!r}: give the mask first, as in {outer.name}(causal, ...)")
    selector = next((node for node in outer.mask.walk() if node.selects), None)
    if selector is not None:
        raise ValueError(f"{outer.name} cannot hold {selector}, which selects keys by content: join the two with &")


def bounds_anywhere(mask: Mask, lo: Tensor, hi: Tensor) -> Bounds:
    """Return the bounds of ``mask`` for runs ``[..., rows]`` that need not ascend and may differ between batch rows.

    The parts of the mask that read tensors count as unknown.
    """
    if not mask.captures():
        return mask.bounds(lo, hi)
    shown, hidden = without_tensors(mask).bounds(lo, hi), without_tensors(mask, visible=False).bounds(lo, hi)
    return Bounds(shown.maybe, hidden.surely)
