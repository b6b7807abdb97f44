"""Import torch-tensorrt."""

from __future__ import annotations

from sparse_compile.masks.optional_packages import needed


def import_tensorrt() -> None:
    """Import torch-tensorrt, which registers its backend. Raises ``ImportError`` with the remedy if it cannot be imported."""
    # Without its libraries, torch-tensorrt raises a bare Exception; without those of CUDA or with another version of torch, it
    # raises OSError, AssertionError or AttributeError.
    with needed("inner='tensorrt'", "torch-tensorrt", failures=(Exception,)):
        import torch_tensorrt  # noqa: F401
