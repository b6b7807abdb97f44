"""Mask patterns that read tensors: prefix lengths, padding, or a whole mask."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from sparse_compile.masks.bounds import Bounds, Sieve
from sparse_compile.masks.captured import Captured
from sparse_compile.masks.intervals import INF, Intervals
from sparse_compile.masks.mask import Index, Mask
from sparse_compile.masks.patterns.positional import at_least, before
from sparse_compile.masks.patterns.runs import over_runs

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


def check_batch(what: str, tensor: Tensor, batch: int) -> None:
    if tensor.shape[0] not in (1, batch):
        raise ValueError(
            f"{what} was built for batch size {tensor.shape[0]}, but the attention has batch size {batch}: give one row for "
            "each sequence, or one for all"
        )


def check_length(what: str, tensor: Tensor, needed: int) -> None:
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
            check_batch("prefix", Captured.of(self.lengths).tensor, batch)

    def implies(self, other: Mask) -> bool:
        if isinstance(other, Prefix) and isinstance(self.lengths, int) and isinstance(other.lengths, int):
            return self.lengths <= other.lengths
        return super().implies(other)


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
        maybe, surely = Intervals.of(start, stop), Intervals.of(start, torch.where(holes, start, stop))
        if hi is lo:  # a decode step need not pay for holes, which are rare
            return Bounds(maybe, surely)
        shown = valid.to(torch.uint8).view(valid.shape[0], 1, 1, -1)
        return Bounds(maybe, surely, _Table(shown, shown, torch.zeros((), dtype=torch.int64, device=lo.device)))

    def sizes(self) -> tuple[int, int]:
        return Captured.of(self.valid).tensor.shape[0], 1

    def check(self, batch: int, heads: int, q_len: int, kv_len: int, q_offset: int = 0) -> None:
        valid = Captured.of(self.valid).tensor
        check_batch("padding", valid, batch)
        check_length("padding", valid, kv_len)


@dataclass(frozen=True, repr=False)
class Explicit(Mask):
    """Show exactly the pairs of a bool tensor: ``visible[b, h, i - q_start, j - kv_start]``.

    Use it for masks that no formula describes. ``visible`` is ``[B, H, Q, KV]``; an axis of size 1 is broadcast. ``q_start``
    and ``kv_start`` are the text positions of its first query and key: integers, or one-element integer tensors. Earlier keys
    are hidden, so that a mask for the last keys can be joined to another one, as for a tree of drafted tokens
    (SpecInfer, https://arxiv.org/abs/2305.09781).

        >>> tree = [[[[True, False], [True, True]]]]
        >>> print((prefix(2) | explicit(tree, q_start=2, kv_start=2)).draw(2, 4, q_offset=2))
        ███·
        ████
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
        seen = look_up(visible, b, h, i, j)
        return (j >= 0) & seen if self._starts_late and visible.shape[3] != 1 else seen

    @property
    def _starts_late(self) -> bool:
        """Whether keys before the first one of the tensor are hidden. A start that is a tensor is that of the attention."""
        return isinstance(self.kv_start, int) and self.kv_start > 0

    def bounds(self, lo: Tensor, hi: Tensor) -> Bounds:
        visible = Captured.of(self.visible).tensor
        q_len, kv_len = visible.shape[2:]
        i, shift = self._local(lo, torch.zeros((), dtype=torch.int64, device=lo.device))
        k, _ = self._local(hi, shift)
        shown = visible.flatten(0, 1).to(torch.uint8)  # [B * H, Q, KV]
        if q_len == 1:
            some, every = (shown.expand(-1, lo.numel(), -1) for _ in range(2))
        else:
            some, every = over_runs(shown, i, k, "amax"), over_runs(shown, i, k, "amin")
        some, every = (x.view(*visible.shape[:2], -1, kv_len) for x in (some, every))  # [B, H, rows, KV]
        if kv_len == 1:
            start = torch.where(some[..., 0] > 0, -INF, INF)
            sure = torch.where(every[..., 0] > 0, -INF, INF)
            return Bounds(Intervals.of(start, INF), Intervals.of(sure, INF))
        seen = some.amax(dim=-1) > 0
        first = torch.where(seen, some.argmax(dim=-1), kv_len) - shift
        last = torch.where(seen, kv_len - some.flip(-1).argmax(dim=-1), 0) - shift
        return Bounds(Intervals.of(first, last), Intervals.nothing(first), _Table(some, every, shift))

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
            late = what == "keys" and isinstance(start, int) and start > 0
            begins = late or (isinstance(start, int) and start <= first)
            if size != 1 and isinstance(start, int) and not (begins and first + length <= start + size):
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


@dataclass(frozen=True, eq=False)
class _Table(Sieve):
    """The keys that some query of each run sees, and those that every query does: uint8 ``[B, H, rows, KV]``.

    The first key of the tables is at position ``-shift``.
    """

    seen: Tensor
    by_all: Tensor
    shift: Tensor

    def some(self, start: Tensor, stop: Tensor) -> Tensor:
        return self._count(self.seen, start, stop) > 0

    def every(self, start: Tensor, stop: Tensor) -> Tensor:
        return self._count(self.by_all, start, stop) == stop - start

    def _count(self, shown: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        before = pad(shown.cumsum(dim=-1, dtype=torch.int32), (1, 0))  # [B, H, rows, KV + 1]
        lead = torch.broadcast_shapes(before.shape[:-1], start.shape[:-1])
        at = ((x + self.shift).clamp(0, shown.shape[-1]).expand(*lead, -1) for x in (stop, start))
        end, begin = (before.expand(*lead, -1).gather(-1, x) for x in at)
        return end - begin


prefix = Prefix
padding = Padding
explicit = Explicit
