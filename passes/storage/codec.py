"""Quantize and dequantize keys and values with torchao's primitives.

``int8`` and ``int4`` store unsigned integers, which stand for ``integer * scale + offset``. They are equal steps above the
smallest number of a group. A group of keys is one channel of neighboring tokens, because some key channels are far larger than
others in all tokens. A group of values is neighboring channels of one token (KIVI, https://arxiv.org/abs/2402.02750).

``fp8`` is e4m3 with a scale for each token. Scales and offsets are float16, which rounds eight times finer than bfloat16. The
group sizes were chosen by the errors in ``bench/results/quantized-error.csv``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from sparse_compile.passes.storage.graph_text import rides_in_graphs

T = TypeVar("T")
KINDS = ("int8", "int4", "fp8")
LEVELS = {"int8": 255, "int4": 15}
LARGEST = 65504.0  # the largest finite float16


class QuantizedTensor(NamedTuple, Generic[T]):
    """The stored form of a tensor ``[B, H, N, D]``. ``T`` is a tensor or a graph node. An unquantized tensor has only ``data``.

    ``data`` is uint8:

    | format | shape              | content                                                                         |
    |--------|--------------------|---------------------------------------------------------------------------------|
    | int8   | ``[B, H, N, D]``   | one integer in a byte                                                           |
    | int4   | ``[B, H, N, D/2]`` | channel ``c`` in the lower half of a byte, channel ``c + D / 2`` in the upper   |
    | fp8    | ``[B, H, N, D]``   | the bits of float8_e4m3fn, because torch cannot copy fp8 by index               |

    ``scale`` and ``offset`` are float16, one for each group. ``fp8`` has no ``offset``.
    """

    data: T
    scale: T | None = None
    offset: T | None = None

    def used(self) -> list[T]:
        """The fields that are not None."""
        return [part for part in self if part is not None]


@rides_in_graphs
@dataclass(frozen=True)
class Format:
    """The format of stored keys or values.

    ``kind`` is one of ``KINDS``, or empty if they are not quantized. ``tokens`` x ``channels`` numbers share a scale; 0
    ``channels`` means all channels of the head.
    """

    kind: str = ""
    tokens: int = 1
    channels: int = 0

    def __str__(self) -> str:
        return f"{self.kind}/{self.tokens}/{self.channels}"

    @property
    def count(self) -> int:
        """The number of tensors that a ``QuantizedTensor`` of this format has."""
        return {"": 1, "fp8": 2}.get(self.kind, 3)

    def block(self, dim: int) -> tuple[int, int, int, int]:
        """The sizes of a group along each axis, as torchao expects them."""
        return 1, 1, self.tokens, self.channels or dim

    def parts(self, heads: int, slots: int, dim: int, dtype: torch.dtype) -> Iterator[tuple[tuple[int, ...], torch.dtype]]:
        """Yield the shape without the batch axis, and the dtype, of each tensor. ``dtype`` is that of unquantized data."""
        _, _, tokens, channels = self.block(dim)
        yield (heads, slots, dim // 2 if self.kind == "int4" else dim), torch.uint8 if self.kind else dtype
        for _ in range(self.count - 1):
            yield (heads, slots // tokens, dim // channels), torch.float16


def quantize(x: Tensor, valid: Tensor | None, form: Format) -> QuantizedTensor[Tensor]:
    """Quantize ``x`` ``[B, H, N, D]``, where N is a whole number of groups.

    Tokens that are not ``valid`` ``[B | 1, N]`` (None: all are) do not affect scales and offsets.
    """
    from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

    if not form.kind:
        return QuantizedTensor(x)
    x, block = x.float(), form.block(x.shape[3])
    seen = None if valid is None else valid[:, None, :, None]
    if form.kind == "fp8":
        x = x if seen is None else torch.where(seen, x, 0)
        scale, _ = choose_qparams_affine(x, MappingType.SYMMETRIC, block, torch.float8_e4m3fn, eps=2.0**-24)
        scale = _rounded_up(scale).view(_per_group(x, block))
        # A division and a cast, because torchao's `quantize_affine` rounds to integers before it casts.
        return QuantizedTensor((x / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8), scale)
    grouped = _grouped(x if seen is None else torch.where(seen, x, torch.inf), block)
    least = grouped.amin(dim=(3, 5))
    offset = torch.where(least == torch.inf, 0, least).clamp(-LARGEST, LARGEST).half()
    above = x - _spread(offset.float(), block)
    above = above if seen is None else torch.where(seen, above, 0)
    levels = LEVELS[form.kind]
    if max(block) > 1:
        limits = {"quant_min": 0, "quant_max": levels, "eps": 2.0**-24}
        scale, _ = choose_qparams_affine(above, MappingType.ASYMMETRIC, block, torch.uint8, **limits)
    else:  # torchao treats this block size as a single group over the whole tensor
        scale = (above / levels).clamp(min=2.0**-24)
    scale = _rounded_up(scale).view(offset.shape)
    none = torch.zeros_like(scale, dtype=torch.int32)  # numbers below the offset are there only because the offset was rounded
    data = quantize_affine(above, block, scale.float(), none, torch.uint8, 0, levels)
    if form.kind == "int4":
        low, high = data.chunk(2, dim=-1)
        data = low | high << 4
    return QuantizedTensor(data, scale, offset)


def dequantize(quantized: QuantizedTensor[Tensor], form: Format, dtype: torch.dtype) -> Tensor:
    """Return the numbers ``[B, H, N, D]`` that ``quantized`` stands for, in ``dtype``."""
    from torchao.quantization.quant_primitives import dequantize_affine

    if quantized.scale is None:
        return quantized.data.to(dtype)
    data, scale = quantized.data, quantized.scale.float()
    if form.kind == "int4":
        data = torch.cat([data & 15, data >> 4], dim=-1)
    block = form.block(data.shape[3])
    if quantized.offset is None:
        data = data.view(torch.float8_e4m3fn)
        numbers: Tensor = dequantize_affine(data, block, scale, None, data.dtype, output_dtype=torch.float32)
        return numbers.to(dtype)
    none = torch.zeros_like(scale, dtype=torch.int32)
    above = dequantize_affine(data, block, scale, none, torch.uint8, 0, LEVELS[form.kind], output_dtype=torch.float32)
    spread: Tensor = above + _spread(quantized.offset.float(), block)
    return spread.to(dtype)


def _rounded_up(scale: Tensor) -> Tensor:
    """Round a scale to float16, but never far below its value, as rounding to nearest would do for tiny scales.

    With a scale that is too small, the largest number of a group would not be representable.
    """
    scale = scale.clamp(max=LARGEST)
    near = scale.half()
    return torch.where(near.float() < scale * (1 - 2**-10), (near.view(torch.int16) + 1).view(torch.float16), near)


def _per_group(x: Tensor, block: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size // of for size, of in zip(x.shape, block, strict=True))


def _grouped(x: Tensor, block: tuple[int, ...]) -> Tensor:
    """Reshape to ``[B, H, groups of tokens, tokens, groups of channels, channels]``."""
    grouped: Tensor = x.unflatten(3, (-1, block[3])).unflatten(2, (-1, block[2]))
    return grouped


def _spread(x: Tensor, block: tuple[int, ...]) -> Tensor:
    """Repeat the number of each group for every element of the group."""
    return x.repeat_interleave(block[2], dim=2).repeat_interleave(block[3], dim=3)
