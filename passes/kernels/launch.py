"""How kernels are launched on CUDA: where their tensors lie, and early."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def where_it_lies(launcher: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """``launcher`` on the device of its first tensor: Triton launches on the current one, and Inductor alone makes it that."""

    @wraps(launcher)
    def there(first: Tensor, /, *others: P.args, **named: P.kwargs) -> R:
        with torch.cuda.device_of(first):
            return launcher(first, *others, **named)

    return there


def starts_early(device: torch.device) -> bool:
    """Whether a launch may begin while the one before it ends; its programs wait before they read anything (``gdc_wait``)."""
    return bool(torch.cuda.get_device_properties(device).major >= 9)
