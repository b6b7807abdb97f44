"""A cache that holds the first tokens of a text. Tests provoke an error, then check that the cache continues unchanged."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, per_head, sink, sliding_window
from support.oracles.cache import error, llama, random_tokens, whole

STREAMING = causal & (sink(2) | sliding_window(6))
DUO = per_head([causal, STREAMING])
POLICIES: dict[str, sc.Policy | Mask] = {"pages": causal, "rings": STREAMING, "both": sc.Policy(DUO, layers={0: STREAMING})}
HELD, TEXT = 14, random_tokens(22)


def new_cache(policy: sc.Policy | Mask | None = DUO, **options: Any) -> sc.SparseCache:
    return sc.SparseCache(llama().config, policy, **{"max_length": 24, "page_size": 1, **options})


def call(model: Any, cache: sc.SparseCache, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(ids, past_key_values=cache).logits
        return logits


def holding(policy: sc.Policy | Mask = DUO, **options: Any) -> tuple[Any, sc.SparseCache]:
    """A compiled model, and a cache that holds the first tokens of the text."""
    model, cache = sc.compile(llama(), policy, inner="eager"), new_cache(policy, **options)
    call(model, cache, TEXT[:, :HELD])
    return model, cache


def content(cache: Any) -> list[Tensor]:
    buffers = [buffer for layer in cache.layers for buffer in layer.buffers]
    return [tensor.clone() for tensor in [*cache.positions.tensors(), *buffers]]


def assert_untouched(cache: sc.SparseCache, before: list[Tensor]) -> None:
    assert all(torch.equal(now, then) for now, then in zip(content(cache), before, strict=True))


def assert_goes_on(model: Any, cache: sc.SparseCache, policy: sc.Policy | Mask) -> None:
    """Assert that the rest of the text has the logits that it would have had without the error."""
    assert cache.get_seq_length() == HELD
    got = torch.cat([call(model, cache, TEXT[:, at : at + 1]) for at in range(HELD, 22)], dim=1)
    assert error(got, whole(TEXT, policy)[:, HELD:]) < 1e-5
