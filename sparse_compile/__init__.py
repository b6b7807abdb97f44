"""Attention sparsity as a PyTorch compiler pass: ``torch.compile(model, backend=sparse_compile.backend)``."""

from typing import TYPE_CHECKING, Any

from sparse_compile import masks, policies
from sparse_compile.api import backend, compile, explain
from sparse_compile.cache.kv_format import KVFormat
from sparse_compile.dynamo import Backend, SparseCompileError, SparseCompileWarning
from sparse_compile.head_profile import Profile
from sparse_compile.policy import Policy
from sparse_compile.report import Report, Site
from sparse_compile.speculative.lossless import lossless

if TYPE_CHECKING:
    from sparse_compile.cache.sparse_cache import SparseCache
    from sparse_compile.passes.ops.cache.cache_update import SparseCacheError

__all__ = [
    "Backend",
    "KVFormat",
    "Policy",
    "Profile",
    "Report",
    "Site",
    "SparseCache",
    "SparseCacheError",
    "SparseCompileError",
    "SparseCompileWarning",
    "backend",
    "compile",
    "explain",
    "lossless",
    "masks",
    "policies",
]


__version__ = "0.1.0"  # pyproject.toml reads it from here


def __dir__() -> list[str]:
    """List the public names, also those that are imported on first use, and none that this file imports for itself."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])


def __getattr__(name: str) -> Any:
    """Import ``SparseCache`` and its error on first use, because the class derives from one of transformers."""
    if name == "SparseCache":
        from sparse_compile.masks.optional_packages import needed

        with needed("SparseCache", "transformers"):
            from sparse_compile.cache.sparse_cache import SparseCache
        return SparseCache
    if name == "SparseCacheError":
        from sparse_compile.passes.ops.cache.cache_update import SparseCacheError

        return SparseCacheError
    raise AttributeError(f"module 'sparse_compile' has no attribute {name!r}")
