"""The words for the masks of many heads: as many as the heads, counted one by one."""

from __future__ import annotations

import pytest

from sparse_compile.masks import Mask, causal, full, per_head, sink, sliding_window
from sparse_compile.masks.head_shares import head_shares

NEAR = causal & sliding_window(4)


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (NEAR, "causal & sliding_window(4)"),
        (per_head([NEAR] * 4), "4 of 4 KV heads causal & sliding_window(4)"),
        (per_head([NEAR, causal, NEAR, NEAR]), "1 of 4 KV heads causal; 3 of 4 causal & sliding_window(4)"),
        (per_head([causal] + [NEAR] * 7), "1 of 8 query heads causal; 7 of 8 causal & sliding_window(4)"),
        (causal & per_head([NEAR, full, full, full]), "3 of 4 KV heads causal; 1 of 4 causal & sliding_window(4)"),
        (per_head([NEAR, causal, full, causal & sink(1)]), "1 of 4 KV heads full; 1 of 4 causal; 2 of 4 with 2 other masks"),
    ],
)
def test_heads_are_counted_by_mask(mask: Mask, told: str) -> None:
    assert head_shares(mask, heads=8, kv_heads=4) == told


def test_heads_are_just_heads_where_none_share_keys() -> None:
    assert (
        head_shares(per_head([NEAR, causal]), heads=2, kv_heads=2) == "1 of 2 heads causal; 1 of 2 causal & sliding_window(4)"
    )
