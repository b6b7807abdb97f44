"""Small steps give the same numbers compiled, as on CUDA, and un-compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from sparse_compile.masks import causal, page_topk, sink, sliding_window
from sparse_compile.passes.kernels.operands import Append
from sparse_compile.passes.ops import block_tables
from sparse_compile.passes.ops.cache import cache_update, page_selection
from sparse_compile.passes.ops.cache.quantized_append import append_in_torch
from sparse_compile.passes.ops.cache.ring import _ring_step
from sparse_compile.passes.ops.small_steps import run_compiled
from sparse_compile.passes.storage.codec import Format, QuantizedTensor

CPU = torch.device("cpu")
STATIC = sink(4) | sliding_window(100)


def both(function: Callable[..., Any], *args: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs of tensors, un-compiled and compiled: the results of ``function``, and its arguments after the call."""
    tensors = []
    for compiled in (False, True):
        copies = tree_map_only(Tensor, Tensor.clone, args)
        result = run_compiled(function, *tree_flatten(copies)) if compiled else function(*copies)
        tensors.append([x for x in tree_flatten((result, copies))[0] if isinstance(x, Tensor)])
    assert len(tensors[0]) == len(tensors[1]) > 0
    yield from zip(*tensors, strict=True)


def assert_equal(a: Tensor, b: Tensor) -> None:
    assert a.dtype == b.dtype
    assert torch.equal(a, b)


def test_positions_and_tables() -> None:
    chosen, ring = causal & page_topk(256, every=4) & STATIC, torch.arange(2 * 64).view(2, 64) - 1
    for at in (0, 5, 63, 700):  # compiled once
        column = torch.tensor(at)
        cut = block_tables.Cut(1, 1, 1024, 0, 0, q_block=128, kv_block=128, width=8, split=False)
        for a, b in (
            *both(page_selection._page_classes, chosen, 1, column, [], 64, 32, True),
            *both(block_tables._block_tables, causal & STATIC, cut, column, [], CPU),
            *both(_ring_step, ring, ring + 1, 4, torch.full((2, 1), at), torch.tensor([[at], [-1]])),
            *both(cache_update._cache_tokens, 2, 1, column, torch.tensor([at, 3, 7]), None, []),
        ):
            assert_equal(a, b)


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_a_token_in_fewer_bits(kind: str) -> None:
    keys, values = (Format(kind), Format(kind)) if kind == "fp8" else (Format(kind, 16, 1), Format(kind, 1, 32))
    for at in (0, 31, 255):
        torch.manual_seed(at)
        tails = [torch.randn(2, 3, 128, 32) for _ in range(2)]
        parts = [[torch.zeros(2, *shape, dtype=d) for shape, d in f.parts(3, 256, 32, torch.float32)] for f in (keys, values)]
        new = [torch.randn(1, 3, 1, 32) for _ in range(2)]
        options = (torch.tensor(at), None, keys, values, 16, "minmax")
        state = (*tails, *(QuantizedTensor(*part) for part in parts), torch.zeros(2, 3, 16, 64))
        fields: Any = (*state, *new, *options)
        for a, b in both(append_in_torch, Append(*fields)):
            if kind == "fp8" and a.dtype == torch.uint8:  # compiled code multiplies by the reciprocal instead of dividing
                numbers = (x.view(torch.float8_e4m3fn).float() for x in (a, b))
                torch.testing.assert_close(*numbers, rtol=1 / 8, atol=2**-9)
            else:
                assert_equal(a, b)
