"""Hand the rewritten graph to an inner compiler, which compiles everything that is not attention."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule

from sparse_compile import masks
from sparse_compile.passes.tensorrt import Parts, compile_tensorrt
from sparse_compile.passes.torch_private import (
    cache_bypasses,
    inductor_modes,
    inductor_setting,
    inner_backend,
)

CUDA_GRAPHS = "triton.cudagraphs"  # an option of Inductor


class Compiled(NamedTuple):
    """A compiled graph, a note if another process cannot reuse it from a cache, and what became of its parts in TensorRT."""

    run: Callable[..., Any]
    note: str = ""
    parts: Parts | None = None


def check_mode(mode: str | None, inner: str) -> None:
    """Raise ``ValueError`` unless ``mode`` is None or a mode of ``torch.compile`` that ``inner`` has."""
    known = ("default", *inductor_modes())
    if mode is not None and mode not in known:
        raise ValueError(f"mode needs to be one of {', '.join(dict.fromkeys(known))}, got {mode!r}")
    if inner == "tensorrt" and mode not in (None, "default"):
        raise ValueError(
            f"mode needs to be None with inner='tensorrt', because torch-tensorrt has no modes, got {mode!r}: leave it out, "
            "and pass options of torch-tensorrt as inductor={...}"
        )


def compile_inner(
    gm: GraphModule, inputs: Sequence[Any], *, inner: str, mode: str | None, config: dict[str, Any] | None
) -> Compiled:
    """Compile ``gm`` with ``inner``. Inductor gets ``mode`` and ``config`` as from ``torch.compile(mode=..., options=...)``."""
    if inner == "tensorrt":
        run, parts = compile_tensorrt(gm, inputs, config or {})
        return Compiled(run, parts=parts)
    before = cache_bypasses()
    # Inductor's cache keys contain the names of our ops and modules but not their code, so add a hash of our sources.
    settings: Any = torch.compiler.config
    with settings.patch(cache_key_tag=f"{settings.cache_key_tag}sparse_compile-{_sources()}"):
        compiled = _compile(gm, inputs, inner, mode, config)
    if inner == "inductor" and cache_bypasses() > before:
        return Compiled(compiled, "a graph could not be cached by Inductor: a second process compiles it again")
    return Compiled(compiled)


def records_cuda_graphs(inputs: Sequence[Any], mode: str | None, config: dict[str, Any] | None) -> bool:
    """Whether Inductor would record CUDA graphs under these options."""
    return bool(inductor_setting(CUDA_GRAPHS, _mode_options(mode) | (config or {}))) and not _on_cpu(inputs)


def needs_whole(mode: str | None, config: dict[str, Any] | None) -> str:
    """Return why Inductor needs the whole graph under these options, or "" if it can compile parts of it."""
    if inductor_setting("freezing", _mode_options(mode) | (config or {})):
        return "freezing needs the parameters of the model"
    return ""


@cache
def _sources() -> str:
    """Return a hash of the sources that decide what a rewritten graph computes."""
    return source_digest(Path(masks.__file__).parent, Path(__file__).parent)


def source_digest(*packages: Path) -> str:
    """Return a hash of the path and the content of every source file of the packages, including all subfolders."""
    digest = hashlib.sha256()
    for package in packages:
        for file in sorted(package.rglob("*.py")):
            digest.update(f"{file.relative_to(package).as_posix()}:{file.stat().st_size}:".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _mode_options(mode: str | None) -> dict[str, Any]:
    """Return the options of a mode: ``torch.compile`` passes a backend its name only, and CUDA graphs would stay off."""
    return dict(inductor_modes()[mode]) if mode is not None and mode != "default" else {}


def _on_cpu(inputs: Sequence[Any]) -> bool:
    return all(x.device.type == "cpu" for x in inputs if isinstance(x, torch.Tensor))


def _compile(
    gm: GraphModule, inputs: Sequence[Any], inner: str, mode: str | None, config: dict[str, Any] | None
) -> Callable[..., Any]:
    compiler = inner_backend(inner)
    if inner != "inductor":
        return compiler(gm, inputs)
    patches = _mode_options(mode)
    if _on_cpu(inputs):
        # A pointwise op on the output of the C++ template fails with "Unsupported for epilogue_nodes".
        patches["epilogue_fusion"] = False
    return compiler(gm, inputs, config_patches=patches | (config or {}))
