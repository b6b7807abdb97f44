"""Pages of a cache that are kept in fewer bits, while a compiled graph runs: new tokens are encoded, and read back.

The latest tokens stay as they came in a tail, a ring over columns: the group of tokens that is being filled is encoded anew
from there with every token, so that no number is ever encoded from its own code.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_compile.masks.selection.page_scoring import describe
from sparse_compile.passes.storage.codec import Codes, Format, dequantize, quantize

PARTS = ("key_data", "key_scale", "key_offset", "value_data", "value_scale", "value_offset")


@torch.library.custom_op("sparse_compile::append_codes", mutates_args=("key_tail", "value_tail", *PARTS, "digest"))
def append_codes(
    key_tail: Tensor,
    value_tail: Tensor,
    key_data: Tensor,
    key_scale: Tensor | None,
    key_offset: Tensor | None,
    value_data: Tensor,
    value_scale: Tensor | None,
    value_offset: Tensor | None,
    digest: Tensor | None,
    k: Tensor,
    v: Tensor,
    columns: Tensor,
    texts: Tensor | None,
    key_form: str,
    value_form: str,
    page: int,
    score: str,
    finite: bool,
) -> None:
    """Append ``k`` and ``v`` ``[B, H, Q, *]`` at column ``columns``: their codes, and the tails ``[max_batch, H, T, *]``.

    ``texts`` ``[B, N]`` is negative for padding, which takes no part in scales. ``digest``, if there is one, gets the pages of
    ``page`` keys that the tokens went to, from the numbers as they came. With ``finite`` numbers that are not are an error.
    """
    if finite and not bool(torch.isfinite(k).all() & torch.isfinite(v).all()):
        raise ValueError("new keys or values are infinite or not a number, and the cache was built with debug=True")
    keys, values = Codes(key_data, key_scale, key_offset), Codes(value_data, value_scale, value_offset)
    forms = Format.from_text(key_form), Format.from_text(value_form)
    appending(k)(key_tail, value_tail, keys, values, digest, k, v, columns, texts, *forms, page, score)


@append_codes.register_fake
def _(*operands: object) -> None:
    return None


def appending(k: Tensor) -> Callable[..., None]:
    """What appends ``k``: on CUDA one launch for a token of each sequence, otherwise plain PyTorch."""
    if not k.is_cuda or k.shape[2] != 1:
        return _append
    from sparse_compile.passes.kernels.append_token import launch_append  # torch for CPU comes without Triton

    launch: Callable[..., None] = launch_append
    return launch


def _append(
    key_tail: Tensor,
    value_tail: Tensor,
    keys: Codes[Tensor],
    values: Codes[Tensor],
    digest: Tensor | None,
    k: Tensor,
    v: Tensor,
    columns: Tensor,
    texts: Tensor | None,
    key_form: Format,
    value_form: Format,
    page: int,
    score: str,
) -> None:
    batch, slots = k.shape[0], keys.data.shape[2]
    if digest is not None:
        column, content, valid = _window(key_tail, k, columns, texts, page, slots)
        _copy(digest, batch, column[::page] // page, describe(content, valid, page, score))
    for tail, codes, new, form in ((key_tail, keys, k, key_form), (value_tail, values, v, value_form)):
        column, content, valid = _window(tail, new, columns, texts, form.tokens, slots)
        made = quantize(content, valid, form)
        _copy(codes.data, batch, column, made.data)
        for part, numbers in zip(codes[1:], made[1:], strict=True):
            if part is not None and numbers is not None:
                _copy(part, batch, column[:: form.tokens] // form.tokens, numbers)
    kept = min(k.shape[2], key_tail.shape[2])
    place = (columns + k.shape[2] - kept + torch.arange(kept, device=k.device)) % key_tail.shape[2]
    for tail, new in ((key_tail, k), (value_tail, v)):
        _copy(tail, batch, place, new[:, :, -kept:])


def _window(
    tail: Tensor, new: Tensor, columns: Tensor, texts: Tensor | None, group: int, slots: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The columns of the groups that new tokens went to, the numbers there (older ones of the tail), and which are a token."""
    tokens = new.shape[2]
    if group == 1:
        return columns + torch.arange(tokens, device=new.device), new, None
    count = min((tokens + group - 2) // group + 1, slots // group)
    number = columns // group + torch.arange(count, device=new.device)
    number = number.clamp(max=slots // group - 1)  # the last one twice, rather than one that was left before
    column = (number.unsqueeze(1) * group + torch.arange(group, device=new.device)).flatten()
    older = tail[: new.shape[0]].index_select(2, column % tail.shape[2])
    at = (column - columns).clamp(0, tokens - 1)
    content = torch.where((column < columns).view(-1, 1), older, new.index_select(2, at))
    valid = (column < columns + tokens).unsqueeze(0)
    return column, content, valid if texts is None else valid & (texts.index_select(1, column) >= 0)


def _copy(buffer: Tensor, batch: int, at: Tensor, new: Tensor) -> None:
    rows = buffer if batch == buffer.shape[0] else buffer[:batch]
    rows.index_copy_(2, at, new.to(buffer.dtype))


@torch.library.custom_op("sparse_compile::read_codes", mutates_args=())
def read_codes(
    data: Tensor, scale: Tensor | None, offset: Tensor | None, new: Tensor, columns: Tensor, form: str, exact: bool
) -> Tensor:
    """The numbers of the rows that ``new`` has, ``[B, H, N, D]`` in its dtype; if ``exact`` the new ones are ``new`` itself."""
    batch = new.shape[0]
    scale, offset = (None if part is None else part[:batch] for part in (scale, offset))
    kept_in = Format.from_text(form)
    out = dequantize(Codes(data[:batch], scale, offset), kept_in, new.dtype)
    if not kept_in.kind:
        out = out.clone()
    if exact:
        out.index_copy_(2, columns + torch.arange(new.shape[2], device=new.device), new)
    return out


@read_codes.register_fake
def _(
    data: Tensor, scale: Tensor | None, offset: Tensor | None, new: Tensor, columns: Tensor, form: str, exact: bool
) -> Tensor:
    return new.new_empty(new.shape[0], data.shape[1], data.shape[2], new.shape[3])
