# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, assignment"
# ruff: noqa: RUF005 (Triton has no starred tuples, and a tuple that grows changes its type)
"""Dequantize keys and values inside a kernel: turn bytes into numbers in the registers that the tensor cores read.

Bytes are loaded as units of 16 bits, which hold two or four channels. ``ldmatrix`` lays units out for the tensor cores as it
does 16-bit numbers. Each unit then becomes one number in each of several parts, and every part has a matrix product of its own.
Triton's own conversions would move each number through shared memory once more, and take an instruction for each number.

With ``FAST``, parts are float16, and PTX makes two numbers at a time. Otherwise they are float32, which works on any device.
"""

from __future__ import annotations

import triton
import triton.language as tl

PARTS = {"": 1, "int8": 2, "fp8": 2, "int4": 4}


@triton.jit
def channels_of(unit, part: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr, PAIRED: tl.constexpr):
    """Return the channel that ``part`` takes from each unit.

    With ``PAIRED``, an even unit and the next one hold four neighboring channels, and a part takes two of them. In int4, this
    holds in each half of the head.
    """
    if PARTS == 1:
        return unit
    elif PAIRED:
        return unit // 2 * 4 + unit % 2 + part % 2 * 2 + part // 2 * (DIM // 2)
    else:
        return unit * 2 + part % 2 + part // 2 * (DIM // 2)


