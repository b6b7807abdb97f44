"""Save and load a SparseCache as a safetensors file: the slots in use, and a header that identifies cache and model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sparse_compile.cache.device_positions import DevicePositions
from sparse_compile.cache.host_state import HostState
from sparse_compile.cache.kv_format import KVFormat
from sparse_compile.cache.layer import SparseCacheLayer
from sparse_compile.cache.origin import Origin, fingerprint, name_of
from sparse_compile.cache.planning import Geometry
from sparse_compile.cache.transfer import transfer
from sparse_compile.masks.json_format import encode

FORMAT = "sparse_compile.SparseCache"
VERSION = 2
SIZES = ("rows", "columns", "max_length", "page_size", "rollback")


class Contents(Protocol):
    """The members of ``SparseCache`` that this module uses. A protocol avoids an import cycle with ``SparseCache``."""

    geometry: Geometry
    mode: str
    max_length: int
    max_batch: int
    page_size: int
    rollback: int
    formats: list[list[KVFormat]]
    origin: Origin
    cached_layers: tuple[SparseCacheLayer, ...]
    positions: DevicePositions
    host_state: HostState

    def parts(self, rows: int, columns: int | None = None) -> dict[str, Tensor]: ...

    def reset(self) -> None: ...

    def resized(self, **sizes: Any) -> Any: ...


def save(cache: Contents, path: str | Path) -> None:
    """See ``SparseCache.save``."""
    from safetensors.torch import save_file

    cache.host_state.check_whole()
    rows, columns = cache.host_state.batch or 0, cache.host_state.columns
    tensors = {name: part.contiguous().cpu() for name, part in _contents(cache).items() if part.numel()}
    sizes = dict(zip(SIZES, (rows, columns, cache.max_length, cache.page_size, cache.rollback), strict=True))
    header = {
        "format": FORMAT,
        "version": str(VERSION),
        **{name: str(size) for name, size in sizes.items()},
        "cache": _identity(cache),
        "layout": _layout(cache),
        "weights": cache.origin.weights(),
        "model": cache.origin.name,
    }
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
        raise ValueError(
            f"{path} was saved from a cache of another {what} than this one: load it into a cache that was built with the same "
            "arguments, apart from max_length and max_batch"
        )
    _check_weights(cache, path, header)
    sizes = [header.get(name, "") for name in SIZES]
    if not all(size.isdecimal() for size in sizes):
        raise ValueError(
            f"{path} is broken: its header gives {sizes[0]!r} rows and {sizes[1]!r} columns, which need to be numbers: save "
            "the cache again"
        )
    rows, columns, *built = map(int, sizes)
    if rows > cache.max_batch or columns > cache.max_length:
        raise ValueError(
            f"{path} holds {rows} sequences of {columns} tokens, but the cache has room for {cache.max_batch} of "
            f"{cache.max_length}: load it into a larger cache"
        )
    same = header.get("layout") == _layout(cache)
    holder = cache if same else cache.resized(**dict(zip(SIZES[2:], built, strict=True)), max_batch=max(rows, 1))
    if wrong := _restore(holder, tensors, rows, columns):
        raise ValueError(f"{path} is broken: {wrong} is missing or has another shape: save the cache again")
    if not same and (lacking := transfer(holder, cache)):
        raise ValueError(
            f"{path} lacks tokens that this cache needs for {lacking}: load it into a cache with max_length={built[0]}, "
            f"page_size={built[1]} and rollback={built[2]}, with which it was saved"
        )
    cache.origin.read(header.get("weights", ""), header.get("model", ""))


def _check_weights(cache: Contents, path: str | Path, header: Mapping[str, str]) -> None:
    """Raise ``ValueError`` if the file was made with other weights than those of the model that uses the cache."""
    model, weights = cache.origin.model, header.get("weights")
    if model is not None and weights and weights != fingerprint(model):
        raise ValueError(
            f"{path} was saved from a cache of {header.get('model')}, and {name_of(model)}, which uses this cache, has other "
            "weights: load it into a cache of the model that filled it, or run the prompt again with this model"
        )


def copy(source: Contents, target: Contents) -> str:
    """Copy the contents of a cache to a larger one. Returns what does not fit, and then copies nothing; empty if all did."""
    if _layout(source) != _layout(target):
        return transfer(source, target)
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


def _layout(cache: Contents) -> str:
    """Which heads are stored together and how, as text. It depends on ``max_length``, and decides the names of tensors."""
    plans = [layer.plan for layer in cache.cached_layers]
    return json.dumps([plans[0].rings, [[storage.identity() for storage in plan.storages] for plan in plans]])


def _identity(cache: Contents) -> str:
    """A hash of everything that determines what the tensors mean, without sizes that may differ and without the layout."""
    plans = [layer.plan for layer in cache.cached_layers]
    masks = [[None if mask is None else encode(mask) for mask in (plan.model, plan.prefill, plan.decode)] for plan in plans]
    geometry = cache.geometry
    sizes = [geometry.heads, geometry.kv_heads, geometry.key_dim, geometry.value_dim]
    forms = [[one.forms(geometry.key_dim, geometry.value_dim, cache.page_size) for one in layer] for layer in cache.formats]
    quantizes = any(form is not None for layer in forms for form in layer)
    selects = any(storage.selection is not None for plan in plans for storage in plan.storages)
    exact: list[Any] = [cache.page_size, cache.rollback] if quantizes or selects or plans[0].rotation else []
    if plans[0].rotation:
        exact += plans[0].rings
    content = [sizes, masks, str(forms), exact, cache.mode, plans[0].rotation, str(cache.cached_layers[0].dtype)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
