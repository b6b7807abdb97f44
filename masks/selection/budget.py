"""Whether a selector can do what it is asked: pages that nest, and a budget for what is kept anyway."""

from __future__ import annotations

from functools import lru_cache

import torch

from sparse_compile.masks.analysis import ASKED
from sparse_compile.masks.mask import Mask
from sparse_compile.masks.patterns.positional import causal
from sparse_compile.masks.selection.page_topk import PageTopK, static_part
from sparse_compile.masks.unknown_tensors import without_symbols


def check_pages(selector: PageTopK, page_size: int, *, prefill: bool = False) -> None:
    """Raise ``ValueError`` unless described pages fit into those that are read."""
    if page_size % selector.page:
        rule = "a prefill reads blocks" if prefill else "a step reads pages"
        other = "" if prefill else ", or store other pages (SparseCache(page_size=...))"
        raise ValueError(
            f"{rule} of {page_size} keys, and {selector} describes pages of {selector.page}: give it a page that divides "
            f"{page_size}{other}"
        )


def check_budget(selector: PageTopK, mask: Mask, length: int) -> None:
    """Raise ``ValueError`` if the static part of ``mask`` shows a query more keys than the budget has, among ``length``."""
    shown = most_shown(static_part(mask), length)
    if selector.tokens < shown:
        raise ValueError(
            f"{selector} is the budget for all that a query reads, and the static part of {mask} alone shows {shown} keys: "
            f"give page_topk at least {shown} tokens"
        )


@lru_cache(maxsize=1024)
def most_shown(mask: Mask, length: int) -> int:
    """The most keys that ``causal & mask`` shows to any of ``length`` queries; what tensors of a graph say is not counted."""
    at = torch.arange(max(0, length - ASKED), length)
    seen = (causal & without_symbols(mask, visible=False)).bounds(at, at).maybe.clamp(0, length)
    return int(seen.count().max())
