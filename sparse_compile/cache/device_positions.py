"""Where the tokens of a cache stand: in columns, in the text, and in the slots of its rings."""

from __future__ import annotations

import torch
from torch import Tensor


class Positions:
    """The positions of a cache, shared by its layers; see ``cache_update`` for the tensors."""

    def __init__(
        self,
        max_batch: int,
        page_columns: int,
        rings: tuple[tuple[int, int], ...],
        device: torch.device,
        *,
        moving: bool,
        selects: bool,
    ) -> None:
        self.max_batch = max_batch
        self.columns = torch.zeros((), dtype=torch.int64, device=device)
        self.texts = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self.page_texts = torch.full((max_batch, page_columns), -1, dtype=torch.int32, device=device) if page_columns else None
        self.rings = [
            torch.full((max_batch, slots), -1, dtype=torch.int64, device=device) for _, slots in rings for _ in range(2)
        ]
        self.stream = [torch.zeros_like(self.columns), torch.zeros_like(self.texts)] if moving else []
        self.anchor = torch.zeros_like(self.columns) if selects else None

    def tensors(self) -> list[Tensor]:
        """All of them."""
        optional = [tensor for tensor in (self.anchor, self.page_texts) if tensor is not None]
        return [self.columns, self.texts, *self.stream, *optional, *self.rings]

    def clear(self) -> None:
        """No token at all."""
        for tensor in self.tensors():
            tensor.fill_(-1 if tensor.dim() == 2 else 0)

    def choose_anew(self) -> None:
        """The next step scores its pages, whatever was scored before."""
        if self.anchor is not None:
            self.anchor.copy_(self.columns)
