# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
"""Attention of one query per sequence to listed pages, on CUDA: a launch that splits the lists, and one that merges the splits.

Neither waits for the device, and both read there how far decoding is and how many pages are listed, so that CUDA graphs can
hold them. Nothing outlives a call. Times are of an H200.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# Two programs on each multiprocessor, each with two tiles of keys and of values on their way: 9.6 us for 64 pages of 64 keys,
# 8 KV heads of 4 query heads and 128 channels in bf16. One program 11.0, four 12.3; two stages 10.3; 2 warps 10.9. If the last
# program of each KV head to end merges the splits, by an atomic counter, instead of a second launch: 11.0.
TILE_BYTES, WARPS, STAGES, PROGRAMS = 16384, 4, 3, 2


def attend_pages(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    table: Tensor,
    columns: Tensor,
    texts: Tensor | None,
    *,
    page_size: int,
    scale: float,
    usual: int,
) -> Tensor:
    """``softmax(q keys^T * scale) values`` over what is seen of the pages listed, ``[B, Hkv * G, 1, Dv]``; zeros if nothing is.

    ``q`` is ``[B, Hkv * G, 1, D]``, ``keys`` ``[B', Hkv, N, D]`` and ``values`` ``[B', Hkv, N, Dv]``, with ``B' >= B``; the
    pages are the first ``counts[b, h, 0]`` of ``table[b, h, 0]``. ``columns`` is the query's. Keys above it are not seen, nor
    those with a negative ``texts[b]``; these may be NaN. ``usual`` is how many pages are listed as a rule: more take longer.
    """
    batch, heads, tokens, dim = q.shape[0], *keys.shape[1:]
    wide, group, width = values.shape[3], q.shape[1] // heads, table.shape[3]
    rows = batch * heads
    device = torch.cuda.get_device_properties(q.device)
    early = device.major >= 9  # the merging programs start before the others end, and wait: saves 1.1 us
    channels, outputs = (max(16, triton.next_power_of_2(size)) for size in (dim, wide))
    tile = min(128, max(16, TILE_BYTES // (max(channels, outputs) * keys.element_size())))
    tiles = triton.cdiv(min(width, usual) * page_size, tile)
    splits = max(1, min(tiles, PROGRAMS * device.multi_processor_count // rows))
    splits = triton.cdiv(tiles, triton.cdiv(tiles, splits))  # as few as take no longer
    out = torch.empty(batch, heads * group, 1, wide, dtype=q.dtype, device=q.device)
    # A split's result, then all maxima and sums.
    parts = torch.empty(rows * splits * group * (wide + 2), dtype=torch.float32, device=q.device) if splits > 1 else out
    _attend_pages[(splits, rows)](
        *(q, keys, values, counts, table, columns, texts, out, parts),
        *(q.stride(0), q.stride(1), q.stride(3), 0 if texts is None else texts.stride(0), tokens, width),
        scale * 1.4426950408889634,
        HEADS=heads,
        GROUP=group,
        ROWS=max(16, triton.next_power_of_2(group)),
        DIM=dim,
        WIDE=wide,
        CHANNELS=channels,
        OUTPUTS=outputs,
        PAGE_SIZE=page_size,
        TILE=tile,
        STAGES=STAGES,
        ALONE=splits == 1,
        EARLY=early,
        num_warps=WARPS,
    )
    if splits > 1:
        _merge_splits[(rows * group,)](
            *(counts, parts, out, splits),
            GROUP=group,
            WIDE=wide,
            OUTPUTS=outputs,
            PAGE_SIZE=page_size,
            TILE=tile,
            BLOCK=min(128, 8192 // outputs),
            EARLY=early,
            num_warps=4,
            launch_pdl=early,
        )
    return out


@triton.jit(do_not_specialize=["tokens", "width"])
def _attend_pages(
    q, keys, values, counts, table, columns, texts, out, parts, q_b, q_h, q_d, text_b, tokens, width, scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr,
    ALONE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
    split, splits = tl.program_id(0), tl.num_programs(0)
    row, rows = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    batch, head = row // HEADS, row % HEADS
    member = tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    output = tl.arange(0, OUTPUTS)
    offset = tl.arange(0, TILE)
    # All that the first keys wait for is read at once, whether or not this program has any.
    held = tl.load(counts + row) * PAGE_SIZE
    now = tl.load(columns).to(tl.int32)
    table += row * width
    place = split * TILE + offset
    page = tl.load(table + place // PAGE_SIZE, mask=place // PAGE_SIZE < width, other=0)
    source = q + batch * q_b + (head * GROUP + member)[:, None] * q_h + channel[None, :] * q_d
    query = tl.load(source, mask=(member < GROUP)[:, None] & (channel < DIM)[None, :], other=0)
    tiles = tl.cdiv(held, TILE)
    if split < tl.maximum(tiles, 1):
        keys += row * tokens * DIM
        values += row * tokens * WIDE
        most = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        result = tl.zeros([ROWS, OUTPUTS], tl.float32)
        for tile in tl.range(split, tiles, splits, num_stages=STAGES):
            place = tile * TILE + offset
            column = page * PAGE_SIZE + place % PAGE_SIZE
            seen = (place < held) & (column <= now)
            if texts is not None:
                seen &= tl.load(texts + batch * text_b + column, mask=seen, other=-1) >= 0
            there = seen[:, None] & (channel < DIM)[None, :]
            key = tl.load(keys + column[:, None] * DIM + channel[None, :], mask=there, other=0)
            there = seen[:, None] & (output < WIDE)[None, :]
            value = tl.load(values + column[:, None] * WIDE + output[None, :], mask=there, other=0)
            place += splits * TILE
            page = tl.load(table + place // PAGE_SIZE, mask=place // PAGE_SIZE < width, other=0)
            found = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
            found = tl.where(seen[None, :], found, float("-inf"))
            new = tl.maximum(most, tl.max(found, axis=1))
            finite = tl.where(new == float("-inf"), 0, new)
            weight = tl.exp2(found - finite[:, None])
            fade = tl.exp2(most - finite)
            total = total * fade + tl.sum(weight, axis=1)
            result = tl.dot(weight.to(value.dtype), value, result * fade[:, None], input_precision="ieee")
            most = new
        there = (member < GROUP)[:, None] & (output < WIDE)[None, :]
        if ALONE:
            target = out + (row * GROUP + member)[:, None] * WIDE + output[None, :]
            tl.store(target, (result / tl.where(total == 0, 1, total)[:, None]).to(out.dtype.element_ty), mask=there)
        else:
            part = (row * splits + split) * GROUP + member
            sums = parts + rows.to(tl.int64) * splits * GROUP * WIDE + part * 2
            tl.store(parts + part[:, None] * WIDE + output[None, :], result, mask=there)
            tl.store(sums, most, mask=member < GROUP)
            tl.store(sums + 1, total, mask=member < GROUP)


@triton.jit(do_not_specialize=["splits"])
def _merge_splits(
    counts, parts, out, splits,
    GROUP: tl.constexpr, WIDE: tl.constexpr, OUTPUTS: tl.constexpr, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr,
    BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Merge those splits of one query head that had keys, in their order."""
    index = tl.program_id(0).to(tl.int64)
    row, member = index // GROUP, index % GROUP
    output = tl.arange(0, OUTPUTS)
    active = tl.maximum(tl.minimum(tl.cdiv(tl.load(counts + row) * PAGE_SIZE, TILE), splits), 1)
    sums = parts + tl.num_programs(0).to(tl.int64) * splits * WIDE
    most = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    result = tl.zeros([OUTPUTS], tl.float32)
    if EARLY:
        gdc_wait()  # until the other launch has ended; counts are older
    for start in tl.range(0, active, BLOCK, num_stages=1):
        split = start + tl.arange(0, BLOCK)
        part = (row * splits + split) * GROUP + member
        there = split < active
        peak = tl.load(sums + part * 2, mask=there, other=float("-inf"), cache_modifier=".cg")
        mass = tl.load(sums + part * 2 + 1, mask=there, other=0, cache_modifier=".cg")
        there = there[:, None] & (output < WIDE)[None, :]
        block = tl.load(parts + part[:, None] * WIDE + output[None, :], mask=there, other=0, cache_modifier=".cg")
        new = tl.maximum(most, tl.max(peak, axis=0))
        finite = tl.where(new == float("-inf"), 0, new)
        weight = tl.exp2(peak - finite)
        fade = tl.exp2(most - finite)
        total = total * fade + tl.sum(mass * weight, axis=0)
        result = result * fade + tl.sum(block * weight[:, None], axis=0)
        most = new
    result = result / tl.where(total == 0, 1, total)
    tl.store(out + index * WIDE + output, result.to(out.dtype.element_ty), mask=output < WIDE)
