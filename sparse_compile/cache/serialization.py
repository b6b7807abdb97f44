"""Save and load a SparseCache as a safetensors file: the slots in use, and a header that identifies the cache."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sparse_compile.cache.device_positions import DevicePositions
from sparse_compile.cache.host_state import HostState
from sparse_compile.cache.layer import SparseCacheLayer
from sparse_compile.cache.planning import Geometry
from sparse_compile.masks.json_format import encode

FORMAT = "sparse_compile.SparseCache"
VERSION = 1


class Contents(Protocol):
    """The members of ``SparseCache`` that this module uses. A protocol avoids an import cycle with ``SparseCache``."""

    geometry: Geometry
    mode: str
    max_length: int
    max_batch: int
    cached_layers: tuple[SparseCacheLayer, ...]
    positions: DevicePositions
    host_state: HostState

    def parts(self, rows: int, columns: int | None = None) -> dict[str, Tensor]: ...

    def reset(self) -> None: ...


def save(cache: Contents, path: str | Path) -> None:
    """See ``SparseCache.save``."""
    from safetensors.torch import save_file

    cache.host_state.check_whole()
    rows, columns = cache.host_state.batch or 0, cache.host_state.columns
    tensors = {name: part.contiguous().cpu() for name, part in _contents(cache).items() if part.numel()}
    header = {"format": FORMAT, "version": str(VERSION), "rows": str(rows), "columns": str(columns), "cache": _identity(cache)}
    save_file(tensors, str(path), metadata=header)


def load(cache: Contents, path: str | Path) -> None:
    """See ``SparseCache.load``."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no cache file {path}")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except SafetensorError as broken:
        raise ValueError(f"{path} is not a SparseCache file: {broken}") from broken
    if header.get("format") != FORMAT or header.get("version") != str(VERSION):
        raise ValueError(f"{path} is not a SparseCache file of version {VERSION}: its header is {header or 'empty'}")
    if header.get("cache") != _identity(cache):
        what = "model, policy, mode, page size, rollback, dtype or kv format"
        raise ValueError(f"{path} was saved from a cache of another {what} than this one")
    sizes = [header.get(name, "") for name in ("rows", "columns")]
    if not all(size.isdecimal() for size in sizes):
        raise ValueError(f"{path} is broken: its header gives {sizes[0]!r} rows and {sizes[1]!r} columns")
    rows, columns = map(int, sizes)
    if rows > cache.max_batch or columns > cache.max_length:
        raise ValueError(
            f"{path} holds {rows} sequences of {columns} tokens, but the cache has room for {cache.max_batch} of "
            f"{cache.max_length}: load it into a larger cache"
        )
    if wrong := _restore(cache, tensors, rows, columns):
        raise ValueError(f"{path} is broken: {wrong} is missing or has another shape")


def copy(source: Contents, target: Contents) -> str:
    """Copy the contents of a cache to a larger one. Returns what does not fit, and then copies nothing; empty if all did."""
    return _restore(target, _contents(source), source.host_state.batch or 0, source.host_state.columns)


def _contents(cache: Contents) -> dict[str, Tensor]:
    parts = cache.parts(cache.host_state.batch or 0)
    if (valid := cache.positions.padding.valid) is not None:
        parts["valid"] = valid[:, : cache.host_state.columns]
    return parts


def _restore(cache: Contents, tensors: dict[str, Tensor], rows: int, columns: int) -> str:
    """Fill a cache. Returns the name of a tensor that is missing or has another shape, and then changes nothing."""
    parts, valid = cache.parts(rows, columns), tensors.get("valid")
    if valid is not None and (valid.shape != (rows, columns) or valid.dtype != torch.bool):
        return "valid"
    wrong = [name for name, part in parts.items() if part.numel() and not _fits(tensors.get(name), part)]
    if wrong:
        return wrong[0]
    cache.reset()
    for name, part in parts.items():
        if part.numel():
            part.copy_(tensors[name])
    if valid is not None:
        cache.positions.padding.restore(valid)
    cache.positions.columns.fill_(columns)
    cache.positions.choose_anew()
    cache.host_state.columns, cache.host_state.batch = columns, rows or None
    return ""


def _fits(tensor: Tensor | None, part: Tensor) -> bool:
    return tensor is not None and tensor.shape == part.shape and tensor.dtype == part.dtype


def _identity(cache: Contents) -> str:
    """A hash of everything that determines what the tensors mean, without ``max_length``, which may differ."""
    layers: list[Any] = []
    for layer in cache.cached_layers:
        plan = layer.plan
        masks = [None if mask is None else encode(mask) for mask in (plan.model, plan.prefill, plan.decode)]
        cached_layers = [storage.identity() for storage in plan.storages]
        layers.append([masks, cached_layers, plan.rings])
    geometry = cache.geometry
    sizes = [geometry.heads, geometry.kv_heads, geometry.key_dim, geometry.value_dim]
    content = json.dumps([sizes, layers, cache.mode, cache.cached_layers[0].plan.rotation, str(cache.cached_layers[0].dtype)])
    return hashlib.sha256(content.encode()).hexdigest()
