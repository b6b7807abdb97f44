"""Quantized keys and values as ``KVFormat`` documents them, one group at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = {"int8": 255, "int4": 15}
VALUE_GROUP = {"int8": 128, "int4": 32}
KEY_GROUP = 32


@dataclass(frozen=True)
class Stored:
    """The format of the keys and values of a KV head, in a cache with pages of ``page_size`` tokens."""

    kind: str
    page_size: int


def stored(form: Stored, k: Tensor, v: Tensor, pad: int, stop: int, fresh: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``[n, dim]`` as they are read when ``stop`` tokens are held. Those from ``fresh`` on are unquantized."""
    keys, values = k.clone(), v.clone()
    if form.kind == "fp8":
        for j in range(stop):
            keys[j], values[j] = _fp8(k[j]), _fp8(v[j])
    else:
        size = min(KEY_GROUP, form.page_size)
        for first in range(0, pad + stop, size):
            held = [column - pad for column in range(first, first + size) if pad <= column < pad + stop]
            for channel in range(k.shape[1]):
                keys[held, channel] = _steps(k[held, channel], form.kind)
        width = VALUE_GROUP[form.kind] if v.shape[1] % VALUE_GROUP[form.kind] == 0 else v.shape[1]
        for j in range(stop):
            for start in range(0, v.shape[1], width):
                values[j, start : start + width] = _steps(v[j, start : start + width], form.kind)
    keys[fresh:stop], values[fresh:stop] = k[fresh:stop], v[fresh:stop]
    return keys, values


def _fp8(x: Tensor) -> Tensor:
    scale = x.abs().max() / 448
    return (x / scale).to(torch.float8_e4m3fn).to(x.dtype) * _half(scale) if float(scale) else x


def _steps(x: Tensor, kind: str) -> Tensor:
    if not x.numel():
        return x
    offset = _half(x.min())
    scale = (x.max() - offset) / LEVELS[kind]
    if float(scale) <= 0:
        return offset.expand_as(x)
    return ((x - offset) / scale).round().clamp(0, LEVELS[kind]) * _half(scale) + offset


def _half(x: Tensor) -> Tensor:
    return x.to(torch.float16).to(x.dtype)
