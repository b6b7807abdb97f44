"""Mask patterns that read tensors: prefix lengths, document ids, padding, or a whole mask."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from sparse_compile.masks.captured import Captured
from sparse_compile.masks.intervals import Bounds, Intervals
from sparse_compile.masks.mask import Index, Mask
from sparse_compile.masks.patterns.positional import at_least, before

TensorLike = Captured | Tensor | list[Any]
BOOL = (torch.bool,)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def capture(mask: Mask, field: str, rank: int, shape: str, dtypes: tuple[torch.dtype, ...]) -> None:
    captured = Captured.of(getattr(mask, field))
    if not captured.is_symbol:
        tensor = captured.tensor
        if tensor.dim() != rank:
            got = list(tensor.shape)
            raise ValueError(
                f"{mask.name} needs {field} of shape {shape}, got {got}: add the missing axis or drop the extra one"
            )
        if tensor.dtype not in dtypes:
            kinds = " or ".join(["bool"] * (torch.bool in dtypes) + ["integer"] * (torch.int64 in dtypes))
            raise TypeError(f"{mask.name} needs {field} of {kinds} dtype, got {tensor.dtype}: convert the tensor first")
    object.__setattr__(mask, field, captured)


def look_up(tensor: Tensor, *index: Index) -> Any:
    """Return ``tensor[index]``, where an axis of size 1 is broadcast to every index.

    The clamp at 0 proves to the compiler that no index is negative. Without it, FlexAttention's C++ template would have to wrap
    the index around an axis of dynamic size, which does not compile (``ks2 was not declared``, torch 2.13).
    """
    return tensor[tuple(x * 0 if size == 1 else _not_negative(x) for x, size in zip(index, tensor.shape, strict=True))]


def _not_negative(x: Index) -> Index:
    return x.clamp(min=0) if isinstance(x, Tensor) else max(x, 0)


def _check_batch(what: str, tensor: Tensor, batch: int) -> None:
    if tensor.shape[0] not in (1, batch):
        raise ValueError(
            f"{what} was built for batch size {tensor.shape[0]}, but the attention has batch size {batch}: give one row for "
            "each sequence, or one for all"
        )


def _check_length(what: str, tensor: Tensor, needed: int) -> None:
    if tensor.shape[1] < needed:
        raise ValueError(
            f"{what} covers {tensor.shape[1]} positions, but the attention reaches position {needed - 1}: "
            f"give at least {needed} positions"
        )


@dataclass(frozen=True, repr=False)
class Prefix(Mask):
    """Every query sees the first ``lengths[b]`` keys, so the prefix attends in both directions (PrefixLM).

    ``lengths`` is an integer or an integer tensor ``[B]``.

        >>> print((causal | prefix(2)).draw(3, 3))
        ██·
        ██·
        ███
    """

    lengths: int | TensorLike
    name: ClassVar[str] = "prefix"

    def __post_init__(self) -> None:
        if isinstance(self.lengths, int):
            at_least("prefix length", self.lengths, least=0)
        else:
            capture(self, "lengths", 1, "[batch]", INTEGERS)

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        if isinstance(self.lengths, int):
            return kv_idx < self.lengths
        lengths = Captured.of(self.lengths).tensor
        return kv_idx < look_up(lengths, b)

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        if isinstance(self.lengths, int):
            seen = before(self.lengths, lo)
        else:
            lengths = Captured.of(self.lengths).tensor
            seen = before(lengths.long().view(-1, 1, 1).expand(-1, 1, lo.shape[-1]), lo)
        return Bounds(maybe=seen, surely=seen)

    def sizes(self) -> tuple[int, int]:
        return (1, 1) if isinstance(self.lengths, int) else (Captured.of(self.lengths).tensor.shape[0], 1)

    def check(self, batch: int, heads: int, q_len: int, kv_len: int, q_offset: int = 0) -> None:
        if not isinstance(self.lengths, int):
            _check_batch("prefix", Captured.of(self.lengths).tensor, batch)

    def implies(self, other: Mask) -> bool:
        if isinstance(other, Prefix) and isinstance(self.lengths, int) and isinstance(other.lengths, int):
            return self.lengths <= other.lengths
        return super().implies(other)


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
        first, last, size = _extent(ids)
        earliest = _over_runs(first, lo, hi, "amin")
        latest = _over_runs(last, lo, hi, "amax")
        one = (_over_runs(ids, lo, hi, "amin") == _over_runs(ids, lo, hi, "amax")) & (latest - earliest + 1 == size[:, lo])
        stop = latest + 1
        maybe = Intervals.of(earliest.unsqueeze(1), stop.unsqueeze(1))
        return Bounds(maybe, Intervals.of(earliest.unsqueeze(1), torch.where(one, stop, earliest).unsqueeze(1)))

    def sizes(self) -> tuple[int, int]:
        return Captured.of(self.ids).tensor.shape[0], 1

    def check(self, batch: int, heads: int, q_len: int, kv_len: int, q_offset: int = 0) -> None:
        ids = Captured.of(self.ids).tensor
        _check_batch("document", ids, batch)
        _check_length("document", ids, max(q_len + q_offset, kv_len))


def _extent(ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for each position of ``ids`` ``[B, N]``, the first, the last and the number of positions with the same id."""
    n = ids.shape[1]
    value, order = ids.sort(dim=1, stable=True)
    left = torch.searchsorted(value, value, side="left")
    right = torch.searchsorted(value, value, side="right")
    # The sort is stable, so positions ascend within one id, and the ends of its run are its first and last position.
    ends = torch.stack([order.gather(1, left), order.gather(1, (right - 1).clamp(max=n - 1)), right - left])
    first, last, size = torch.empty_like(ends).scatter(2, order.expand(3, -1, -1), ends)
    return first, last, size


