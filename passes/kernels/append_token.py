# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
"""Append one token of each sequence on CUDA: store it, quantize the groups that it belongs to, and summarize its page.

``ops/cache/quantized_append.py`` and ``storage/codec.py`` define the results. The quantized bits must equal those of a prefill.
Every operation is therefore the one that torch uses on CUDA; torch divides by a Python number by multiplying with its inverse.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparse_compile.passes.kernels.launch import on_its_device, starts_early
from sparse_compile.passes.kernels.operands import Append
from sparse_compile.passes.storage.codec import LEVELS, Format, QuantizedTensor

# How many numbers of a key group one program quantizes. With more, it would need registers that page scoring cannot spare.
TILE_SIZE = 1024


@on_its_device
def launch_append(new: Append[Tensor]) -> None:
    """Append one token of each sequence, ``k`` and ``v`` ``[B, H, 1, *]``, in one launch. All state must be contiguous."""
    tensors = [
        new.key_tail,
        new.value_tail,
        *new.keys.used(),
        *new.values.used(),
        *([] if new.summary is None else [new.summary]),
    ]
    assert new.k.shape[2] == 1 and all(tensor.is_contiguous() for tensor in tensors)
    width, pages = (0, 0) if new.summary is None else (new.summary.shape[3], new.summary.shape[2])
    sizes = group_sizes(new.key_form, new.value_form, new.k.shape[3], new.v.shape[3])
    early = starts_early(new.k.device)
    _append_codes[(sizes["PARTS"], new.k.shape[0] * new.k.shape[1])](
        **new_token(new.k, new.v),
        key_tail=new.key_tail,
        value_tail=new.value_tail,
        **quantized_pointers(new.keys, new.values),
        summary=new.summary,
        columns=new.columns,
        texts=new.texts,
        text_b=0 if new.texts is None else new.texts.stride(0),
        slots=new.keys.data.shape[2],
        tail=new.key_tail.shape[2],
        pages=pages,
        **sizes,
        HEADS=new.k.shape[1],
        DIM=new.k.shape[3],
        DIM_V=new.v.shape[3],
        WIDTH=width,
        PAGE=new.page,
        MINMAX=new.score == "minmax",
        EARLY=early,
        num_warps=4,
        launch_pdl=early,
    )


def new_token(k: Tensor, v: Tensor) -> dict[str, Any]:
    """Return the kernel arguments for one token of each sequence: the tensors and their strides."""
    strides = {
        f"{name}_{axis}": x.stride(at) for name, x in (("k", k), ("v", v)) for axis, at in (("b", 0), ("h", 1), ("d", 3))
    }
    return {"k": k, "v": v, **strides}


def quantized_pointers(
    keys: QuantizedTensor[Tensor] | None, values: QuantizedTensor[Tensor] | None
) -> dict[str, Tensor | None]:
    """Return the tensors of quantized keys and values as kernel arguments. All are None if nothing is quantized."""
    named = (("key", keys), ("value", values))
    return {
        f"{name}_{part}": None if quantized is None else getattr(quantized, part)
        for name, quantized in named
        for part in ("data", "scale", "offset")
    }


def group_sizes(keys: Format, values: Format, dim: int, dim_v: int) -> dict[str, Any]:
    """Return the constants for quantizing a token of these sizes.

    The first of PARTS programs quantizes the values, and keys that have a group for each token. The other programs quantize
    keys in groups of several tokens.
    """
    assert keys.channels == (1 if keys.kind in LEVELS else 0) and values.tokens == 1
    size = dim // 2 if keys.kind == "int4" else dim
    rows = triton.next_power_of_2(keys.tokens)
    block = min(triton.next_power_of_2(size), max(TILE_SIZE // rows, 16))
    return {
        "KEYS": keys.kind,
        "KEY_GROUP": keys.tokens,
        "VALUES": values.kind,
        "VALUE_GROUP": values.channels or dim_v,
        "TILE": block,
        "PARTS": 1 if keys.tokens == 1 else 1 + triton.cdiv(size, block),
    }


@triton.jit
def _append_codes(
    k, v, key_tail, value_tail, key_data, key_scale, key_offset, value_data, value_scale, value_offset, summary, columns, texts,
    k_b, k_h, k_d, v_b, v_h, v_d, text_b, slots, tail, pages,
    KEYS: tl.constexpr, KEY_GROUP: tl.constexpr, VALUES: tl.constexpr, VALUE_GROUP: tl.constexpr, TILE: tl.constexpr,
    PARTS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr,
    PAGE: tl.constexpr, MINMAX: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // HEADS, row % HEADS
    now = tl.load(columns).to(tl.int32)
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    if part == 0:
        fresh = store_token(k, k_d, key_tail, now, row, tail, DIM)
        store_token(v, v_d, value_tail, now, row, tail, DIM_V)
        encode_token(v, v_d, value_data, value_scale, value_offset, now, row, slots, VALUES, DIM_V, VALUE_GROUP)
        if KEY_GROUP == 1:
            encode_token(k, k_d, key_data, key_scale, key_offset, now, row, slots, KEYS, DIM, 1)
        if summary is not None:
            summarize(key_tail, fresh, summary, texts, now, row, batch, text_b, pages, tail, DIM, WIDTH, PAGE, PAGE, MINMAX)
    elif KEY_GROUP > 1:
        encode_tile(part - 1, k, k_d, key_tail, key_data, key_scale, key_offset, texts, now, row, batch, text_b, slots, tail,
                    KEYS, DIM, KEY_GROUP, TILE)  # fmt: skip


@triton.jit
def store_token(new, new_d, buffer, column, row, slots, DIM):
    """Store a token in the slot of its column, and return it."""
    channel = tl.arange(0, triton.next_power_of_2(DIM))
    fresh = tl.load(new + channel * new_d, mask=channel < DIM, other=0).to(buffer.dtype.element_ty)
    tl.store(buffer + (row * slots + column % slots) * DIM + channel, fresh, mask=channel < DIM)
    return fresh


@triton.jit
def encode_tile(
    tile, new, new_d, tail, data, scales, offsets, texts, column, row, batch, text_b, slots, length, KIND, DIM, TOKENS, BLOCK,
):  # fmt: skip
    """Quantize some channels of the newest token's group of TOKENS tokens. The older tokens of the group are in ``tail``."""
    BYTES: tl.constexpr = DIM // 2 if KIND == "int4" else DIM
    number = tl.arange(0, triton.next_power_of_2(TOKENS))
    group = row * (slots // TOKENS) + column // TOKENS
    at = column // TOKENS * TOKENS + number
    inside = number < TOKENS
    seen = inside & (at <= column)
    if texts is not None:
        seen &= tl.load(texts + batch * text_b + at, mask=seen, other=-1) >= 0
    tail += row * length * DIM
    byte = tile * BLOCK + tl.arange(0, BLOCK)
    in_head = byte < BYTES
    scales += group * DIM
    offsets += group * DIM
    quantized = tl.zeros([number.shape[0], BLOCK], tl.int32)
    for half in tl.range(2 if KIND == "int4" else 1):  # not unrolled: each copy of the code takes 10 KiB
        channel = byte + half * BYTES
        integers = _encode_channels(new, new_d, tail, scales, offsets, column, at, seen, length, channel, in_head, KIND, DIM)
        quantized |= integers << (half * 4)
    target = data + (group * TOKENS + number)[:, None] * BYTES + byte[None, :]
    tl.store(target, quantized.to(tl.uint8), mask=inside[:, None] & in_head[None, :])


@triton.jit
def _encode_channels(new, new_d, tail, scales, offsets, column, at, seen, length, channel, there, KIND, DIM):
    """Quantize some channels of a group of tokens, store the scales and offsets, and return the integers."""
    source = tail + (at % length)[:, None] * DIM + channel[None, :]
    older = tl.load(source, mask=(seen & (at < column))[:, None] & there[None, :], other=0)
    fresh = tl.load(new + channel * new_d, mask=there, other=0).to(older.dtype)
    # The newest token does not come from the tail, because another program stores it there.
    x = tl.where((at == column)[:, None], fresh[None, :], older).to(tl.float32)
    quantized, scale, offset = _codes(x, seen[:, None], 0, False, KIND)
    tl.store(scales + channel, scale, mask=there)
    tl.store(offsets + channel, offset, mask=there)
    return quantized


@triton.jit
def encode_token(new, new_d, data, scales, offsets, column, row, slots, KIND, DIM, CHANNELS):
    """Store a token: unquantized if KIND is empty, with one scale in fp8, else quantized in groups of CHANNELS."""
    place = row * slots + column
    if KIND == "":
        store_token(new, new_d, data, column, row, slots, DIM)
    elif KIND == "fp8":
        _encode_floats(new, new_d, data, scales, place, DIM)
    else:
        GROUPS: tl.constexpr = DIM // CHANNELS
        COUNT: tl.constexpr = triton.next_power_of_2(GROUPS)
        SPAN: tl.constexpr = triton.next_power_of_2(CHANNELS)
        group, member = tl.arange(0, COUNT), tl.arange(0, SPAN)
        channel = group[:, None] * CHANNELS + member[None, :]
        valid = (group < GROUPS)[:, None] & (member < CHANNELS)[None, :]
        x = tl.load(new + channel * new_d, mask=valid, other=0).to(tl.float32)
        quantized, scale, offset = _codes(x, valid, 1, CHANNELS == 1, KIND)
        tl.store(scales + place * GROUPS + group, scale, mask=group < GROUPS)
        tl.store(offsets + place * GROUPS + group, offset, mask=group < GROUPS)
        if KIND == "int4":
            byte = tl.arange(0, triton.next_power_of_2(DIM // 2))
            half = byte < DIM // 2
            quantized = tl.reshape(quantized, [COUNT * SPAN])
            low, high = tl.where(half, byte, 0), tl.where(half, byte + DIM // 2, 0)
            packed = tl.gather(quantized, low // CHANNELS * SPAN + low % CHANNELS, 0)
            packed |= tl.gather(quantized, high // CHANNELS * SPAN + high % CHANNELS, 0) << 4
            tl.store(data + place * (DIM // 2) + byte, packed.to(tl.uint8), mask=half)
        else:
            tl.store(data + place * DIM + channel, quantized.to(tl.uint8), mask=valid)


@triton.jit
def _encode_floats(new, new_d, data, scales, place, DIM):
    """Quantize a token to e4m3 with one scale."""
    channel = tl.arange(0, triton.next_power_of_2(DIM))
    x = tl.load(new + channel * new_d, mask=channel < DIM, other=0).to(tl.float32)
    _, largest = tl.reduce((x, tl.abs(x)), 0, _range)
    scale = _rounded_up(largest * (1.0 / 448))
    near = _within(tl.div_rn(x, scale.to(tl.float32)), 448.0)
    tl.store(scales + place, scale)
    tl.store(data + place * DIM + channel, near.to(tl.float8e4nv).to(tl.uint8, bitcast=True), mask=channel < DIM)


@triton.jit
def _codes(x, seen, AXIS, SINGLE, KIND):
    """Quantize groups along AXIS: return integers as int32, scales and offsets. With SINGLE, a group is one number."""
    LEVELS: tl.constexpr = 15 if KIND == "int4" else 255
    infinite = float("inf")
    least, most = tl.reduce((tl.where(seen, x, infinite), tl.where(seen, x, -infinite)), AXIS, _range)
    offset = _within(tl.where(least == infinite, 0.0, least), 65504.0).to(tl.float16)
    zero = offset.to(tl.float32)
    # Rounded subtraction is monotonic, so the extremes of ``x - zero`` come from the extremes of ``x``.
    lowest, highest = least - zero, most - zero
    reach = highest if SINGLE else tl.where(highest < 0, 0.0, highest) - tl.where(lowest > 0, 0.0, lowest)
    scale = _rounded_up(reach * (1.0 / LEVELS))
    inverse = tl.div_rn(1.0, scale.to(tl.float32))
    steps = (x - tl.expand_dims(zero, AXIS)) * tl.expand_dims(inverse, AXIS)
    # The clamp keeps the product from being fused with the sum below. The last bits of that sum are the nearest integer.
    limited = tl.minimum(tl.maximum(tl.where(seen, steps, 0.0), 0.0), 1.0 * LEVELS)
    return (limited + 8388608.0).to(tl.int32, bitcast=True) & 255, scale, offset


@triton.jit
def _range(low, high, low_, high_):
    """Combine minima and maxima so that NaN propagates, as in torch. Triton's own reductions drop NaN."""
    every: tl.constexpr = tl.PropagateNan.ALL
    return tl.minimum(low, low_, propagate_nan=every), tl.maximum(high, high_, propagate_nan=every)


@triton.jit
def _within(x, limit):
    return tl.where(x < -limit, -limit, tl.where(x > limit, limit, x))


@triton.jit
def _rounded_up(scale):
    """Round a scale to float16 as ``_rounded_up`` of ``storage/codec.py`` does, after clamping it to at least ``2**-24``."""
    least: tl.constexpr = 2.0**-24
    scale = tl.where(scale < least, least, tl.where(scale > 65504.0, 65504.0, scale))
    near = scale.to(tl.float16)
    above = (near.to(tl.int16, bitcast=True) + 1).to(tl.float16, bitcast=True)
    return tl.where(near.to(tl.float32) < scale * (1 - 2.0**-10), above, near)


@triton.jit
def summarize(keys, fresh, summary, texts, column, row, batch, text_b, pages, tail, DIM, WIDTH, PAGE, PAGE_SIZE, MINMAX):
    """Write the summary of the logical page that holds ``column``. ``fresh`` is the key of that column; None reads ``keys``."""
    ROWS: tl.constexpr = triton.next_power_of_2(PAGE)
    CHANNELS: tl.constexpr = triton.next_power_of_2(DIM)
    channel = tl.arange(0, CHANNELS)
    logical = column // PAGE
    at = logical * PAGE + tl.arange(0, ROWS)
    seen = (tl.arange(0, ROWS) < PAGE) & (at <= column)
    valid = seen[:, None] & (channel[None, :] < DIM)
    source = keys + (row * tail + at % tail)[:, None] * DIM + channel[None, :]
    if fresh is None:
        block = tl.load(source, mask=valid, other=0).to(tl.float32)
    else:  # other threads may not see the stored key yet
        newest = (at == column)[:, None]
        block = tl.load(source, mask=valid & (at < column)[:, None], other=0).to(tl.float32)
        block = tl.where(newest, fresh[None, :].to(tl.float32), block)
    if texts is not None:
        seen &= tl.load(texts + batch * text_b + at, mask=seen, other=-1) >= 0
    count = tl.sum(seen.to(tl.int32), axis=0)
    target = summary + (row * pages * (PAGE_SIZE // PAGE) + logical) * WIDTH + channel
    if MINMAX:
        low = tl.min(tl.where(seen[:, None], block, float("inf")), axis=0)
        high = tl.max(tl.where(seen[:, None], block, float("-inf")), axis=0)
        tl.store(target, tl.where(count > 0, low, 0).to(summary.dtype.element_ty), mask=channel < DIM)
        tl.store(target + DIM, tl.where(count > 0, high, 0).to(summary.dtype.element_ty), mask=channel < DIM)
    else:
        mean = tl.sum(tl.where(seen[:, None], block, 0), axis=0) / tl.maximum(count, 1).to(tl.float32)
        tl.store(target, mean.to(summary.dtype.element_ty), mask=channel < DIM)
