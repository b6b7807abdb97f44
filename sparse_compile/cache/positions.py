"""Where the tokens of a cache stand: in columns, in the text, and in the slots of its rings."""

from __future__ import annotations

import torch
from torch import Tensor


class Positions:
    """The positions of a cache, shared by its layers; see ``cache_update`` for the tensors."""

    def __init__(
        self, max_batch: int, page_columns: int, rings: tuple[tuple[int, int], ...], device: torch.device, *, moving: bool
    ) -> None:
        self.max_batch = max_batch
        self.columns = torch.zeros((), dtype=torch.int64, device=device)
        self.texts = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self.page_texts = torch.full((max_batch, page_columns), -1, dtype=torch.int32, device=device) if page_columns else None
        self.rings = [
            torch.full((max_batch, slots), -1, dtype=torch.int64, device=device) for _, slots in rings for _ in range(2)
        ]
        self.stream = [torch.zeros_like(self.columns), torch.zeros_like(self.texts)] if moving else []

    def tensors(self) -> list[Tensor]:
        """All of them."""
        pages = [] if self.page_texts is None else [self.page_texts]
        return [self.columns, self.texts, *self.stream, *pages, *self.rings]

    def clear(self) -> None:
        """No token at all."""
        for count in (self.columns, self.texts, *self.stream):
            count.zero_()
        for table in self.tensors()[2 + len(self.stream) :]:
            table.fill_(-1)