def _over_runs(values: Tensor, lo: Tensor, hi: Tensor, reduce: Literal["amin", "amax"]) -> Tensor:
    """Return the minimum or maximum of ``values`` ``[B, N]`` over each run of positions ``lo..hi``: ``[B, rows]``."""
    position = torch.arange(values.shape[1], device=values.device)
    row = (torch.searchsorted(lo.contiguous(), position, right=True) - 1).clamp(min=0)
    inside = (position >= lo[row]) & (position <= hi[row])
    worst = torch.iinfo(values.dtype).max if reduce == "amin" else torch.iinfo(values.dtype).min
    start = torch.full((values.shape[0], lo.numel()), worst, dtype=values.dtype, device=values.device)
    return start.scatter_reduce(1, row.expand_as(values), torch.where(inside, values, worst), reduce)


@dataclass(frozen=True, repr=False)
class Padding(Mask):
    """Every query sees the keys that are not padding: ``valid[b, j]``, the 2-D ``attention_mask`` of transformers.

    ``valid`` is a bool tensor ``[B, N]`` over key positions; a ``B`` of 1 fits every batch size. Integers work too: every
    value but 0 counts as True. Block tables are tight for padding on the left, on the right, or on both sides.

        >>> print((causal & padding([[False, True, True]])).draw(3, 3))
        ···
        ·█·
        ·██
    """

    valid: TensorLike
    name: ClassVar[str] = "padding"

    def __post_init__(self) -> None:
        capture(self, "valid", 2, "[batch, positions]", BOOL + INTEGERS)

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        valid = Captured.of(self.valid).tensor
        seen = look_up(valid, b, kv_idx)
        return seen if seen.dtype == torch.bool else seen != 0

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        valid = Captured.of(self.valid).tensor != 0
        first = valid.int().argmax(dim=1)
        count = valid.sum(dim=1)
        last = valid.shape[1] - valid.flip(1).int().argmax(dim=1)
        start = first.view(-1, 1, 1).expand(-1, 1, lo.shape[-1])
        stop = torch.where(count > 0, last, first).view(-1, 1, 1).expand_as(start)
        holes = (count < last - first).view(-1, 1, 1)
        return Bounds(maybe=Intervals.of(start, stop), surely=Intervals.of(start, torch.where(holes, start, stop)))

    def sizes(self) -> tuple[int, int]:
        return Captured.of(self.valid).tensor.shape[0], 1

    def check(self, batch: int, heads: int, q_len: int, kv_len: int, q_offset: int = 0) -> None:
        valid = Captured.of(self.valid).tensor
        _check_batch("padding", valid, batch)
        _check_length("padding", valid, kv_len)


