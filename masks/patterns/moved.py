"""Masks of tiles, masks that start at a later position, and masks for whole rows of queries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_compile.masks.bounds import Bounds, Moved
from sparse_compile.masks.intervals import INF, Intervals
from sparse_compile.masks.mask import Index
from sparse_compile.masks.patterns.positional import at_least
from sparse_compile.masks.patterns.wrapped import Wrapped, check_inner


@dataclass(frozen=True, repr=False)
class Coarse(Wrapped):
    """Apply ``mask`` to tiles of ``q`` queries and ``kv`` keys: pair ``(i, j)`` is visible if it shows ``(i // q, j // kv)``.

    Positions of ``mask`` number tiles. ``coarse(causal, q=n, kv=n)`` is block-causal, as in block diffusion
    (https://arxiv.org/abs/2503.09573), and a coarse ``neighborhood`` is Sliding Tile Attention over tokens in tile order
    (https://arxiv.org/abs/2502.04507).

        >>> print(coarse(causal, q=2, kv=2).draw(4, 4))
        ██··
        ██··
        ████
        ████
    """

    q: int = 1
    kv: int = 1
    name: ClassVar[str] = "coarse"

    def __post_init__(self) -> None:
        check_inner(self)
        at_least("coarse q", self.q)
        at_least("coarse kv", self.kv)

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        return self.mask.__call__(b, h, q_idx // self.q, kv_idx // self.kv)

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        tile = lo // self.q
        inner = self.mask.bounds(tile, tile if hi is lo else hi // self.q)
        maybe = self._keys(inner.maybe)
        surely = maybe if inner.certain and hi is lo else self._keys(inner.surely)
        size = self.kv
        sieve = Moved(inner.sieve, lambda start, stop: (start // size, (stop - 1) // size + 1)) if inner.sieve else None
        return Bounds(maybe, surely, sieve)

    def _keys(self, tiles: Intervals) -> Intervals:
        """Return the keys of ``tiles``. An edge without limit keeps none."""
        size = self.kv
        within = tiles.clamp(0, INF // size)
        return Intervals(tuple((a * size, b * size) for a, b in within.columns), within.rows)

    def check(self, batch: int, heads: int, q_len: int, kv_len: int, q_offset: int = 0) -> None:
        first, last = q_offset // self.q, (q_offset + q_len - 1) // self.q
        self.mask.check(batch, heads, last - first + 1, (kv_len - 1) // self.kv + 1, first)


@dataclass(frozen=True, repr=False)
class Shifted(Wrapped):
    """Let ``mask`` start at query ``q`` and key ``kv``: pair ``(i, j)`` is visible if ``mask`` shows ``(i - q, j - kv)``.

    Earlier queries and keys are in no visible pair, so a mask can be laid over a part of the text: the grid of an image behind
    a prompt, or one quadrant of block diffusion. A negative number starts in the middle of ``mask``:
    ``shifted(causal, q=-2)`` also shows the next two keys.

        >>> print(shifted(causal, q=1, kv=2).draw(4, 5))
        ·····
        ··█··
        ··██·
        ··███
    """

    q: int = 0
    kv: int = 0
    name: ClassVar[str] = "shifted"

    def __post_init__(self) -> None:
        check_inner(self)
        for field, value in (("q", self.q), ("kv", self.kv)):
            at_least(f"shifted {field}", value, least=-INF)

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        visible = self.mask.__call__(b, h, q_idx - self.q, kv_idx - self.kv)
        for index, start in ((q_idx, self.q), (kv_idx, self.kv)):
            visible = visible & (index >= start) if start > 0 else visible
        return visible

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        first = (lo - self.q).clamp(min=0)
        inner = self.mask.bounds(first, first if hi is lo else (hi - self.q).clamp(min=0))
        maybe = inner.maybe - -self.kv
        surely = maybe if inner.certain else inner.surely - -self.kv
        shift = self.kv
        sieve = Moved(inner.sieve, lambda start, stop: (start - shift, stop - shift)) if inner.sieve else None
        moved = Bounds(maybe, surely, sieve)
        if self.q <= 0 and self.kv <= 0:
            return moved
        if self.q <= 0:
            keys = Intervals.of(self.kv, INF, lo)
            return moved & Bounds(keys, keys)
        shown, sure = (Intervals.of(torch.where(at >= self.q, max(self.kv, 0), INF), INF) for at in (hi, lo))
        return moved & Bounds(shown, shown if hi is lo else sure)

    def check(self, batch: int, heads: int, q_len: int, kv_len: int, q_offset: int = 0) -> None:
        first, last = max(q_offset - self.q, 0), max(q_offset + q_len - 1 - self.q, 0)
        self.mask.check(batch, heads, last - first + 1, max(kv_len - self.kv, 1), first)


@dataclass(frozen=True, repr=False)
class OfQueries(Wrapped):
    """Show all keys to the queries at whose own position ``mask`` shows a key: ``mask`` at the pair ``(i, i)``.

    This turns a mask of keys into one of queries. ``padding(chosen) | of_queries(padding(chosen))`` has Longformer's global
    tokens (https://arxiv.org/abs/2004.05150), and ``of_queries(prefix(n))`` the text rows of Sparse VideoGen
    (https://arxiv.org/abs/2502.01776). ``of_queries(rows) & mask`` keeps ``mask`` for some rows only.

        >>> print((of_queries(sink(1)) | sink(1)).draw(3, 3))
        ███
        █··
        █··
    """

    name: ClassVar[str] = "of_queries"

    def __post_init__(self) -> None:
        check_inner(self)

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        return (kv_idx == kv_idx) & self.mask.__call__(b, h, q_idx, q_idx)

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        if hi is lo:
            batch, heads = self.mask.sizes()
            b, h = torch.arange(batch, device=lo.device).view(-1, 1, 1), torch.arange(heads, device=lo.device).view(-1, 1)
            shown = torch.as_tensor(self.mask.__call__(b, h, lo, lo))
            seen = _all_keys(shown & (lo == lo))
            return Bounds(seen, seen)
        inner = self.mask.bounds(lo, hi)
        run = lo.unsqueeze(-1), hi.unsqueeze(-1) + 1
        return Bounds(_all_keys(inner.some(*run).squeeze(-1)), _all_keys(inner.every(*run).squeeze(-1)))

    def check(self, batch: int, heads: int, q_len: int, kv_len: int, q_offset: int = 0) -> None:
        self.mask.check(batch, heads, q_len, q_offset + q_len, q_offset)


def _all_keys(rows: Tensor) -> Intervals:
    """Return all keys where ``rows`` ``[..., rows]`` is True, and none elsewhere."""
    return Intervals.of(torch.where(rows, -INF, INF), INF)


coarse = Coarse
shifted = Shifted
of_queries = OfQueries
