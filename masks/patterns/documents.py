"""Mask patterns for packed sequences: tokens see the keys of their own document."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparse_compile.masks.bounds import Bounds
from sparse_compile.masks.captured import Captured
from sparse_compile.masks.intervals import Intervals
from sparse_compile.masks.mask import Index, Mask, agree
from sparse_compile.masks.patterns.runs import over_runs
from sparse_compile.masks.patterns.tensor import INTEGERS, TensorLike, capture, check_batch, check_length, look_up


@dataclass(frozen=True, repr=False)
class Document(Mask):
    """Each query sees the keys of its own document: ``ids[b, i] == ids[b, j]`` (packed sequences).

    ``ids`` is an integer tensor ``[B, N]`` over text positions; a ``B`` of 1 fits every batch size. The positions of a
    document may be scattered, but block tables are tight only if each document is one run of positions.

        >>> print((causal & document([[0, 0, 1]])).draw(3, 3))
        █··
        ██·
        ··█
    """

    ids: TensorLike
    name: ClassVar[str] = "document"

    def __post_init__(self) -> None:
        capture(self, "ids", 2, "[batch, positions]", INTEGERS)

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        ids = Captured.of(self.ids).tensor
        return look_up(ids, b, q_idx) == look_up(ids, b, kv_idx)

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        ids = Captured.of(self.ids).tensor
        return _same_id(ids, ids, lo, hi)

    def sizes(self) -> tuple[int, int]:
        return Captured.of(self.ids).tensor.shape[0], 1

    def check(self, batch: int, heads: int, q_len: int, kv_len: int, q_offset: int = 0) -> None:
        ids = Captured.of(self.ids).tensor
        check_batch("document", ids, batch)
        check_length("document", ids, max(q_len + q_offset, kv_len))


@dataclass(frozen=True, repr=False)
class Documents(Mask):
    """Each query sees the keys with its own id, where queries and keys are numbered apart: ``q_ids[b, i] == kv_ids[b, j]``.

    ``q_ids`` ``[B, Q]`` and ``kv_ids`` ``[B, KV]`` are integer tensors over the positions of queries and of keys; a ``B`` of 1
    fits every batch size. Use it where keys are not those of the queries, as in Flamingo, where text sees the image before it
    (https://arxiv.org/abs/2204.14198). A query whose id no key has sees nothing. Block tables are tight if the ids of queries
    and of keys ascend and every document has queries and keys.

        >>> print(documents([[-1, 0, 1, 1]], [[0, 0, 1, 1, 1]]).draw(4, 5))
        ·····
        ██···
        ··███
        ··███
    """

    q_ids: TensorLike
    kv_ids: TensorLike
    name: ClassVar[str] = "documents"

    def __post_init__(self) -> None:
        capture(self, "q_ids", 2, "[batch, queries]", INTEGERS)
        capture(self, "kv_ids", 2, "[batch, keys]", INTEGERS)

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        q_ids, kv_ids = Captured.of(self.q_ids).tensor, Captured.of(self.kv_ids).tensor
        return look_up(q_ids, b, q_idx) == look_up(kv_ids, b, kv_idx)

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        return _same_id(Captured.of(self.q_ids).tensor, Captured.of(self.kv_ids).tensor, lo, hi)

    def sizes(self) -> tuple[int, int]:
        return agree("batch", [Captured.of(ids).tensor.shape[0] for ids in (self.q_ids, self.kv_ids)]), 1

    def check(self, batch: int, heads: int, q_len: int, kv_len: int, q_offset: int = 0) -> None:
        for field, ids, needed in (("q_ids", self.q_ids, q_len + q_offset), ("kv_ids", self.kv_ids, kv_len)):
            check_batch(f"{field} of documents", Captured.of(ids).tensor, batch)
            check_length(f"{field} of documents", Captured.of(ids).tensor, needed)


def _same_id(q_ids: Tensor, kv_ids: Tensor, lo: Tensor, hi: Tensor) -> Bounds:
    """Return the bounds of the keys whose id is that of a query in ``lo..hi``."""
    first, last, size = extent(q_ids, kv_ids)
    earliest = over_runs(first, lo, hi, "amin")
    latest = over_runs(last, lo, hi, "amax")
    one_id = over_runs(q_ids, lo, hi, "amin") == over_runs(q_ids, lo, hi, "amax")
    whole = one_id & (latest - earliest + 1 == size[:, lo.clamp(0, size.shape[1] - 1)])
    stop = latest + 1
    maybe = Intervals.of(earliest.unsqueeze(1), stop.unsqueeze(1))
    return Bounds(maybe, Intervals.of(earliest.unsqueeze(1), torch.where(whole, stop, earliest).unsqueeze(1)))


def extent(q_ids: Tensor, kv_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first, the last and the number of keys with the id of each query: ``[B, Q]`` each.

    For an id that no key has, the first key is behind all keys and the last one before them.
    """
    batch, n = max(q_ids.shape[0], kv_ids.shape[0]), kv_ids.shape[1]
    value, order = kv_ids.long().expand(batch, -1).sort(dim=1, stable=True)
    wanted = q_ids.long().expand(batch, -1).contiguous()
    left = torch.searchsorted(value, wanted, side="left")
    right = torch.searchsorted(value, wanted, side="right")
    # The sort is stable, so positions ascend within one id, and the ends of its run are its first and last position.
    some = right > left
    first = torch.where(some, order.gather(1, left.clamp(max=n - 1)), n)
    last = torch.where(some, order.gather(1, (right - 1).clamp(min=0)), -1)
    return first, last, right - left


document = Document
documents = Documents
