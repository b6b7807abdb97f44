"""Say in a few words which masks the heads of an attention have."""

from __future__ import annotations

from sparse_compile.masks.mask import Mask
from sparse_compile.masks.patterns.per_head import PerHead

MOST_MASKS = 3  # distinct masks that are written out


def head_shares(mask: Mask, heads: int, kv_heads: int) -> str:
    """Say how many heads of an attention have each mask; a mask without ``per_head`` is written as it is.

    ``heads`` is the number of query heads. They are counted by KV head where all query heads of a KV head have the same mask.
    The order of heads is left out, so that attentions with equal shares read alike.

        >>> from sparse_compile.masks import causal, per_head, sliding_window
        >>> head_shares(per_head([causal, causal & sliding_window(64)] * 4), heads=32, kv_heads=8)
        '4 of 8 KV heads causal; 4 of 8 causal & sliding_window(64)'
    """
    if not any(isinstance(node, PerHead) for node in mask.walk()):
        return str(mask)
    seen = [str(mask.for_head(head, heads)) for head in range(heads)]
    group = heads // kv_heads
    by_kv_head = seen[::group]
    kind = "heads" if group == 1 else "KV heads"
    if [text for text in by_kv_head for _ in range(group)] != seen:
        by_kv_head, kind = seen, "query heads"
    total = len(by_kv_head)
    ordered = sorted(set(by_kv_head), key=lambda text: (len(text), text))
    written = ordered if len(ordered) <= MOST_MASKS else ordered[: MOST_MASKS - 1]
    counts = [(by_kv_head.count(text), text) for text in written]
    if len(written) < len(ordered):
        counts.append((total - sum(count for count, _ in counts), f"with {len(ordered) - len(written)} other masks"))
    return "; ".join(f"{count} of {total}{f' {kind}' * (not number)} {text}" for number, (count, text) in enumerate(counts))
