"""All kernels. The last one runs every call; the order of the others breaks ties between equal ranks."""

from __future__ import annotations

from sparse_compile.passes.lower.chunk import ChunkedSDPA
from sparse_compile.passes.lower.cpp import Cpp
from sparse_compile.passes.lower.flash import Flash
from sparse_compile.passes.lower.flex import Triton
from sparse_compile.passes.lower.kernel import Kernel
from sparse_compile.passes.lower.paged import PagedAttention
from sparse_compile.passes.lower.reference import Reference
from sparse_compile.passes.lower.sdpa import SDPA

KERNELS: tuple[Kernel, ...] = (PagedAttention(), ChunkedSDPA(), Flash(), SDPA(), Triton(), Cpp(), Reference())
