"""KVFormat: in how many bits a cache keeps keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from sparse_compile.passes.storage.codec import KINDS, Format

# Tokens that share a scale of a channel of keys, channels that share one of a token of values. ``int8`` holds 1 % of error also
# where a few channels are ten times larger, ``int4`` 12 % where none are: bench/results/quantized-error.csv.
KEY_GROUP = {"int8": 32, "int4": 32}
VALUE_GROUP = {"int8": 128, "int4": 32}


@dataclass(frozen=True)
class KVFormat:
    """How a ``SparseCache`` keeps keys and values: ``"int8"``, ``"int4"``, ``"fp8"`` (e4m3), or None for the cache's dtype.

    Integers are equal steps from the least to the largest number of a group: of keys ``key_group`` neighbouring tokens in each
    channel, as some channels of keys are far larger than others in all tokens; of values ``value_group`` neighbouring channels
    of each token (KIVI, https://arxiv.org/abs/2402.02750). Each group has a scale and an offset of 16 bits. ``fp8`` has a scale
    for each token. Groups that are not given are the smallest that error asks for (``int8``: 32 tokens, 128 channels or a
    head; ``int4``: 32 and 32). Offsets end at 65,504.

        >>> sc.KVFormat("int8", "int4")
        KVFormat(key='int8', value='int4', key_group=None, value_group=None)
        >>> half = sc.SparseCache(model.config, max_length=4096, kv=sc.KVFormat("int8", "int4"))
        >>> half.nbytes < half.dense_nbytes / 2
        True

    Raises ``ValueError`` for other names and sizes.
    """

    key: str | None = "int8"
    value: str | None = "int8"
    key_group: int | None = None
    value_group: int | None = None

    def __post_init__(self) -> None:
        for name in ("key", "value"):
            kind = getattr(self, name)
            if kind is not None and kind not in KINDS:
                raise ValueError(f"{name} needs to be one of {', '.join(KINDS)} or None, got {kind!r}")
        for name in ("key_group", "value_group"):
            group = getattr(self, name)
            if group is not None and (not isinstance(group, int) or isinstance(group, bool) or group < 1):
                raise ValueError(f"{name} needs to be a positive integer, got {group!r}")

    def forms(self, key_dim: int, value_dim: int, page_size: int) -> tuple[Format, Format] | None:
        """The formats of keys and values of these sizes; None if both are kept as they come.

        Raises ``ValueError`` for groups that do not divide a page or a head, and for int4 of an odd head_dim.
        """
        if self.key is None and self.value is None:
            return None
        for kind, dim in ((self.key, key_dim), (self.value, value_dim)):
            if kind == "int4" and dim % 2:
                raise ValueError(f"int4 keeps two channels in a byte, and the head_dim is odd, {dim}: use int8 or fp8")
        return self._keys(page_size), self._values(value_dim)

    def _keys(self, page_size: int) -> Format:
        if self.key not in KEY_GROUP:
            return Format(self.key or "")
        group = self.key_group or min(KEY_GROUP[self.key], page_size)
        if page_size % group:
            raise ValueError(
                f"key_group needs to divide page_size={page_size}, got {group}: give KVFormat(key_group=...) that does"
            )
        return Format(self.key, tokens=group, channels=1)

    def _values(self, dim: int) -> Format:
        if self.value not in VALUE_GROUP:
            return Format(self.value or "")
        usual = VALUE_GROUP[self.value]
        group = self.value_group or (usual if dim % usual == 0 else dim)
        if dim % group:
            raise ValueError(f"value_group needs to divide the head_dim of values, {dim}, got {group}")
        return Format(self.value, channels=group)


KV = KVFormat | str | None
ByLayer = KV | Sequence[KV | Sequence[KV]]


def formats_of(kv: ByLayer, layers: int, kv_heads: int) -> list[list[KVFormat]]:
    """The format of each KV head of each layer: ``kv`` is one for all, one for each layer, or in these one for each KV head.

    Raises ``ValueError`` for sequences of another length and names that are no format.
    """
    by_layer = _each(kv, layers, "layers")
    return [[_format(one) for one in _each(layer, kv_heads, "KV heads")] for layer in by_layer]


def _each(kv: ByLayer, count: int, what: str) -> list[ByLayer]:
    if kv is None or isinstance(kv, str | KVFormat):
        return [kv] * count
    if not isinstance(kv, Sequence):
        raise TypeError(f"kv needs a KVFormat, its name, None, or a sequence of those, got {kv!r}")
    if len(kv) != count:
        raise ValueError(f"kv has formats for {len(kv)} {what}, and the model has {count}: give one for each, or one for all")
    return list(kv)


def _format(kv: ByLayer) -> KVFormat:
    if isinstance(kv, KVFormat):
        return kv
    if kv is None or isinstance(kv, str):
        return KVFormat(kv, kv)
    raise TypeError(f"kv needs a KVFormat, its name, or None for a KV head, got {kv!r}")


def check_formats(formats: list[list[KVFormat]], device: torch.device) -> None:
    """Raise where formats cannot be used here: ``ImportError`` without torchao, ``ValueError`` on a GPU without their types."""
    kinds = {kind for layer in formats for form in layer for kind in (form.key, form.value)} - {None}
    if kinds and find_spec("torchao") is None:
        raise ImportError(f"kv={sorted(map(str, kinds))[0]!r} encodes with torchao: pip install 'sparse-compile[quant]'")
    if "fp8" in kinds and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        found = torch.cuda.get_device_capability(device)
        raise ValueError(f"fp8 needs a GPU of compute capability 8.9, and {device} has {found[0]}.{found[1]}: use int8")
