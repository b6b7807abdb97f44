"""A pattern that gives each head its own mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, ClassVar

from torch import Tensor

from sparse_compile.masks.bounds import Bounds, ByHead
from sparse_compile.masks.captured import Captured
from sparse_compile.masks.intervals import beside
from sparse_compile.masks.mask import Index, Mask
from sparse_compile.masks.operators import union

SHORTEST_RUN = 3  # neighbors with the same mask that are printed once


@dataclass(frozen=True, repr=False)
class PerHead(Mask):
    """Each head has its own mask: one mask per query head, or one mask per KV head for all query heads of its group.

    ``dense``, ``block_mask`` and the compiler expand a list for KV heads to the query heads of the attention. A direct call
    as a ``mask_mod`` does not expand it: the list must then have one mask per query head. ``per_head`` does not nest. Three or
    more neighbors with the same mask print as ``[mask] * 3``.

        >>> print(per_head([causal, causal & sliding_window(1)]).draw(2, 2))
        head 0
        █·
        ██
        head 1
        █·
        ·█
    """

    masks: Sequence[Mask]  # stored as a tuple
    name: ClassVar[str] = "per_head"

    def __post_init__(self) -> None:
        if isinstance(self.masks, Mask):
            raise TypeError(f"per_head needs a list of masks, got {self.masks!r}: write per_head([...])")
        masks = tuple(self.masks)
        if not masks:
            raise ValueError("per_head needs at least one mask, got none")
        for mask in masks:
            if not isinstance(mask, Mask):
                raise TypeError(f"per_head needs a list of masks, but one entry is {mask!r}")
            if any(isinstance(node, PerHead) for node in mask.walk()):
                raise ValueError("per_head does not nest: give each head one mask, got a per_head inside per_head")
        object.__setattr__(self, "masks", masks)
        assert self._shared  # compute it here: Dynamo would trace the computation in __call__

    @cached_property
    def _shared(self) -> tuple[tuple[Mask, tuple[int, ...]], ...]:
        """The distinct masks, each with the heads that share it."""
        # Compare tensors by identity: reading their contents would wait for the device.
        heads: dict[str, list[int]] = {}
        for head, mask in enumerate(self.masks):
            heads.setdefault(mask.text(lambda c: c.name if c.is_symbol else f"<{id(c.tensor)}>"), []).append(head)
        return tuple((self.masks[members[0]], tuple(members)) for members in heads.values())

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        if len(self._shared) == 1:
            return self.masks[0].__call__(b, h, q_idx, kv_idx)
        visible: Any = None
        for mask, heads in self._shared:
            shares: Any = None
            for start, stop in consecutive(heads):
                run = (h >= start) & (h < stop)
                shares = run if shares is None else shares | run
            shown = shares & mask.__call__(b, h, q_idx, kv_idx)
            visible = shown if visible is None else visible | shown
        return visible

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        by_head: dict[int, Bounds] = {}
        for mask, heads in self._shared:
            by_head |= dict.fromkeys(heads, mask.bounds(lo, hi))
        bounds = [by_head[head] for head in range(len(self.masks))]
        maybe = beside([x.maybe for x in bounds])
        certain = all(x.certain for x in bounds)
        sieve = ByHead(bounds) if any(x.sieve is not None for x in bounds) else None
        return Bounds(maybe, maybe if certain else beside([x.surely for x in bounds]), sieve)

    def children(self) -> tuple[Mask, ...]:
        return tuple(self.masks)

    def rebuild(self, children: Sequence[Mask]) -> Mask:
        return PerHead(tuple(children))

    def sizes(self) -> tuple[int, int]:
        batch, heads = super().sizes()
        return batch, max(heads, len(self.masks))

    def for_head(self, head: int, heads: int) -> Mask:
        if not 0 <= head < heads:
            raise ValueError(f"there is no head {head} among {heads} heads")
        return self.masks[head // self._group(heads)].for_head(head, heads)

    def for_heads(self, heads: int) -> Mask:
        return PerHead(tuple(self.for_head(head, heads) for head in range(heads)))

    def check(self, batch: int, heads: int, q_len: int, kv_len: int, q_offset: int = 0) -> None:
        self._group(heads)
        super().check(batch, heads, q_len, kv_len, q_offset)

    def implies(self, other: Mask) -> bool:
        if isinstance(other, PerHead):
            same = len(self.masks) == len(other.masks)
            return same and all(a.implies(b) for a, b in zip(self.masks, other.masks, strict=True))
        return super().implies(other) or all(mask.implies(other) for mask in self.masks)

    def text(self, tensor: Callable[[Captured], str]) -> str:
        numbers = {head: number for number, (_, heads) in enumerate(self._shared) for head in heads}
        written: list[str] = []  # lists to be added; the open one has masks that stand alone
        alone: list[str] = []
        for _, run in groupby(range(len(self.masks)), key=numbers.__getitem__):
            heads = list(run)
            mask = self.masks[heads[0]].text(tensor)
            if len(heads) < SHORTEST_RUN:
                alone += [mask] * len(heads)
                continue
            written += [f"[{', '.join(alone)}]"] * bool(alone) + [f"[{mask}] * {len(heads)}"]
            alone = []
        written += [f"[{', '.join(alone)}]"] * bool(alone)
        return f"{self.name}({' + '.join(written)})"

    def _group(self, heads: int) -> int:
        if heads % len(self.masks):
            raise ValueError(
                f"per_head has {len(self.masks)} masks, but the attention has {heads} query heads: "
                "give one mask per query head or one per KV head"
            )
        return heads // len(self.masks)


def unions_by_kv_head(mask: Mask, heads: int, kv_heads: int) -> list[Mask]:
    """Return, for each KV head, the union of the masks of its query heads; there are ``heads`` query heads in all."""
    group = heads // kv_heads
    return [union(mask.for_head(head, heads) for head in range(first, first + group)) for first in range(0, heads, group)]


def consecutive(heads: Sequence[int]) -> list[tuple[int, int]]:
    """Group consecutive heads into half-open ranges."""
    runs: list[tuple[int, int]] = []
    for head in heads:
        if runs and runs[-1][1] == head:
            runs[-1] = (runs[-1][0], head + 1)
        else:
            runs.append((head, head + 1))
    return runs


per_head = PerHead
