"""KVFormat: the number formats in which a cache stores keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from sparse_compile.masks.optional_packages import check_installed
from sparse_compile.passes.storage.codec import KINDS, Format

# Default group sizes: tokens that share a scale within a channel of keys, and channels that share a scale within a token of
# values. The relative error of attention with these groups, from bench/results/quantized-error.csv:
#
# | format | no large channels | 2 % of key channels ten times larger |
# |--------|-------------------|--------------------------------------|
# | int8   | 0.8 %             | 0.9 %                                |
# | int4   | 11 %              | 14 %                                 |
KEY_GROUP = {"int8": 32, "int4": 32}
VALUE_GROUP = {"int8": 128, "int4": 32}


@dataclass(frozen=True)
class KVFormat:
    """The number formats in which a ``SparseCache`` stores keys and values.

    ``key`` and ``value`` are ``"int8"``, ``"int4"``, ``"fp8"`` (e4m3), or None for the cache's dtype. Integer formats divide
    the range from the smallest to the largest number of a group into equal steps. Each group has a scale and an offset of 16
    bits, and offsets are clamped to +-65,504. A group of keys is ``key_group`` neighboring tokens of one channel, because some
    key channels are far larger than others in all tokens. A group of values is ``value_group`` neighboring channels of one
    token (KIVI, https://arxiv.org/abs/2402.02750). ``fp8`` has one scale per token. None selects the default group sizes, which
    were chosen by the measured error of attention:

    | format | tokens in a key group | channels in a value group |
    |--------|-----------------------|---------------------------|
    | int8   | 32                    | 128                       |
    | int4   | 32                    | 32                        |

    A default key group is at most a page. A default value group is the whole head where 128 or 32 does not divide it.

        >>> sc.KVFormat("int8", "int4")
        KVFormat(key='int8', value='int4', key_group=None, value_group=None)
        >>> half = sc.SparseCache(model.config, max_length=4096, kv=sc.KVFormat("int8", "int4"))
        >>> half.nbytes < half.dense_nbytes / 2
        True

    Raises ``ValueError`` for unknown formats and for group sizes that are not positive integers.
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
        """The formats of keys and values of these sizes; None if both stay in the cache's dtype.

        Raises ``ValueError`` for groups that do not divide a page or a head, and for int4 with an odd head_dim.
        """
        if self.key is None and self.value is None:
            return None
        for kind, dim in ((self.key, key_dim), (self.value, value_dim)):
            if kind == "int4" and dim % 2:
                raise ValueError(f"int4 packs two channels into a byte and needs an even head_dim, got {dim}: use int8 or fp8")
        return self._keys(page_size), self._values(value_dim)

    def _keys(self, page_size: int) -> Format:
        if self.key not in KEY_GROUP:
            return Format(self.key or "")
        group = self.key_group or min(KEY_GROUP[self.key], page_size)
        if page_size % group:
            raise ValueError(
                f"key_group needs to divide page_size={page_size}, got {group}: pass KVFormat a key_group that divides it"
            )
        return Format(self.key, tokens=group, channels=1)

    def _values(self, dim: int) -> Format:
        if self.value not in VALUE_GROUP:
            return Format(self.value or "")
        usual = VALUE_GROUP[self.value]
        group = self.value_group or (usual if dim % usual == 0 else dim)
        if dim % group:
            raise ValueError(
                f"value_group needs to divide the head_dim of values, {dim}, got {group}: pass KVFormat a value_group that does"
            )
        return Format(self.value, channels=group)


KV = KVFormat | str | None
ByLayer = KV | Sequence[KV | Sequence[KV]]


def formats_of(kv: ByLayer, layers: int, kv_heads: int) -> list[list[KVFormat]]:
    """Return the format of each KV head of each layer, ``[layers][KV heads]``.

    ``kv`` is one format for all layers, or a sequence with one entry per layer. The entry of a layer is one format, or a
    sequence with one format per KV head. Raises ``ValueError`` for sequences of the wrong length and for unknown formats, and
    ``TypeError`` for other types.
    """
    by_layer = _each(kv, layers, "layers")
    return [[_format(one) for one in _each(layer, kv_heads, "KV heads")] for layer in by_layer]


def _each(kv: ByLayer, count: int, what: str) -> list[ByLayer]:
    if kv is None or isinstance(kv, str | KVFormat):
        return [kv] * count
    if not isinstance(kv, Sequence):
        raise TypeError(f"kv needs a KVFormat, its name, None, or a sequence of those, got {kv!r}")
    if len(kv) != count:
        raise ValueError(f"kv has formats for {len(kv)} {what}, but the model has {count}: pass one for each, or one for all")
    return list(kv)


def _format(kv: ByLayer) -> KVFormat:
    if isinstance(kv, KVFormat):
        return kv
    if kv is None or isinstance(kv, str):
        return KVFormat(kv, kv)
    raise TypeError(f"kv needs a KVFormat, its name, or None for a KV head, got {kv!r}")


def check_formats(formats: list[list[KVFormat]], device: torch.device) -> None:
    """Raise if the formats cannot be used here: ``ImportError`` without torchao, ``ValueError`` on a GPU without fp8."""
    kinds = {kind for layer in formats for form in layer for kind in (form.key, form.value)} - {None}
    if kinds:
        check_installed(f"kv={sorted(map(str, kinds))[0]!r}", "torchao")
    if "fp8" in kinds and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        raise ValueError(f"fp8 needs a GPU of compute capability 8.9, but {device} has {major}.{minor}: use int8")
