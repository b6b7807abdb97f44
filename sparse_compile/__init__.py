"""Attention sparsity as a PyTorch compiler pass: ``torch.compile(model, backend=sparse_compile.backend)``."""

from sparse_compile import masks
from sparse_compile.dynamo import Backend, SparseCompileError, SparseCompileWarning, backend, compile, explain
from sparse_compile.policy import Policy
from sparse_compile.report import Report, Site

__all__ = [
    "Backend",
    "Policy",
    "Report",
    "Site",
    "SparseCompileError",
    "SparseCompileWarning",
    "backend",
    "compile",
    "explain",
    "masks",
]
