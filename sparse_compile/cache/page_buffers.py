"""Page selection in a cache: which heads choose, with whose scores, and what is kept for that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_compile.masks import Mask, causal
from sparse_compile.masks.selection.budget import check_pages
from sparse_compile.masks.selection.page_topk import PageTopK, static_part
from sparse_compile.passes.choose.block_layout import step_width
from sparse_compile.passes.storage.layer_plan import Choice, LayerPlan, Pages, Selecting, choice_shapes


def most_pages(selector: PageTopK, masks: Sequence[Mask], slots: int, page_size: int) -> int:
    """The most pages that a query of KV heads under ``masks`` reads, if there is no padding."""
    found = [-(-selector.tokens // page_size)]
    for static in dict.fromkeys(static_part(mask) for mask in masks):
        found.append(slots if static.captures() else step_width(causal & static, slots, page_size) + 1)
    return min(max(found), slots // page_size)


def selecting_pages(
    selector: PageTopK,
    heads: dict[int, Mask],
    slots: int,
    page_size: int,
    layer: int,
    before: Sequence[LayerPlan],
) -> Pages:
    """How KV heads are kept that choose by ``selector`` under masks. ``before`` are the plans of the layers that run earlier.

    Raises ``ValueError`` for pages that do not nest, and for a leader that runs later or does not choose for these heads.
    """
    check_pages(selector, page_size)
    leader, numbers = selector.leader(layer), tuple(heads)
    width = most_pages(selector, list(heads.values()), slots, page_size)
    if leader == layer:
        rows, by_keys = tuple(range(len(heads))), selector.score == "keys"
        return Pages(numbers, slots, Selecting(selector, page_size, layer, rows, width, by_keys))
    for storage in before[leader].storages:
        theirs = storage.selecting if isinstance(storage, Pages) else None
        if theirs is not None and set(heads) <= set(storage.heads):
            rows = tuple(theirs.rows[storage.heads.index(head)] for head in heads)
            return Pages(numbers, slots, Selecting(selector, page_size, theirs.leader, rows, width, theirs.by_keys))
    raise ValueError(
        f"{selector} gives KV heads {list(heads)} of layer {layer} the pages that layer {leader} chooses for these heads, and "
        "it chooses none: share a layer in which these heads select"
    )


class Selection:
    """What the layers of a cache keep to choose pages; see ``Choice``. Layers that share a leader's choice keep none."""

    def __init__(
        self, plans: Sequence[LayerPlan], key_dim: int, max_batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._kept: dict[tuple[int, tuple[int, ...]], Choice[Tensor]] = {}  # by layer and the heads that are scored together
        dtypes = (torch.float32, torch.int32, torch.int32, dtype)
        for plan in plans:
            for storage in plan.storages:
                chosen = storage.selecting if isinstance(storage, Pages) else None
                if isinstance(storage, Pages) and chosen is not None and chosen.leader == plan.layer:
                    shapes = choice_shapes(storage, chosen, key_dim).used()
                    made = [torch.zeros((max_batch, *s), dtype=d, device=device) for s, d in zip(shapes, dtypes, strict=False)]
                    self._kept[plan.layer, storage.heads] = Choice(*made)

    def own(self, plan: LayerPlan) -> list[Choice[Tensor]]:
        """What a layer keeps itself."""
        return [choice for (layer, _), choice in self._kept.items() if layer == plan.layer]

    def used(self, plan: LayerPlan) -> list[Tensor]:
        """What its steps use: its own, or what its leader has but the digests."""
        found: list[Tensor] = []
        for storage in plan.storages:
            selecting = storage.selecting if isinstance(storage, Pages) else None
            if selecting is None:
                continue
            leaders = [heads for layer, heads in self._kept if layer == selecting.leader]
            choice = self._kept[selecting.leader, next(heads for heads in leaders if set(storage.heads) <= set(heads))]
            found += (choice if selecting.leader == plan.layer else choice._replace(digest=None)).used()
        return found
