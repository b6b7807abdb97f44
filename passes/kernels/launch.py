"""How Triton kernels are launched on CUDA: on the device of their tensors, and early."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

A = TypeVar("A")
P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launcher: Callable[Concatenate[A, P], R]) -> Callable[Concatenate[A, P], R]:
    """Launch on the device of the first tensor: of the first argument, or of the first field if that is a structure.

    Triton launches on the current device, and only Inductor makes the tensors' device the current one.
    """

    @wraps(launcher)
    def launch(first: A, /, *others: P.args, **named: P.kwargs) -> R:
        tensor: Any = first
        if not isinstance(first, Tensor):
            tensor = tensor[0]
        with torch.cuda.device_of(tensor):
            return launcher(first, *others, **named)

    return launch


def starts_early(device: torch.device) -> bool:
    """Whether a launch may begin while the one before it ends; its programs wait before they read anything (``gdc_wait``)."""
    return bool(torch.cuda.get_device_properties(device).major >= 9)
