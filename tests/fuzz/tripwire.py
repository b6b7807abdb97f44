"""A wire in a layer of a model, which raises an error in the middle of a compiled graph when it is armed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Tripped(RuntimeError):
    """The error of an armed wire."""


class Wire:
    """Raises ``Tripped`` once when it is armed. ``with`` disarms it."""

    is_armed = False

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_armed = False


_wires: dict[int, Wire] = {}


@torch.library.custom_op("fuzz::wire", mutates_args=())
def wire(x: Tensor, layer: int) -> Tensor:
    """A copy of ``x``, or ``Tripped``."""
    if _wires[layer].is_armed:
        raise Tripped("the wire is armed")
    return x.clone()


@wire.register_fake
def _(x: Tensor, layer: int) -> Tensor:
    return torch.empty_like(x)


def trip_in(model: Any, layer: int) -> Wire:
    """Lay a wire before the MLP of a layer, so that its attention and those of earlier layers have run."""
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers

    def through(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.ops.fuzz.wire(args[0], layer), *args[1:]

    layers[layer].mlp.register_forward_pre_hook(through)
    _wires[layer] = Wire()
    return _wires[layer]