@dataclass(frozen=True, repr=False)
class Explicit(Mask):
    """Show exactly the pairs of a bool tensor: ``visible[b, h, i - q_start, j - kv_start]``.

    Use it for masks that no formula describes. ``visible`` is ``[B, H, Q, KV]``; an axis of size 1 is broadcast. ``q_start``
    and ``kv_start`` are the text positions of its first query and key: integers, or one-element integer tensors.

        >>> print(explicit([[[[True, False], [True, True]]]]).draw(2, 2))
        █·
        ██
    """

    visible: TensorLike
    q_start: int | TensorLike = 0
    kv_start: int | TensorLike = 0
    name: ClassVar[str] = "explicit"

    def __post_init__(self) -> None:
        capture(self, "visible", 4, "[batch, heads, queries, keys]", BOOL)
        for field in ("q_start", "kv_start"):
            if not isinstance(getattr(self, field), int):
                capture(self, field, 1, "[1]", INTEGERS)

    def _local(self, q_idx: Index, kv_idx: Index) -> tuple[Any, Any]:
        q_start = self.q_start if isinstance(self.q_start, int) else Captured.of(self.q_start).tensor[0]
        kv_start = self.kv_start if isinstance(self.kv_start, int) else Captured.of(self.kv_start).tensor[0]
        return q_idx - q_start, kv_idx - kv_start

    def __call__(self, b: Index, h: Index, q_idx: Index, kv_idx: Index) -> Any:
        visible = Captured.of(self.visible).tensor
        i, j = self._local(q_idx, kv_idx)
        return look_up(visible, b, h, i, j)

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        visible = Captured.of(self.visible).tensor
        if visible.shape[3] == 1:
            return Bounds(maybe=Intervals.everything(lo), surely=Intervals.nothing(lo))
        batch, heads, q_len, kv_len = visible.shape
        i, shift = self._local(lo, torch.zeros((), dtype=torch.int64, device=lo.device))
        k, _ = self._local(hi, shift)
        seen = visible.any(-1)
        first = torch.where(seen, visible.int().argmax(dim=-1), kv_len).flatten(0, 1)
        last = torch.where(seen, kv_len - visible.flip(-1).int().argmax(dim=-1), 0).flatten(0, 1)
        if q_len > 1:
            first, last = _over_runs(first, i, k, "amin"), _over_runs(last, i, k, "amax")
        start = (first - shift).unflatten(0, (batch, heads)).expand(-1, -1, lo.numel())
        stop = (last - shift).unflatten(0, (batch, heads)).expand(-1, -1, lo.numel())
        maybe = Intervals.of(start, stop)
        return Bounds(maybe=maybe, surely=Intervals.nothing(start))

    def sizes(self) -> tuple[int, int]:
        shape = Captured.of(self.visible).tensor.shape
        return shape[0], shape[1]

    def check(self, batch: int, heads: int, q_len: int, kv_len: int, q_offset: int = 0) -> None:
        shape = Captured.of(self.visible).tensor.shape
        for what, size, needed in (("batch rows", shape[0], batch), ("heads", shape[1], heads)):
            if size not in (1, needed):
                raise ValueError(f"explicit was built for {size} {what}, but the attention has {needed}")
        axes = (("queries", shape[2], self.q_start, q_offset, q_len), ("keys", shape[3], self.kv_start, 0, kv_len))
        for what, size, start, first, length in axes:
            # A start that is a tensor is not checked: reading it would wait for the device.
            if size != 1 and isinstance(start, int) and not start <= first <= first + length <= start + size:
                raise ValueError(
                    f"explicit covers {what} {start} to {start + size - 1}, "
                    f"but the attention has {what} {first} to {first + length - 1}"
                )

    def for_head(self, head: int, heads: int) -> Mask:
        visible = Captured.of(self.visible)
        if visible.is_symbol or visible.tensor.shape[1] == 1:  # the shape of a symbol is not known yet
            return self
        if visible.tensor.shape[1] != heads:
            raise ValueError(f"explicit was built for {visible.tensor.shape[1]} heads, but the attention has {heads}")
        return replace(self, visible=Captured(visible.tensor[:, head : head + 1]))


prefix = Prefix
document = Document
padding = Padding
explicit = Explicit