@triton.jit
def read_keys(quantized, scales, offsets, KIND: tl.constexpr, FAST: tl.constexpr):
    """Return keys in parts, which are ``PAIRED`` if ``FAST``. The scale of fp8 is not applied.

    ``scales`` and ``offsets`` are words ``[tokens, units]`` of two float16, for the channels of each unit. int4 has two such
    tensors of each.
    """
    if KIND == "":
        return (quantized,)
    elif KIND == "fp8":
        if FAST:
            return _paired_fp8(quantized)
        else:
            return _decode(quantized & 255), _decode((quantized >> 8) & 255)
    elif FAST:
        if KIND == "int8":
            return _paired_int8(quantized, scales[0], offsets[0])
        else:
            return _paired_int4(quantized, scales[0], offsets[0], scales[1], offsets[1])
    else:
        parts = _separate(quantized, KIND)
        keys = ()
        for part in tl.static_range(len(parts)):
            shift = part % 2 * 16
            keys = keys + (parts[part] * _half(scales[part // 2] >> shift) + _half(offsets[part // 2] >> shift),)
        return keys


@triton.jit
def read_values(quantized, KIND: tl.constexpr, FAST: tl.constexpr):
    """Return values in parts, without scale and offset. Integers are too small by the factor ``steps_in_one``."""
    if KIND == "":
        return (quantized,)
    elif KIND == "fp8":
        if FAST:
            return _fp8(quantized)
        else:
            return _decode(quantized & 255), _decode((quantized >> 8) & 255)
    elif not FAST:
        return _separate(quantized, KIND)
    elif KIND == "int8":
        return _tiny_int8(quantized)
    else:
        return _tiny_int4(quantized)


@triton.jit
def steps_in_one(part: tl.constexpr, FAST: tl.constexpr):
    """Return the factor by which the integers of a part of ``read_values`` must be multiplied."""
    if not FAST:
        return 1.0
    elif part < 2:
        return 2.0**24
    else:
        return 2.0**20


@triton.jit
def _half(word):
    return word.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _separate(quantized, KIND: tl.constexpr):
    low, high = quantized & 255, (quantized >> 8) & 255
    if KIND == "int8":
        return low.to(tl.float32), high.to(tl.float32)
    else:
        return (low & 15).to(tl.float32), (high & 15).to(tl.float32), (low >> 4).to(tl.float32), (high >> 4).to(tl.float32)


@triton.jit
def _decode(code):
    """Decode e4m3: its bits are a float16 without the last seven, whose exponent is 8 too small. NaN becomes 480."""
    code = code.to(tl.int32)
    bits = ((code & 128) << 8) | ((code & 127) << 7)
    return bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256


# PTX for two units, which are four bytes. A byte with 0x64 as the high byte is the float16 1024 + byte; with 0 as the high byte
# it is byte * 2**-24. PAIRED keys are made of two neighboring units, because tensor cores (``mma``) need these in one register.
# Scales then need no shuffling.


@triton.jit
def _paired_int8(quantized, scale, offset):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 bias;
        mov.b32 bias, 0xE400E400;
        prmt.b32 $0, $2, 0x64646464, 0x4140;
        prmt.b32 $1, $2, 0x64646464, 0x4342;
        add.f16x2 $0, $0, bias;
        add.f16x2 $1, $1, bias;
        fma.rn.f16x2 $0, $0, $3, $5;
        fma.rn.f16x2 $1, $1, $4, $6;
        }""",
        "=&r,=&r,r,r,r,r,r", [quantized, scale, offset], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _paired_int4(quantized, scale, offset, upper_scale, upper_offset):
    """Dequantize int4. The upper half of a byte appears as 1024 + 16 * integer, so it is divided by 16."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 bias, sixteenth, upper_bias, first, second;
        mov.b32 bias, 0xE400E400;
        mov.b32 sixteenth, 0x2C002C00;
        mov.b32 upper_bias, 0xD400D400;
        prmt.b32 first, $4, 0, 0x4140;
        prmt.b32 second, $4, 0, 0x4342;
        lop3.b32 $0, first, 0x000f000f, 0x64006400, 0xEA;
        lop3.b32 $1, second, 0x000f000f, 0x64006400, 0xEA;
        lop3.b32 $2, first, 0x00f000f0, 0x64006400, 0xEA;
        lop3.b32 $3, second, 0x00f000f0, 0x64006400, 0xEA;
        add.f16x2 $0, $0, bias;
        add.f16x2 $1, $1, bias;
        fma.rn.f16x2 $2, $2, sixteenth, upper_bias;
        fma.rn.f16x2 $3, $3, sixteenth, upper_bias;
        fma.rn.f16x2 $0, $0, $5, $7;
        fma.rn.f16x2 $1, $1, $6, $8;
        fma.rn.f16x2 $2, $2, $9, $11;
        fma.rn.f16x2 $3, $3, $10, $12;
        }""",
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r", [quantized, scale, offset, upper_scale, upper_offset],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _paired_fp8(quantized):
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 first, second;
        mov.b32 {first, second}, $2;
        cvt.rn.f16x2.e4m3x2 $0, first;
        cvt.rn.f16x2.e4m3x2 $1, second;
        }""",
        "=&r,=&r,r", [quantized], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _fp8(quantized):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 sorted;
        .reg .b16 lower, upper;
        prmt.b32 sorted, $2, 0, 0x3120;
        mov.b32 {lower, upper}, sorted;
        cvt.rn.f16x2.e4m3x2 $0, lower;
        cvt.rn.f16x2.e4m3x2 $1, upper;
        }""",
        "=&r,=&r,r", [quantized], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _tiny_int8(quantized):
    return tl.inline_asm_elementwise(
        """{
        prmt.b32 $0, $2, 0, 0x4240;
        prmt.b32 $1, $2, 0, 0x4341;
        }""",
        "=&r,=&r,r", [quantized], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _tiny_int4(quantized):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 odd;
        shr.b32 odd, $4, 8;
        and.b32 $0, $4, 0x000f000f;
        and.b32 $1, odd, 0x000f000f;
        and.b32 $2, $4, 0x00f000f0;
        and.b32 $3, odd, 0x00f000f0;
        }""",
        "=&r,=&r,=&r,=&r,r", [quantized],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def read_query(
    q, member, q_h, q_d, scale,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, PARTS: tl.constexpr, UNITS: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Return the query in parts that match those of the keys, and the factor by which scores are multiplied.

    Float16 parts are scaled by a power of two, so that the largest number of each row is near the upper end of the range.
    """
    unit = tl.arange(0, UNITS)
    valid = (member < GROUP)[:, None] & (unit < DIM // PARTS)[None, :]
    factor = tl.zeros([ROWS], tl.float32) + scale
    peak = tl.zeros([ROWS], tl.float32)
    parts, query = (), ()
    for part in tl.static_range(PARTS):
        channel = channels_of(unit, part, PARTS, DIM, FAST)
        x = tl.load(q + member[:, None] * q_h + channel[None, :] * q_d, mask=valid, other=0)
        if PARTS > 1:
            x = x.to(tl.float32)
            peak = tl.maximum(peak, tl.max(tl.abs(x), axis=1))
        parts = parts + (x,)
    if FAST and PARTS > 1:
        exponent = tl.maximum(peak.to(tl.int32, bitcast=True) >> 23, 20)
        factor *= ((exponent - 14) << 23).to(tl.float32, bitcast=True)
        up = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
        for part in tl.static_range(PARTS):
            query = query + ((parts[part] * up[:, None]).to(tl.float16),)
    else:
        query = parts
    return query, factor


@triton.jit
def read_words(
    source, row, index, there, unit,
    DIM: tl.constexpr, PARTS: tl.constexpr, WARPS: tl.constexpr, TOKENS: tl.constexpr, WITHIN: tl.constexpr,
):  # fmt: skip
    """Load scales of keys: a word of two for each token and unit. Words, unlike float16, can be copied during computation."""
    ACROSS: tl.constexpr = index.shape[0] // WITHIN
    UNITS: tl.constexpr = unit.shape[0]
    there = there[:, None] & (unit < DIM // PARTS)[None, :]
    words = ()
    for half in tl.static_range(PARTS // 2):
        place = index[:, None] * (DIM // 2) + (unit + half * (DIM // 4))[None, :]
        word = tl.load(source + row * (DIM // 2) + place, mask=there, other=0)
        word = tl.reshape(word, [WITHIN, 1, ACROSS, 1, 1, UNITS])
        word = tl.broadcast_to(word, [WITHIN, TOKENS // 8 // WITHIN, ACROSS, WARPS // ACROSS, 8, UNITS])
        words = words + (tl.reshape(word, [TOKENS * WARPS, UNITS]),)
    return words


@triton.jit
def read_scales(source, row, column, there, GROUPS: tl.constexpr):
    """Load scales of tokens, one tile ahead: one for each group of channels, or words of two if there is an even number."""
    WORDS: tl.constexpr = GROUPS // 2 if GROUPS % 2 == 0 else GROUPS
    scales = ()
    for word in tl.static_range(WORDS):
        scales = scales + (tl.load(source + row * WORDS + (column * WORDS + word), mask=there, other=0),)
    return scales


@triton.jit
def spread(scales, seen, repeat):
    """Return the scale of each row and token, 0 if the token is not seen. ``repeat`` is each row's group of channels."""
    x = tl.where(seen, scales[0], 0)[None, :]
    if scales[0].dtype == tl.int32:
        for pair in tl.static_range(1, len(scales)):
            x = tl.where((repeat // 2 == pair)[:, None], tl.where(seen, scales[pair], 0)[None, :], x)
        x = tl.where((repeat % 2 == 1)[:, None], x >> 16, x).to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        for group in tl.static_range(1, len(scales)):
            x = tl.where((repeat == group)[:, None], tl.where(seen, scales[group], 0)[None, :], x)
    return x.to(tl.float32)
