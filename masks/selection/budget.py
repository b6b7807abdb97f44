"""Check a selector: its pages must divide storage pages, and its budget must cover the keys that are always visible."""

from __future__ import annotations

from functools import lru_cache

import torch

from sparse_compile.masks.analysis import ASKED
from sparse_compile.masks.mask import Mask
from sparse_compile.masks.patterns.positional import causal
from sparse_compile.masks.selection.page_topk import PageTopK, static_part
from sparse_compile.masks.unknown_tensors import without_symbols


def check_pages(selector: PageTopK, page_size: int, *, prefill: bool = False) -> None:
    """Raise ``ValueError`` unless the selector's ``page`` divides ``page_size``, the number of keys that are read as one."""
    if page_size % selector.page:
        rule = "a prefill reads blocks" if prefill else "a decode step reads pages"
        other = "" if prefill else ", or change the storage pages with SparseCache(page_size=...)"
        raise ValueError(
            f"{rule} of {page_size} keys, but {selector} summarizes pages of {selector.page}: give it a page that divides "
            f"{page_size}{other}"
        )


def check_budget(selector: PageTopK, mask: Mask, length: int) -> None:
    """Raise ``ValueError`` if the static part of ``mask`` shows any of ``length`` queries more keys than the budget has."""
    shown = most_shown(static_part(mask), length)
    if selector.tokens < shown:
        raise ValueError(
            f"{selector} limits all keys that a query reads, but the static part of {mask} alone shows {shown} keys: "
            f"give page_topk at least {shown} tokens"
        )


@lru_cache(maxsize=1024)
def most_shown(mask: Mask, length: int) -> int:
    """Return the largest number of keys that ``causal & mask`` shows to any of ``length`` queries.

    Parts that read symbols count as hidden. In longer texts, only the last ``ASKED`` queries are checked.
    """
    at = torch.arange(max(0, length - ASKED), length)
    seen = (causal & without_symbols(mask, visible=False)).bounds(at, at).maybe.clamp(0, length)
    return int(seen.count().max())
