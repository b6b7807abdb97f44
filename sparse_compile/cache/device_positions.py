"""Device tensors that hold the positions of cached tokens: columns, text positions and ring slots."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.cache.padding import Padding


class DevicePositions:
    """The position tensors that all layers of a cache share. ``cache_update`` documents each tensor."""

    def __init__(
        self,
        max_batch: int,
        columns: int,
        page_columns: int,
        rings: tuple[tuple[int, int], ...],
        device: torch.device,
        *,
        moving: bool,
        selects: bool,
    ) -> None:
        self.max_batch = max_batch
        self.padding = Padding(max_batch, columns, device)
        self.columns = torch.zeros((), dtype=torch.int64, device=device)
        self.texts = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self.page_texts = torch.full((max_batch, page_columns), -1, dtype=torch.int32, device=device) if page_columns else None
        self.rings = [
            torch.full((max_batch, slots), -1, dtype=torch.int64, device=device) for _, slots in rings for _ in range(2)
        ]
        self.stream = [torch.zeros_like(self.columns), torch.zeros_like(self.texts)] if moving else []
        self.anchor = torch.zeros_like(self.columns) if selects else None

    def tensors(self) -> list[Tensor]:
        """All position tensors."""
        optional = [tensor for tensor in (self.anchor, self.page_texts) if tensor is not None]
        return [self.columns, self.texts, *self.stream, *optional, *self.rings]

    def clear(self) -> None:
        """Reset the positions to those of an empty cache."""
        for tensor in self.tensors():
            tensor.fill_(-1 if tensor.dim() == 2 else 0)
        self.padding.clear()

    def choose_anew(self) -> None:
        """Make the next decode step score its pages again instead of reusing earlier scores."""
        if self.anchor is not None:
            self.anchor.copy_(self.columns)
