"""Attend to cached keys in a decode step, with the kernel that reads pages and rings in place."""

from __future__ import annotations

from torch import Tensor

from sparse_compile.passes.kernels.operands import PagedDecode
from sparse_compile.passes.ops.structured import StructuredOp


def _attend(operands: PagedDecode[Tensor]) -> Tensor:
    from sparse_compile.passes.kernels.paged_decode import launch_paged_decode  # torch for CPU comes without Triton

    return launch_paged_decode(operands)


def _shape(operands: PagedDecode[Tensor]) -> Tensor:
    q, pages, ring, _ = operands
    if ring is not None:
        dim = ring.values.shape[3]
    else:
        assert pages is not None
        dim = pages.values.data.shape[3] * (2 if pages.values.kind == "int4" else 1)
    return q.new_empty(*q.shape[:3], dim)


# Returns ``[B, Hq, 1, Dv]``, on CUDA only. FlexAttention's decode kernel does the same for plain pages, under any mask and
# score mod. It takes one and a half times as long, because two more kernels merge its splits, and these cannot start early.
paged_decode = StructuredOp("paged_decode", PagedDecode, _attend, fake=_shape)
