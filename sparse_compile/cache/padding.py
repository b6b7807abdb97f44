"""Which columns of a cache are padding, and the attention mask that a model gets in place of the one of the tokenizer."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_compile.passes.torch_private import mark_static


class Padding:
    """Which columns of a cache hold a token (True) and which hold padding (False).

    ``valid`` ``[B, columns]`` covers every column of the cache for the ``B`` sequences in use, and is True beyond the last
    token. It is None while no column is padding. Its address and shape do not change from step to step, so a decode step is
    the same graph however long the text is. ``is_left`` says that in every sequence all padding comes before all tokens.
    """

    def __init__(self, max_batch: int, columns: int, device: torch.device) -> None:
        self.valid: Tensor | None = None
        self.is_left = True
        self._size = max_batch, columns
        self._device = device
        self._buffer: Tensor | None = None  # allocated for the first padding
        self._rows: dict[int, Tensor] = {}  # the views of the buffer that graphs know, by their number of rows
        self._agrees = False  # whether the mask of the last prompt agreed with this record

    def mask_for(self, mask: Tensor | None, tokens: int, held: int) -> Tensor | None:
        """Return the mask that the model gets for ``tokens`` new tokens after ``held`` others: None, ``valid``, or ``mask``.

        ``mask`` ``[B, held + tokens]`` is not 0 where a token is, as tokenizers write it. A prompt is looked at once, which
        waits for the device. A decode step is never looked at: its mask passes unchanged, unless ``for_next_step`` has made it.
        """
        stop = held + tokens
        if mask is None or mask.dim() != 2 or mask.shape[1] != stop or mask.shape[0] > self._size[0]:
            return mask
        if tokens == 1 and held:
            return self.valid if self._is_extended(mask) else mask
        seen = mask != 0
        before = self.valid[: len(mask), :held].to(mask.device) if self.valid is not None else torch.ones_like(seen[:, :held])
        facts = [seen.all(), (seen[:, :held] == before).all(), (seen[:, 1:] >= seen[:, :-1]).all()]
        is_full, self._agrees, is_left = torch.stack(facts).tolist()
        if not self._agrees:
            return mask  # it hides tokens that the cache holds, or shows padding
        if self.valid is None and is_full:
            return None
        valid = self.open(len(mask))
        valid[:, held:stop] = seen[:, held:].to(valid.device)
        valid[:, stop:] = True
        self.is_left = is_left
        return valid

    def restore(self, valid: Tensor) -> None:
        """Record the padding ``[B, n]`` of the first ``n`` columns, of a cache that was read from a file."""
        self.open(len(valid))[:, : valid.shape[1]] = valid.to(self._device)
        self.is_left = bool((valid[:, 1:] >= valid[:, :-1]).all())

    def open(self, rows: int) -> Tensor:
        """Return ``valid`` for ``rows`` sequences, and record padding from now on. Nothing is padding at first."""
        if self._buffer is None:
            self._buffer = torch.ones(self._size, dtype=torch.bool, device=self._device)
        elif self.valid is None:
            self._buffer.fill_(True)
        if rows not in self._rows:
            self._rows[rows] = self._buffer if rows == self._size[0] else self._buffer[:rows]
            mark_static(self._rows[rows])
        self.valid = self._rows[rows]
        return self.valid

    def _is_extended(self, mask: Tensor) -> bool:
        """Whether ``mask`` is one that ``for_next_step`` has returned."""
        is_ours = getattr(mask, "sparse_cache_padding", None) is self
        return is_ours and self.valid is not None and len(self.valid) == len(mask)

    def for_next_step(self, mask: Tensor) -> Tensor | None:
        """Return the mask for the next step of ``generate``, which extends the mask of the prompt by ones.

        It is None where nothing is padding, so that it need not be extended any more.
        """
        if not self._agrees:
            return mask
        if self.valid is None:
            return None
        mask.sparse_cache_padding = self  # type: ignore[attr-defined]  # read by ``_is_extended``
        return mask

    def for_more(self, mask: Tensor | None, tokens: int) -> Tensor | None:
        """Return the mask for ``tokens`` tokens that follow those of ``mask``, the mask of a step."""
        if mask is None or self._is_extended(mask):
            return mask if mask is None else self.valid
        return torch.nn.functional.pad(mask, (0, tokens), value=1) if tokens else mask

    def select(self, rows: Tensor) -> None:
        """Let row ``i`` continue from the contents of row ``rows[i]``."""
        if self.valid is not None:
            picked = self.valid.index_select(0, rows)
            self.open(len(rows)).copy_(picked)

    def crop(self, columns: int) -> None:
        """Forget everything from column ``columns`` on."""
        if self.valid is not None:
            self.valid[:, columns:] = True

    def clear(self) -> None:
        """Forget all padding. The memory stays, at its address."""
        self.valid, self.is_left, self._agrees = None, True, False
