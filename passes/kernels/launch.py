"""Launch Triton kernels on the tensors' own device, and early: while the previous launch is still ending."""

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
    """Launch on the device of the first argument, or of its first field if the argument is a structure.

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
    """Whether a launch may begin while the one before it ends (Hopper and newer).

    The programs of such a launch call ``gdc_wait`` before they read what the previous launch writes.
    """
    return bool(torch.cuda.get_device_properties(device).major >= 9)
