"""A tensor that a mask or a score mod reads, as a value that compares, hashes and prints. It may be a symbol."""

from __future__ import annotations

import ctypes
import hashlib
from typing import Any

import torch
from torch import Tensor

MOST_PRINTED = 16  # numbers of a tensor


class Captured:
    """A tensor that compares by content, or a symbol: the name of a tensor that the compiled model receives when it runs.

    A captured tensor with a name compares and hashes by its name alone, even after its tensor is filled in. Contents must
    not be read while a graph is traced, nor on an accelerator.

    Up to 16 numbers print as they are typed, and more print as a dtype and a shape.

    >>> Captured.of([[True, False]])
    [[True, False]]
    >>> Captured.of([[True] * 100])
    <bool [1, 100]>
    >>> Captured.symbol("attention_mask")
    attention_mask
    """

    def __init__(self, tensor: Tensor | None, name: str = "") -> None:
        self._tensor = tensor
        self.name = name

    @staticmethod
    def of(value: Captured | Tensor | list[Any], dtype: str | None = None) -> Captured:
        """Capture a tensor or nested lists, or return a ``Captured`` unchanged. ``dtype`` names the dtype for lists."""
        if isinstance(value, Captured):
            return value
        if isinstance(value, Tensor):
            return Captured(value.detach())
        return Captured(torch.tensor(value, dtype=getattr(torch, dtype) if dtype else None))

    @staticmethod
    def symbol(name: str) -> Captured:
        """Return a name for a tensor that comes later. ``Mask.bind`` replaces the name by the tensor."""
        return Captured(None, name)

    def filled(self, tensor: Tensor) -> Captured:
        """Return this symbol with its tensor."""
        return Captured(tensor, self.name)

    @property
    def is_symbol(self) -> bool:
        """Whether there is a name but no tensor yet."""
        return self._tensor is None

    @property
    def tensor(self) -> Tensor:
        """The tensor itself. Raises ``ValueError`` for a symbol without a tensor."""
        if self._tensor is None:
            raise ValueError(f"{self.name} stands for a tensor of the compiled graph: bind the mask to a tensor first")
        return self._tensor

    def to(self, device: torch.device | str | None) -> Captured:
        """Return the same tensor on ``device``, or this object if ``device`` is None."""
        return self if device is None else Captured(self.tensor.to(device))

    def tolist(self) -> list[Any]:
        """Return the content as nested lists."""
        content: list[Any] = self.tensor.tolist()
        return content

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Captured):
            return False
        if self.name or other.name:
            return self.name == other.name
        a, b = self.tensor, other.tensor
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b))

    def __hash__(self) -> int:
        return hash(self.name or self.digest())

    def digest(self) -> str:
        """Return a hash of the content that is the same in every process."""
        content = self.tensor.cpu().contiguous()
        # Do not go through numpy: torch does not install it.
        digest = hashlib.sha1(ctypes.string_at(content.data_ptr(), content.nbytes))
        digest.update(f"{tuple(content.shape)} {content.dtype}".encode())
        return digest.hexdigest()

    def __repr__(self) -> str:
        if self.is_symbol:
            return self.name
        dtype = str(self.tensor.dtype).removeprefix("torch.")
        if self.tensor.numel() > MOST_PRINTED:
            return f"<{dtype} {list(self.tensor.shape)}>"
        text = repr(self.tolist()).replace("inf", "float('inf')")
        return text if dtype in ("bool", "int64", "float32") else f"Captured.of({text}, {dtype!r})"
