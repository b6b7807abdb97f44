"""The oracle for quantized formats: quantize and dequantize one group at a time, in numpy and double precision."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparse_compile.passes.storage.codec import Format

Array = NDArray[np.float64]
LEVELS = {"int8": 255, "int4": 15}
LARGEST = 65504.0  # the largest float16


def float8(code: int) -> float:
    """Return the value of a byte as e4m3: a sign bit, four bits of exponent and three bits of fraction."""
    sign, exponent, fraction = -1.0 if code >> 7 else 1.0, code >> 3 & 15, code & 7
    if code & 127 == 127:
        return float("nan")
    return sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))


FLOAT8 = np.array([float8(code) for code in range(256)])


def groups(form: Format, shape: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], tuple[slice | int, ...]]]:
    """Yield the index of each group in the scales, and its slices in a tensor ``[B, H, N, D]``."""
    tokens, channels = form.tokens, form.channels or shape[3]
    for b, h, t, c in np.ndindex(shape[0], shape[1], shape[2] // tokens, shape[3] // channels):
        yield (b, h, t, c), (b, h, slice(t * tokens, (t + 1) * tokens), slice(c * channels, (c + 1) * channels))


def seen_by(valid: Tensor | None, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return which tokens of each batch row are valid: ``[B, N]``."""
    return np.ones((shape[0], shape[2]), bool) if valid is None else np.broadcast_to(valid.numpy(), (shape[0], shape[2]))


def steps(x: Tensor, valid: Tensor | None, form: Format) -> tuple[Array, Array]:
    """Return the scale of each group, before it is rounded to float16, and its offset."""
    numbers, shape, seen = x.double().numpy(), tuple(x.shape), seen_by(valid, tuple(x.shape))
    scales = np.zeros((*shape[:2], shape[2] // form.tokens, shape[3] // (form.channels or shape[3])))
    offsets = np.zeros_like(scales)
    for place, where in groups(form, shape):
        held = numbers[where][seen[place[0], where[2]]]
        if form.kind == "fp8":
            scales[place] = np.abs(held).max(initial=0) / 448
        elif held.size:
            offsets[place] = half(held.min())
            scales[place] = (held.max() - offsets[place]) / LEVELS[form.kind]
    return scales, offsets


def encode(x: Tensor, valid: Tensor | None, scales: Array, offsets: Array, form: Format) -> Array:
    """Quantize ``x`` with these scales and offsets: ``[B, H, N, D]``, unpacked. Tokens that are not valid become 0."""
    numbers, shape, seen = x.double().numpy(), tuple(x.shape), seen_by(valid, tuple(x.shape))
    quantized = np.zeros(shape)
    for place, where in groups(form, shape):
        count = (numbers[where] - offsets[place]) / scales[place]
        nearest = nearest_float8(count) if form.kind == "fp8" else np.rint(count).clip(0, LEVELS[form.kind])
        quantized[where] = np.where(seen[place[0], where[2]][:, None], nearest, 0)
    return quantized


def half(number: float) -> float:
    """Round a number to float16, and limit it to the largest float16."""
    return float(np.float16(min(max(number, -LARGEST), LARGEST)))


def nearest_float8(group: Array) -> Array:
    """Return the byte of the nearest e4m3 number. Ties go to the even byte, and numbers beyond the range to the largest."""
    finite = [code for code in range(256) if code & 127 != 127 and code != 128]  # byte 128 is -0
    order = sorted(finite, key=lambda code: code & 1)
    distance = np.abs(group[..., None] - FLOAT8[order])
    nearest: Array = np.array(order)[distance.argmin(axis=-1)].astype(np.float64)
    return nearest


def decode(quantized: Array, scales: Array, offsets: Array, form: Format) -> Array:
    """Dequantize unpacked values."""
    out = np.zeros(quantized.shape)
    for place, where in groups(form, quantized.shape):
        count = FLOAT8[quantized[where].astype(int)] if form.kind == "fp8" else quantized[where]
        out[where] = count * scales[place] + offsets[place]
    return out


def unpacked(data: Tensor, form: Format) -> Array:
    """Unpack stored bytes to quantized values ``[B, H, N, D]``."""
    bytes_: NDArray[np.uint8] = data.numpy()
    if form.kind != "int4":
        return bytes_.astype(np.float64)
    return np.concatenate([bytes_ % 16, bytes_ // 16], axis=3).astype(np.float64)


def scales_of(parts: list[Tensor], form: Format) -> tuple[Array, Array]:
    """Return the stored scale and offset of each group."""
    scales = parts[1].double().numpy()
    return scales, np.zeros_like(scales) if form.kind == "fp8" else parts[2].double().numpy()


def read(parts: list[Tensor], form: Format) -> Tensor:
    """Dequantize a stored tensor, given as its parts, in double precision."""
    if not form.kind:
        return parts[0].double()
    return torch.from_numpy(decode(unpacked(parts[0], form), *scales_of(parts, form), form))
