"""One row of the catalog of masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sparse_compile.masks import Mask

Oracle = Callable[[int, int, int, int], bool]  # (b, h, i, j): is the pair visible?


@dataclass(frozen=True)
class Row:
    """A mask, its meaning, and an attention that it fits: ``q_len`` queries that start at 0 to 3, and ``kv_len`` keys.

    ``tight`` claims that block tables list no block without a visible pair, and list every fully visible block as full.
    ``drawing`` is what ``draw`` prints for as many queries and keys as it has lines and columns.
    """

    name: str
    mask: Mask
    oracle: Oracle
    batch: int = 1
    heads: int = 1
    tight: bool = False
    drawing: str = ""
    q_len: int = 12
    kv_len: int = 14
