"""Page selection in a cache: which heads select pages, whose scores they use, and the tensors that this needs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_compile.masks import Mask, causal
from sparse_compile.masks.selection.budget import check_pages
from sparse_compile.masks.selection.page_topk import PageTopK, static_part
from sparse_compile.passes.choose.block_layout import step_width
from sparse_compile.passes.storage.layer_plan import LayerPlan, PageSelection, PageStorage, SelectionState, selection_shapes


def most_pages(selector: PageTopK, masks: Sequence[Mask], slots: int, page_size: int) -> int:
    """The maximum number of pages that a query of KV heads under ``masks`` reads, if there is no padding."""
    widths = [-(-selector.tokens // page_size)]
    for static in dict.fromkeys(static_part(mask) for mask in masks):
        widths.append(slots if static.captures() else step_width(causal & static, slots, page_size) + 1)
    return min(max(widths), slots // page_size)


def selecting_pages(
    selector: PageTopK,
    heads: dict[int, Mask],
    slots: int,
    page_size: int,
    layer: int,
    before: Sequence[LayerPlan],
) -> PageStorage:
    """Plan the storage of KV heads that select pages with ``selector``, each under its mask in ``heads``.

    ``before`` are the plans of the layers that run earlier. Raises ``ValueError`` if the pages of the selector do not divide
    ``page_size``, and if the leader layer runs later or does not select pages for these heads.
    """
    check_pages(selector, page_size)
    leader, numbers = selector.leader(layer), tuple(heads)
    width = most_pages(selector, list(heads.values()), slots, page_size)
    if leader == layer:
        rows, by_keys = tuple(range(len(heads))), selector.score == "keys"
        return PageStorage(numbers, slots, PageSelection(selector, page_size, layer, rows, width, by_keys))
    for storage in before[leader].storages:
        theirs = storage.selection
        if theirs is not None and set(heads) <= set(storage.heads):
            rows = tuple(theirs.rows[storage.heads.index(head)] for head in heads)
            return PageStorage(numbers, slots, PageSelection(selector, page_size, theirs.leader, rows, width, theirs.by_keys))
    raise ValueError(
        f"{selector} shares the pages of layer {leader} with KV heads {list(heads)} of layer {layer}, but layer {leader} "
        "selects no pages for these heads: share a layer that does"
    )


class Selection:
    """The page-selection tensors of a cache; see ``SelectionState``. Layers that share the selection of a leader own none."""

    def __init__(
        self, plans: Sequence[LayerPlan], key_dim: int, max_batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._kept: dict[
            tuple[int, tuple[int, ...]], SelectionState[Tensor]
        ] = {}  # by layer and by the heads that are scored together
        dtypes = (torch.float32, torch.int32, torch.int32, dtype)
        for plan in plans:
            for storage in plan.storages:
                chosen = storage.selection
                if chosen is not None and storage.leads(plan.layer):
                    shapes = selection_shapes(storage, chosen, key_dim).used()
                    made = [torch.zeros((max_batch, *s), dtype=d, device=device) for s, d in zip(shapes, dtypes, strict=False)]
                    self._kept[plan.layer, storage.heads] = SelectionState(*made)

    def own(self, plan: LayerPlan) -> list[SelectionState[Tensor]]:
        """The tensors that a layer owns."""
        return [choice for (layer, _), choice in self._kept.items() if layer == plan.layer]

    def used(self, plan: LayerPlan) -> list[Tensor]:
        """The tensors that a layer's decode steps use: its own, or its leader's without the page summaries."""
        tensors: list[Tensor] = []
        for storage in plan.storages:
            selection = storage.selection
            if selection is None:
                continue
            leaders = [heads for layer, heads in self._kept if layer == selection.leader]
            choice = self._kept[selection.leader, next(heads for heads in leaders if set(storage.heads) <= set(heads))]
            tensors += (choice if selection.leader == plan.layer else choice._replace(summary=None)).used()
        return tensors
