"""A compiled tiny model with a cache that selects pages, compared with the oracle on text in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import sparse_compile as sc
from sparse_compile.masks import causal
from support.oracles.cache import error
from support.oracles.selection import Head, Oracle, build, mask_of


def policy_of(layers: Sequence[Sequence[Head]], prefill: Sequence[Sequence[Head]] | None = None) -> sc.Policy:
    """The policy for these KV heads of each layer. The prefill sees everything unless ``prefill`` is given."""
    phases = [
        sc.Policy(layers={layer: mask_of(heads) for layer, heads in enumerate(phase)})
        for phase in (prefill or [[causal] for _ in layers], layers)
    ]
    return sc.Policy(prefill=phases[0], decode=phases[1])


class Session:
    """A model compiled for these KV heads with a ``SparseCache``, and the oracle. Both get the same tokens and are compared."""

    def __init__(
        self,
        layers: list[list[Head]],
        *,
        page_size: int = 4,
        name: str = "llama",
        prefill: list[list[Head]] | None = None,
        max_length: int = 64,
        **options: Any,
    ) -> None:
        self.policy, self.options = policy_of(layers, prefill), {"page_size": page_size, "max_length": max_length, **options}
        self.oracle = Oracle(layers, page_size=page_size, prefill=prefill, name=name)
        self.model = sc.compile(build(name), self.policy, inner="eager")
        self.cache = self.another()

    def another(self, **options: Any) -> sc.SparseCache:
        return sc.SparseCache(self.model.config, self.policy, **{**self.options, **options})

    def reset(self) -> None:
        self.cache.reset()
        self.oracle.reset()

    def crop(self, remove: int) -> None:
        self.cache.crop(-remove)
        self.oracle.crop(remove)

    def reorder(self, rows: Tensor) -> None:
        self.cache.reorder_cache(rows)
        self.oracle.reorder(rows)

    def feed(self, ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """The library's logits of ``ids``, appended in pieces of these lengths."""
        pieces = ids.split(list(lengths or [ids.shape[1]]), dim=1)
        with torch.no_grad():
            # Clone, because Dynamo compiles again for another storage offset.
            return torch.cat([self.model(piece.clone(), past_key_values=self.cache).logits for piece in pieces], dim=1)

    def feed_padded(self, ids: Tensor, lengths: Sequence[int], padding: Tensor) -> Tensor:
        """The library's logits of rows; zeros in ``padding``, which covers all tokens so far, mark padding."""
        logits, stop = [], padding.shape[1] - ids.shape[1]
        positions = (padding.cumsum(dim=1) - 1).clamp(min=0)
        with torch.no_grad():
            for length, piece in zip(lengths, ids.split(list(lengths), dim=1), strict=True):
                stop += length
                here = positions[:, stop - length : stop].clone()
                inputs = {"attention_mask": padding[:, :stop].clone(), "position_ids": here}
                logits.append(self.model(piece.clone(), past_key_values=self.cache, **inputs).logits)
        return torch.cat(logits, dim=1)

    def goes_as_written_out(self, ids: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Feed both, assert that their logits are equal, and return them."""
        wanted = self.oracle.feed(ids, lengths)
        assert error(self.feed(ids, lengths), wanted) < 1e-5, lengths
        return wanted

    def rows_go_as_written_out(self, ids: Tensor, lengths: Sequence[int], padding: Tensor) -> None:
        """Do the same for padded rows, and compare only their tokens."""
        new = padding[:, -ids.shape[1] :]
        wanted, got = self.oracle.feed(ids, lengths, new), self.feed_padded(ids, lengths, padding)
        assert error(got[new.bool()], wanted[new.bool()]) < 1e-5, lengths
