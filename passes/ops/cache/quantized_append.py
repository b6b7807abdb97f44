"""Quantize new tokens of a cache and read quantized pages back, while a compiled graph runs.

The latest tokens stay unquantized in a tail, a ring over columns. With every new token, the token group that is being filled is
quantized again from the tail. No number is therefore ever quantized from an already quantized one.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from sparse_compile.masks.selection.page_scoring import summarize
from sparse_compile.passes.kernels.operands import Append
from sparse_compile.passes.ops.structured import StructuredOp
from sparse_compile.passes.storage.codec import Format, QuantizedTensor, dequantize, quantize

T = TypeVar("T")


class CheckedAppend(NamedTuple, Generic[T]):
    """Tokens to append. With ``finite``, infinite or NaN numbers raise ``ValueError``."""

    new: Append[T]
    finite: bool


def _checked(operands: CheckedAppend[Tensor]) -> None:
    new = operands.new
    if operands.finite and not bool(torch.isfinite(new.k).all() & torch.isfinite(new.v).all()):
        raise ValueError("new keys or values are infinite or not a number, and the cache was built with debug=True")
    append(new)


quantized_append = StructuredOp(
    "quantized_append",
    CheckedAppend,
    _checked,
    fake=lambda operands: None,
    mutates=("new_key_tail", "new_value_tail", "new_keys", "new_values", "new_summary"),
)


def append(new: Append[Tensor]) -> None:
    """Append tokens to quantized pages: one launch on CUDA if each sequence has one token, otherwise plain PyTorch."""
    if new.k.is_cuda and new.k.shape[2] == 1:
        from sparse_compile.passes.kernels.append_token import launch_append  # torch for CPU comes without Triton

        launch_append(new)
    else:
        append_in_torch(new)


def append_in_torch(new: Append[Tensor]) -> None:
    """Append tokens to quantized pages, in plain PyTorch."""
    k, columns, texts = new.k, new.columns, new.texts
    batch, slots = k.shape[0], new.keys.data.shape[2]
    if new.summary is not None:
        column, content, valid = _window(new.key_tail, k, columns, texts, new.page, slots)
        _copy(new.summary, batch, column[:: new.page] // new.page, summarize(content, valid, new.page, new.score))
    sides = ((new.key_tail, new.keys, k, new.key_form), (new.value_tail, new.values, new.v, new.value_form))
    for tail, quantized, tokens, form in sides:
        column, content, valid = _window(tail, tokens, columns, texts, form.tokens, slots)
        made = quantize(content, valid, form)
        _copy(quantized.data, batch, column, made.data)
        for part, numbers in zip(quantized[1:], made[1:], strict=True):
            if part is not None and numbers is not None:
                _copy(part, batch, column[:: form.tokens] // form.tokens, numbers)
    tail_slots = new.key_tail.shape[2]
    latest = min(k.shape[2], tail_slots)
    place = (columns + k.shape[2] - latest + torch.arange(latest, device=k.device)) % tail_slots
    for tail, _, tokens, _ in sides:
        _copy(tail, batch, place, tokens[:, :, -latest:])


def _window(
    tail: Tensor, new: Tensor, columns: Tensor, texts: Tensor | None, group: int, slots: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the columns of the token groups that receive new tokens, the numbers there, and which columns hold a token.

    Older numbers come from the tail. The third value is None, for all columns, if a group is one token.
    """
    tokens = new.shape[2]
    if group == 1:
        return columns + torch.arange(tokens, device=new.device), new, None
    count = min((tokens + group - 2) // group + 1, slots // group)
    number = columns // group + torch.arange(count, device=new.device)
    number = number.clamp(max=slots // group - 1)  # repeat the last group instead of starting at an older one
    column = (number.unsqueeze(1) * group + torch.arange(group, device=new.device)).flatten()
    older = tail[: new.shape[0]].index_select(2, column % tail.shape[2])
    at = (column - columns).clamp(0, tokens - 1)
    content = torch.where((column < columns).view(-1, 1), older, new.index_select(2, at))
    valid = (column < columns + tokens).unsqueeze(0)
    return column, content, valid if texts is None else valid & (texts.index_select(1, column) >= 0)


def _copy(buffer: Tensor, batch: int, at: Tensor, new: Tensor) -> None:
    rows = buffer if batch == buffer.shape[0] else buffer[:batch]
    rows.index_copy_(2, at, new.to(buffer.dtype))


class ReadQuantized(NamedTuple, Generic[T]):
    """Quantized rows to read, as many as ``new`` ``[B, H, Q, D]`` has. With ``exact``, new tokens are returned unquantized."""

    quantized: QuantizedTensor[T]
    new: T
    columns: T
    form: Format
    exact: bool


def _read(operands: ReadQuantized[Tensor]) -> Tensor:
    quantized, new, columns, form, exact = operands
    batch = new.shape[0]
    rows: QuantizedTensor[Tensor] = quantized._replace(
        **{name: part[:batch] for name, part in quantized._asdict().items() if part is not None}
    )
    out = dequantize(rows, form, new.dtype)
    if not form.kind:
        out = out.clone()
    if exact:
        out.index_copy_(2, columns + torch.arange(new.shape[2], device=new.device), new)
    return out


def _read_shape(operands: ReadQuantized[Tensor]) -> Tensor:
    new, data = operands.new, operands.quantized.data
    return new.new_empty(new.shape[0], data.shape[1], data.shape[2], new.shape[3])


# Returns ``[B, H, N, D]`` in the dtype of the new tokens.
read_quantized = StructuredOp("read_quantized", ReadQuantized, _read, fake=_read_shape)
