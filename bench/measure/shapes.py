"""Attention calls as models make them, at the shapes of known models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import sparse_compile as sc
from bench.measure.timing import CUDA, DEVICE
from sparse_compile.masks import Mask, causal, sink, sliding_window


@dataclass(frozen=True)
class Shape:
    """Heads of one attention layer."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.name} {self.heads}/{self.kv_heads}x{self.head_dim}"


LLAMA3 = Shape("Llama-3-8B", 32, 8, 128)
LLAMA2 = Shape("Llama-2-7B", 32, 32, 128)
MISTRAL = Shape("Mistral-7B", 32, 8, 128)
GEMMA3 = Shape("Gemma-3-4B", 8, 4, 256)
SMALL = Shape("small", 4, 2, 64)
WINDOW = causal & (sink(64) | sliding_window(1024))  # all streaming
DTYPE = torch.bfloat16 if CUDA else torch.float32


def operands(
    shape: Shape, q_len: int, kv_len: int, *, batch: int = 1, dtype: torch.dtype = DTYPE
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random q, k and v.

    The query, and the keys and values of a prefill, are ``[B, N, H, D]`` in memory, as projections leave them. The keys and
    values of a decode step are ``[B, H, N, D]``, as in a cache.
    """

    def draw(heads: int, length: int) -> Tensor:
        return torch.randn(batch, length, heads, shape.head_dim, dtype=dtype, device=DEVICE).transpose(1, 2)

    q = draw(shape.heads, q_len)
    if q_len == kv_len:
        return q, draw(shape.kv_heads, kv_len), draw(shape.kv_heads, kv_len)
    k, v = torch.randn(2, batch, shape.kv_heads, kv_len, shape.head_dim, dtype=dtype, device=DEVICE).unbind()
    return q, k, v


def prefill(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Run causal attention of a prompt."""
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def decode(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    """Run attention of one query at ``position`` (0-d) over a static cache, with the mask that transformers builds."""
    seen = torch.arange(k.shape[2], device=k.device)[None] <= (position + torch.arange(1, device=k.device))[:, None]
    return scaled_dot_product_attention(q, k, v, attn_mask=seen[None, None], enable_gqa=q.shape[1] != k.shape[1])


def compiled(function: Any, policy: Mask | None, **options: Any) -> tuple[Any, sc.Backend]:
    """Compile ``function`` with our backend, and return it with the backend."""
    torch._dynamo.reset()
    backend = sc.Backend(policy, **options)
    return torch.compile(function, backend=backend, dynamic=False), backend
