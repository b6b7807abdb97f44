"""A compiled tiny model with a cache that reads text in pieces, and the policies that cache tests use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, chunked, dilated, full, per_head, sink, sliding_window
from support.oracles.cache import error, llama, random_tokens, whole

STREAMING = causal & (sink(2) | sliding_window(6))
CAPACITY = 8  # slots of a ring of STREAMING with pages of one token
DUO = per_head([causal, STREAMING])
NO_RETRIEVAL_BELOW = sc.Policy(DUO, layers={0: STREAMING})
POLICIES: dict[str, sc.Policy | Mask | None] = {
    "dense": causal,
    "no policy": None,
    "streaming": STREAMING,
    "by KV head": DUO,
    "by query head": per_head([causal, STREAMING, causal & sliding_window(3), STREAMING]),
    "rings of two sizes": per_head([STREAMING, causal & (sink(1) | sliding_window(3))]),
    "no retrieval head below": NO_RETRIEVAL_BELOW,
    "no retrieval head above": sc.Policy(causal, layers={1: STREAMING}),
    "sink alone": causal & sink(3),
    "window alone": sliding_window(4),
    "a ring of one token": causal & sliding_window(1),
    "chunked": causal & chunked(5),
    "dilated": per_head([causal & dilated(3, 2), STREAMING]),
    "sees everything": full,
}


class Session:
    """A compiled model and a cache with pages of one token, so that rings are as short as their masks allow."""

    def __init__(self, policy: sc.Policy | Mask | None, *, max_length: int = 64, page_size: int = 1, **options: Any) -> None:
        self.policy, self.options = policy, {"page_size": page_size, **options}
        self.model = sc.compile(llama(), policy, inner="eager")
        self.cache = self.another(max_length=max_length)

    def another(self, *, max_length: int = 64) -> sc.SparseCache:
        return sc.SparseCache(self.model.config, self.policy, max_length=max_length, **self.options)

    def feed(self, ids: Tensor, lengths: Sequence[int] | None = None, **inputs: Any) -> Tensor:
        """The logits of ``ids``, appended in pieces of these lengths."""
        pieces = ids.split(list(lengths or [ids.shape[1]]), dim=1)
        with torch.no_grad():
            return torch.cat([self.model(piece, past_key_values=self.cache, **inputs).logits for piece in pieces], dim=1)

    def feed_padded(self, ids: Tensor, padding: Tensor, lengths: Sequence[int]) -> Tensor:
        """The logits of rows; zeros in ``padding`` mark padding."""
        logits, stop = [], 0
        positions = (padding.cumsum(dim=1) - 1).clamp(min=0)
        with torch.no_grad():
            for length in lengths:
                start, stop = stop, stop + length
                piece = slice(start, stop)
                inputs = {"attention_mask": padding[:, :stop], "position_ids": positions[:, piece]}
                logits.append(self.model(ids[:, piece], past_key_values=self.cache, **inputs).logits)
        return torch.cat(logits, dim=1)


def in_chunks(length: int, size: int) -> list[int]:
    return [size] * (length // size) + [length % size] * (length % size > 0)


def ones(count: int) -> list[int]:
    return [1] * count


def assert_rows_alone(got: Tensor, ids: Tensor, padding: Tensor, policy: sc.Policy | Mask | None, **options: Any) -> None:
    """Assert that each row has the logits of its tokens without padding and without the other rows."""
    for row, text, tokens in zip(got, ids, padding.bool(), strict=True):
        assert error(row[tokens], whole(text[tokens].unsqueeze(0), policy, **options)[0]) < 1e-5


def left_padded(length: int, pads: Sequence[int]) -> tuple[Tensor, Tensor]:
    ids, padding = random_tokens(length, batch=len(pads)), torch.ones(len(pads), length, dtype=torch.int64)
    for row, pad in enumerate(pads):
        padding[row, :pad] = 0
        ids[row, :pad] = 0
    return ids, padding
