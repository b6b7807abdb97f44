"""Masks that look at queries and keys: a budget of pages for each query, the rest unread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, ClassVar

from torch import Tensor

from sparse_compile.masks.captured import Captured
from sparse_compile.masks.intervals import Bounds, Intervals
from sparse_compile.masks.mask import Index, Mask
from sparse_compile.masks.operators import full, nothing
from sparse_compile.masks.patterns.positional import at_least

SCORES = ("minmax", "mean", "keys")
GROUPS = ("max", "mean", "sum")
Share = int | Mapping[int, int] | tuple[tuple[int, int], ...]


@dataclass(frozen=True, repr=False)
class PageTopK(Mask):
    """Queries see the pages that matter most to them, ``tokens`` keys in all (rounded up to whole pages); nothing is forgotten.

    The budget covers everything a query reads. The newest page, and the pages that the rest of the mask shows without the
    selector (its static part: a sink, a window), are always kept; what is left goes to the pages with the highest score, of
    equal ones to the lower page. A kept page is seen as a whole. Pages that the static part only touches count wholly, and
    these and the newest page may exceed the budget.

    Every ``page`` keys are described as one: by the least and largest value of each channel (``score="minmax"``, Quest,
    https://arxiv.org/abs/2406.10774), whose product with a query no key exceeds; by their mean (``"mean"``); or not at all
    (``"keys"``: the largest product of any key, the exact choice, for which all keys are read). Storage pages of several such
    (``SparseCache(page_size=64)``) count as their best one (LServe, https://arxiv.org/abs/2502.14866), and are what is kept.
    The query heads of a KV head choose together: by the ``"max"``, ``"mean"`` or ``"sum"`` of their scores (``group``). Quest
    chooses for each query head alone, which is the same where every query head has its own KV head.

    ``every`` > 1 scores pages in every so many decode steps only; until the next time the page of the scoring token and those
    after it rank above all. ``share`` names a
    leader layer whose scores serve this layer, or maps layers to leaders: ``{1: 0, 2: 0}``.

    Decode steps need a ``SparseCache``, and a model without a mask or score mod for each head (ALiBi, learned sinks). In a
    prefill policy, blocks of 128 queries choose blocks of keys by their mean query: lossy, and ``every`` and ``share`` do not
    matter.

        >>> causal & (sink(64) | sliding_window(256) | page_topk(4096, every=4))
        causal & (sink(64) | sliding_window(256) | page_topk(4096, every=4))

    Which pairs are visible depends on queries and keys: ``mask.selected(q, k)`` is the mask of one attention, and ``dense`` and
    ``block_mask`` raise ``ValueError``. So do sizes below 1, and a ``share`` that goes round in a circle.
    """

    tokens: int
    page: int = field(default=16, kw_only=True)
    score: str = field(default="minmax", kw_only=True)
    group: str = field(default="max", kw_only=True)
    every: int = field(default=1, kw_only=True)
    share: Share | None = field(default=None, kw_only=True)  # a map is kept as sorted pairs
    name: ClassVar[str] = "page_topk"
    selects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for rule, value in (("tokens", self.tokens), ("page", self.page), ("every", self.every)):
            at_least(f"page_topk {rule}", value)
        for rule, chosen, known in (("score", self.score, SCORES), ("group", self.group, GROUPS)):
            if chosen not in known:
                raise ValueError(f"page_topk {rule} needs to be one of {', '.join(known)}, got {chosen!r}")
        if self.share is None or (isinstance(self.share, int) and not isinstance(self.share, bool)):
            if self.share is not None:
                at_least("page_topk share", self.share, 0)
            return
        try:
            leaders = dict(self.share)  # type: ignore[arg-type]  # what it is not, it is told
        except (TypeError, ValueError):
            raise TypeError(f"page_topk share needs a leader layer or a map of layers, got {self.share!r}") from None
        for layer in (*leaders, *leaders.values()):
            at_least("page_topk share", layer, 0)
        object.__setattr__(self, "share", tuple(sorted(leaders.items())) or None)
        for layer in sorted(leaders):
            self.leader(layer)

    def leader(self, layer: int) -> int:
        """The layer whose scores ``layer`` uses: itself, unless ``share`` names another. Raises ``ValueError`` for a circle."""
        leaders, path = {layer: self.share} if isinstance(self.share, int) and self.share != layer else {}, [layer]
        if isinstance(self.share, tuple):
            leaders = dict(self.share)
        while path[-1] in leaders:
            path.append(leaders[path[-1]])
            if path[-1] in path[:-1]:
                circle = " -> ".join(map(str, path))
                raise ValueError(f"page_topk share goes round in a circle: {circle}. One layer has to choose for itself")
        if path[-1] > layer:
            raise ValueError(
                f"page_topk share gives layer {layer} the pages of layer {path[-1]}, which runs later: name an earlier one"
            )
        return path[-1]

    def text(self, tensor: Callable[[Captured], str]) -> str:
        written = super().text(tensor)
        pairs = self.share if isinstance(self.share, tuple) else None
        return written if pairs is None else written.replace(f"share={pairs!r}", f"share={dict(pairs)!r}")

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        raise ValueError(WHY_NOT.format(self))

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        return Bounds(Intervals.everything(lo), Intervals.nothing(lo))

    def check(self, batch: int, heads: int, q_len: int, kv_len: int, q_offset: int = 0) -> None:
        raise ValueError(WHY_NOT.format(self))


WHY_NOT = (
    "{} depends on queries and keys, so there is no static answer: ask mask.selected(q, k), which gives the mask of one "
    "attention"
)


def has_selector(mask: Mask) -> bool:
    """Whether a mask looks at queries and keys."""
    return any(node.selects for node in mask.walk())


def selector_of(mask: Mask) -> PageTopK | None:
    """The selector of a mask of one KV head. Raises ``ValueError`` if it has two."""
    found = dict.fromkeys(node for node in mask.walk() if isinstance(node, PageTopK))
    if len(found) > 1:
        raise ValueError(f"the query heads of a KV head read the same pages, so it has one page_topk, and here are two: {mask}")
    return next(iter(found), None)


def choosing_together(masks: Sequence[Mask]) -> tuple[PageTopK | None, list[Mask]]:
    """The selector of the query heads of one KV head, and their masks: without selectors where another head sees everything.

    What any head always sees is kept for all of them. Raises as ``selector_of``.
    """
    selector = selector_of(reduce(lambda a, b: a | b, dict.fromkeys(masks)))
    return selector, list(masks) if selector is not None else [offered(mask) for mask in masks]


def static_part(mask: Mask) -> Mask:
    """What a mask shows whatever its selectors choose."""
    return _with(mask, nothing)


def offered(mask: Mask) -> Mask:
    """What a mask may show at most: everything that its selectors could choose."""
    return _with(mask, full)


def _with(mask: Mask, chosen: Mask) -> Mask:
    if isinstance(mask, PageTopK):
        return chosen
    children = mask.children()
    seen = [_with(child, chosen) for child in children]
    return mask if all(a is b for a, b in zip(seen, children, strict=True)) else mask.rebuild(seen)


page_topk = PageTopK
