"""The page selector: each query reads a budget of pages and leaves the others unread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from sparse_compile.masks.bounds import Bounds
from sparse_compile.masks.captured import Captured
from sparse_compile.masks.intervals import Intervals
from sparse_compile.masks.mask import Index, Mask
from sparse_compile.masks.operators import full, nothing, union
from sparse_compile.masks.patterns.positional import at_least

SCORES = ("minmax", "mean", "keys")
GROUPS = ("max", "mean", "sum")
Share = int | Mapping[int, int] | tuple[tuple[int, int], ...]


@dataclass(frozen=True, repr=False)
class PageTopK(Mask):
    """Each query reads the pages that score highest for it, ``tokens`` keys in all; the cache keeps every key.

    The budget is rounded up to whole pages and covers everything that a query reads. These pages are always selected: the
    newest page, and all pages with a key that the rest of the mask shows without the selector. That rest is the static part
    of the mask, such as a sink and a window. A page that the static part only touches counts as a whole page. The pages that
    are always selected may exceed the budget. What is left of the budget goes to the pages with the highest scores, and the
    lower page wins a tie. A query sees all keys of a selected page that masks joined by ``&``, such as ``causal``, allow.

        >>> causal & (sink(64) | sliding_window(256) | page_topk(4096, every=4))
        causal & (sink(64) | sliding_window(256) | page_topk(4096, every=4))

    Each run of ``page`` keys is a logical page. ``score`` says how a query scores it:

    | ``score`` | page summary | score of the page |
    |---|---|---|
    | ``"minmax"`` | minimum and maximum of each channel | upper bound on the product with any of its keys |
    | ``"mean"`` | mean of each channel | product with the mean |
    | ``"keys"`` | none: all keys are read | largest product with any of its keys, which is exact |

    ``"minmax"`` is the score of Quest (https://arxiv.org/abs/2406.10774). Storage pages may consist of several logical pages
    (``SparseCache(page_size=64)``). A storage page has the score of its best logical page (LServe,
    https://arxiv.org/abs/2502.14866), and storage pages are what is selected.

    The query heads of a KV head share one selection. Their scores are pooled by ``group``: ``"max"``, ``"mean"`` or ``"sum"``.
    Quest selects for each query head alone, which is the same if every query head has its own KV head.

    With ``every`` > 1, only every ``every``-th decode step scores pages. Until the next scoring step, the page of the token
    that was newest at the last scoring, and all later pages, rank above the others. ``share`` lets layers use the scores of
    an earlier layer, their leader. It is the leader's index, or a mapping from layers to leaders: ``{1: 0, 2: 0}``.

    Decode steps need a ``SparseCache``, and a model that has no mask or score mod per head (such as ALiBi or learned sinks).
    In a prefill policy, each block of 128 queries selects blocks of 128 keys by its mean query. This is lossy, and ``every``
    and ``share`` have no effect there.

    The visible pairs depend on queries and keys. ``mask.selected(q, k)`` returns the mask of one attention; ``dense`` and
    ``block_mask`` raise ``ValueError``. Sizes below 1 and a ``share`` with a cycle raise ``ValueError`` too.
    """

    tokens: int
    page: int = field(default=16, kw_only=True)
    score: str = field(default="minmax", kw_only=True)
    group: str = field(default="max", kw_only=True)
    every: int = field(default=1, kw_only=True)
    share: Share | None = field(default=None, kw_only=True)  # a mapping is stored as sorted pairs
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
            leaders = dict(self.share)  # type: ignore[arg-type]  # invalid types raise below
        except (TypeError, ValueError):
            raise TypeError(
                f"page_topk share needs a leader layer or a mapping from layers to leaders, got {self.share!r}"
            ) from None
        for layer in (*leaders, *leaders.values()):
            at_least("page_topk share", layer, 0)
        object.__setattr__(self, "share", tuple(sorted(leaders.items())) or None)
        for layer in sorted(leaders):
            self.leader(layer)

    def leader(self, layer: int) -> int:
        """Return the layer whose scores ``layer`` uses: itself, unless ``share`` names another layer.

        Raises ``ValueError`` for a cycle and for a leader that runs after ``layer``.
        """
        path, leaders = [layer], dict(self.share) if isinstance(self.share, tuple) else {}
        if isinstance(self.share, int) and self.share != layer:
            leaders = {layer: self.share}
        while path[-1] in leaders:
            path.append(leaders[path[-1]])
            if path[-1] in path[:-1]:
                cycle = " -> ".join(map(str, path))
                raise ValueError(f"page_topk share has a cycle, {cycle}: one of these layers must score its own pages")
        if path[-1] > layer:
            raise ValueError(
                f"page_topk share gives layer {layer} the pages of layer {path[-1]}, which runs later: name an earlier layer"
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
    "{} depends on queries and keys, so the mask is not static: call mask.selected(q, k), which returns the mask of one "
    "attention"
)


def has_selector(mask: Mask) -> bool:
    """Return whether a mask has a selector, so that it depends on queries and keys."""
    return any(node.selects for node in mask.walk())


def selector_of(mask: Mask) -> PageTopK | None:
    """Return the selector of the mask of one KV head, or None. Raises ``ValueError`` if there are several."""
    selectors = dict.fromkeys(node for node in mask.walk() if isinstance(node, PageTopK))
    if len(selectors) > 1:
        raise ValueError(
            "the query heads of a KV head read the same pages and need the same page_topk, "
            f"got {' and '.join(map(str, selectors))}: use one of them"
        )
    return next(iter(selectors), None)


def choosing_together(masks: Sequence[Mask]) -> tuple[PageTopK | None, list[Mask]]:
    """Return the selector of the query heads of one KV head, and the masks of these heads.

    If one head sees everything that the others may select, there is no selector, and the masks come without selectors. The
    pages that any head always sees are selected for all heads. Raises ``ValueError`` like ``selector_of``.
    """
    selector = selector_of(union(masks))
    return selector, list(masks) if selector is not None else [offered(mask) for mask in masks]


def static_part(mask: Mask) -> Mask:
    """Return what a mask shows whatever its selectors select."""
    return _with(mask, nothing)


def offered(mask: Mask) -> Mask:
    """Return the most that a mask can show: everything that its selectors could select."""
    return _with(mask, full)


def _with(mask: Mask, chosen: Mask) -> Mask:
    if isinstance(mask, PageTopK):
        return chosen
    children = mask.children()
    seen = [_with(child, chosen) for child in children]
    return mask if all(a is b for a, b in zip(seen, children, strict=True)) else mask.rebuild(seen)


page_topk = PageTopK
