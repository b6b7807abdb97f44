# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call, assignment"
# ruff: noqa: RUF005 (Triton has no starred tuples, and a tuple that grows changes its type)
"""The kernels of ``paged_decode``: one attends to one split of a KV head, and one merges all splits of a query head."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparse_compile.passes.kernels.dequantize import (
    channels_of,
    read_keys,
    read_query,
    read_scales,
    read_values,
    read_words,
    spread,
    steps_in_one,
)


@triton.jit(do_not_specialize=["rings", "sink", "recent", "tokens", "width", "slots", "splits", "ring_share"])
def attend_split(
    q, keys, key_scales, key_offsets, values, value_scales, value_offsets, counts, table, columns, texts,
    ring_keys, ring_values, ring_texts, text, parts,
    rings: tl.int64, q_b, q_h, q_d, text_b, ring_b, now_b, sink, recent, tokens, width, slots, splits, ring_share, scale,
    PAGED: tl.constexpr, RINGED: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr, LEAST: tl.constexpr, EARLY: tl.constexpr, MEMBERS: tl.constexpr, REPEATS: tl.constexpr,
    DIM: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, KEY_PARTS: tl.constexpr, VALUE_PARTS: tl.constexpr,
    KEY_GROUP: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr, FAST: tl.constexpr,
    WARPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    if EARLY:  # wait first: the merging programs start after this, and read data from before this launch without waiting
        gdc_wait()
        gdc_launch_dependents()
    BLOCKS: tl.constexpr = (GROUP + MEMBERS - 1) // MEMBERS
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64) // BLOCKS
    batch, head = row // (PAGED + RINGED), row % (PAGED + RINGED)
    place, in_ring = _place(row, rings, PAGED, RINGED)
    q += batch * q_b + head * GROUP * q_h
    first = tl.program_id(1) % BLOCKS * MEMBERS
    target = (row * tl.num_programs(0) + split) * GROUP
    sums = parts + (tl.num_programs(1) // BLOCKS).to(tl.int64) * tl.num_programs(0) * GROUP * WIDE + target * 2
    parts += target * WIDE
    if in_ring:
        if RINGED > 0:
            start = split * ring_share
            now = tl.load(text + batch * now_b).to(tl.int32)
            _attend(
                q, ring_keys, None, None, ring_values, None, None, None, ring_texts + batch * ring_b, parts, sums, place,
                first, start, TILE, tl.minimum(start + ring_share, slots), slots, now, sink, recent,
                q_h, q_d, slots, width, scale, True, GROUP, MEMBERS, REPEATS, DIM, WIDE, "", "", 1, 1, 0, 1,
                max(16, triton.next_power_of_2(DIM)), max(32, triton.next_power_of_2(WIDE)),
                PAGE_SIZE, WARPS, TILE, STAGES, FAST,
            )  # fmt: skip
    else:
        if PAGED > 0:
            now = tl.load(columns).to(tl.int32)
            if texts is not None:
                texts += batch * text_b
            if table is None:
                held = now + 1
                share = _share(held, splits, TILE, LEAST)
                start, step = split * share, TILE
                stop = tl.minimum(start + share, held)
            else:  # the first page to load is known before the count is loaded
                start, step = split * TILE, splits * TILE
                held = tl.load(counts + place) * PAGE_SIZE
                stop = held
                table += place * width
            _attend(
                q, keys, key_scales, key_offsets, values, value_scales, value_offsets, table, texts, parts, sums, place,
                first, start, step, stop, held, now, 0, 0,
                q_h, q_d, tokens, width, scale, False, GROUP, MEMBERS, REPEATS, DIM, WIDE, KEYS, VALUES, KEY_PARTS, VALUE_PARTS,
                KEY_GROUP, GROUPS, CHANNELS, OUTPUTS, PAGE_SIZE, WARPS, TILE, STAGES, FAST,
            )  # fmt: skip


@triton.jit
def _place(row, rings, PAGED: tl.constexpr, RINGED: tl.constexpr):
    """Return the row of a KV head within its storage group, and whether that group is the ring."""
    if PAGED == 0 or RINGED == 0:
        return row, RINGED > 0
    else:  # count the bits of ``rings`` below this head
        batch, head = row // (PAGED + RINGED), row % (PAGED + RINGED)
        in_ring = ((rings >> head) & 1) != 0
        below = rings & ((tl.full([], 1, tl.int64) << head) - 1)
        below = below - ((below >> 1) & 0x5555555555555555)
        below = (below & 0x3333333333333333) + ((below >> 2) & 0x3333333333333333)
        below = (((below + (below >> 4)) & 0x0F0F0F0F0F0F0F0F) * 0x0101010101010101) >> 56
        return tl.where(in_ring, batch * RINGED + below, batch * PAGED + head - below), in_ring


@triton.jit
def _share(held, splits, TILE: tl.constexpr, LEAST: tl.constexpr):
    """Return how many of the ``held`` keys a split takes: whole groups that share a scale, and at least one tile."""
    return tl.maximum(tl.cdiv(tl.cdiv(held, splits), LEAST) * LEAST, TILE)


@triton.jit
def _attend(
    q, keys, key_scales, key_offsets, values, value_scales, value_offsets, table, texts, parts, sums, place,
    first, start, step, stop, held, now, sink, recent, q_h, q_d, tokens, width, scale,
    RING: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr, REPEATS: tl.constexpr, DIM: tl.constexpr,
    WIDE: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, KEY_PARTS: tl.constexpr, VALUE_PARTS: tl.constexpr,
    KEY_GROUP: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, WARPS: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Attend to one split of one KV head: the tiles from ``start`` to ``stop``, ``step`` keys apart."""
    TOKENS: tl.constexpr = TILE // WARPS
    ROWS: tl.constexpr = MEMBERS * REPEATS
    KEY_UNITS: tl.constexpr = DIM // KEY_PARTS
    VALUE_UNITS: tl.constexpr = WIDE // VALUE_PARTS
    LISTED: tl.constexpr = table is not None
    SCALES: tl.constexpr = GROUPS if VALUE_PARTS > 1 else 0
    OFFSETS: tl.constexpr = 0 if VALUES == "fp8" else SCALES
    member = first + tl.arange(0, ROWS) % MEMBERS
    repeat = tl.arange(0, ROWS) // MEMBERS
    # Tensor cores give 8 keys to each warp in turn. In this order, the keys of a warp are neighbors and share scales.
    at = tl.arange(0, TILE)
    token = at // 8 % WARPS * TOKENS + at // (8 * WARPS) * 8 + at % 8
    # Load everything that the first keys depend on at once, whether or not this program has any keys.
    page = _page(table, start, token, width, PAGE_SIZE, TILE)
    group_start = token
    if KEY_GROUP > 0:
        WITHIN: tl.constexpr = max(1, TOKENS // KEY_GROUP)  # groups in the keys of one warp; 1 if warps share a group
        ACROSS: tl.constexpr = max(1, TILE // KEY_GROUP // WITHIN)  # warps, or sets of warps that share a group
        group_start = tl.arange(0, WITHIN * ACROSS)
        group_start = (group_start % ACROSS * WITHIN + group_start // ACROSS) * KEY_GROUP
    group_page = _page(table, start, group_start, width, PAGE_SIZE, TILE)
    query, factor = read_query(q, member, q_h, q_d, scale, GROUP, ROWS, DIM, KEY_PARTS, CHANNELS // KEY_PARTS, FAST)
    if start < tl.maximum(held, 1):
        unit = tl.arange(0, CHANNELS // KEY_PARTS)
        output = tl.arange(0, OUTPUTS // VALUE_PARTS)
        keys += place * tokens * KEY_UNITS
        values += place * tokens * VALUE_UNITS
        column = _column(start, token, page, PAGE_SIZE, TILE, LISTED)
        key_scale = read_scales(key_scales, place * tokens, column, start + token < stop, 1 if KEYS == "fp8" else 0)
        value_scale = read_scales(value_scales, place * tokens, column, start + token < stop, SCALES)
        value_offset = read_scales(value_offsets, place * tokens, column, start + token < stop, OFFSETS)
        most = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS, WARPS, 4], tl.float32)
        offset = tl.zeros([ROWS, WARPS, 4], tl.float32)
        results = ()
        for _part in tl.static_range(VALUE_PARTS):
            results = results + (tl.zeros([ROWS, OUTPUTS // VALUE_PARTS], tl.float32),)
        for begin in tl.range(start, stop, step, num_stages=STAGES):
            column = _column(begin, token, page, PAGE_SIZE, TILE, LISTED)
            seen = begin + token < stop
            if LISTED:
                seen &= column <= now
            if texts is not None:
                position = tl.load(texts + column, mask=seen, other=-1).to(tl.int32)
                seen &= position >= 0
                if RING:
                    seen &= (position <= now) & ((position < sink) | (position > now - recent))
            valid = seen[:, None] & (unit < KEY_UNITS)[None, :]
            key = tl.load(keys + column[:, None] * KEY_UNITS + unit[None, :], mask=valid, other=0)
            valid = seen[:, None] & (output < VALUE_UNITS)[None, :]
            value = tl.load(values + column[:, None] * VALUE_UNITS + output[None, :], mask=valid, other=0)
            scales, offsets = (), ()
            if KEY_GROUP > 0:
                index = _column(begin, group_start, group_page, PAGE_SIZE, TILE, LISTED) // KEY_GROUP
                valid, row = begin + group_start < stop, place * (tokens // KEY_GROUP)
                scales = read_words(key_scales, row, index, valid, unit, DIM, KEY_PARTS, WARPS, TOKENS, WITHIN)
                offsets = read_words(key_offsets, row, index, valid, unit, DIM, KEY_PARTS, WARPS, TOKENS, WITHIN)
            key_parts = read_keys(key, scales, offsets, KEYS, FAST)
            scores = tl.dot(query[0], tl.trans(key_parts[0]), input_precision="ieee")
            for part in tl.static_range(1, KEY_PARTS):
                scores = tl.dot(query[part], tl.trans(key_parts[part]), scores, input_precision="ieee")
            scores *= factor[:, None]
            if KEYS == "fp8":
                scores *= key_scale[0].to(tl.float32)[None, :]
            scores = tl.where(seen[None, :], scores, float("-inf"))
            # Weights are multiplied by the scales of values. The maximum includes the scales, so products stay below 2**15.
            largest = scores
            if VALUE_PARTS > 1:
                scale_of = spread(value_scale, seen, repeat)
                largest = scores + _log2(tl.maximum(scale_of, 5.9604644775390625e-08))
            new = tl.maximum(most, tl.max(largest, axis=1))
            finite = tl.where(new == float("-inf"), 0, new)
            fade = tl.exp2(most - finite)
            weight = tl.exp2(scores - (finite - 15)[:, None])
            most = new
            total = total * fade[:, None, None] + _fold(weight, WARPS, TOKENS)
            if OFFSETS > 0:
                moved = weight * spread(value_offset, seen, repeat)
                offset = offset * fade[:, None, None] + _fold(moved, WARPS, TOKENS)
            if VALUE_PARTS > 1:
                weight *= scale_of
            value_parts = read_values(value, VALUES, FAST)
            weight = weight.to(value_parts[0].dtype)
            added = ()
            for part in tl.static_range(VALUE_PARTS):
                result = results[part] * fade[:, None]
                added = added + (tl.dot(weight, value_parts[part], result, input_precision="ieee"),)
            results = added
            # Load the pages and scales of the next tile.
            after = begin + step
            page = _page(table, after, token, width, PAGE_SIZE, TILE)
            group_page = _page(table, after, group_start, width, PAGE_SIZE, TILE)
            column = _column(after, token, page, PAGE_SIZE, TILE, LISTED)
            key_scale = read_scales(key_scales, place * tokens, column, after + token < stop, 1 if KEYS == "fp8" else 0)
            value_scale = read_scales(value_scales, place * tokens, column, after + token < stop, SCALES)
            value_offset = read_scales(value_offsets, place * tokens, column, after + token < stop, OFFSETS)
        total = tl.sum(tl.sum(total, axis=2), axis=1)
        if OFFSETS > 0:
            moved = tl.sum(tl.sum(offset, axis=2), axis=1)
        if REPEATS > 1:  # the rows of a query head are stored with a common maximum
            top = tl.max(tl.reshape(most, [REPEATS, MEMBERS]), axis=0)
            top = tl.reshape(tl.broadcast_to(top[None, :], [REPEATS, MEMBERS]), [ROWS])
            fade = tl.exp2(most - tl.where(top == float("-inf"), 0, top))
            most, total = top, total * fade
        tl.store(sums + member * 2, most, mask=(member < GROUP) & (repeat == 0))
        tl.store(sums + member * 2 + 1, total, mask=(member < GROUP) & (repeat == 0))
        for part in tl.static_range(VALUE_PARTS):
            channel = channels_of(output, part, VALUE_PARTS, WIDE, False)
            valid = (member < GROUP)[:, None] & (output < VALUE_UNITS)[None, :]
            result = results[part]
            if OFFSETS > 0:
                result = result * steps_in_one(part, FAST) + moved[:, None]
            if REPEATS > 1:
                result *= fade[:, None]
                valid &= (channel // (WIDE // GROUPS))[None, :] == repeat[:, None]
            tl.store(parts + member[:, None] * WIDE + channel[None, :], result, mask=valid)


@triton.jit
def _page(table, begin, token, width, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Return the page of each token of a tile, or one number if the whole tile is in one page."""
    if table is None:
        return begin
    else:
        slot = begin // PAGE_SIZE if PAGE_SIZE % TILE == 0 else (begin + token) // PAGE_SIZE
        return tl.load(table + slot, mask=slot < width, other=0)


@triton.jit
def _column(begin, token, page, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr, LISTED: tl.constexpr):
    if not LISTED:
        return begin + token
    elif PAGE_SIZE % TILE == 0:
        return page * PAGE_SIZE + begin % PAGE_SIZE + token
    else:
        return page * PAGE_SIZE + (begin + token) % PAGE_SIZE


@triton.jit
def _log2(x):
    """Bound the base-2 logarithm of a positive number from above. The result exceeds it by at most 1."""
    return x.to(tl.int32, bitcast=True).to(tl.float32) * 1.1920928955078125e-07 - 126


@triton.jit
def _fold(x, WARPS: tl.constexpr, TOKENS: tl.constexpr):
    """Add up the numbers of a row that each thread holds. Tensor cores give it two of every eight neighboring scores."""
    return tl.sum(tl.sum(tl.reshape(x, [x.shape[0], TOKENS // 8, WARPS, 4, 2]), axis=4), axis=1)


@triton.jit
def _active(counts, columns, place, splits, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr, LEAST: tl.constexpr):
    """Return how many splits wrote a result. The first split does so even if there is nothing to read."""
    if counts is None:
        held = tl.load(columns).to(tl.int32) + 1
        return tl.maximum(tl.cdiv(held, _share(held, splits, TILE, LEAST)), 1)
    else:
        return tl.maximum(tl.minimum(tl.cdiv(tl.load(counts + place) * PAGE_SIZE, TILE), splits), 1)


@triton.jit(do_not_specialize=["rings", "most_splits", "splits", "slots", "ring_share"])
def merge_splits(
    counts, columns, parts, out, rings: tl.int64, most_splits, splits, slots, ring_share,
    PAGED: tl.constexpr, RINGED: tl.constexpr, GROUP: tl.constexpr, WIDE: tl.constexpr, PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr, LEAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one query head that wrote results, in order. Each program merges 32 channels."""
    index = tl.program_id(0).to(tl.int64)
    row, member = index // GROUP, index % GROUP
    place, in_ring = _place(row, rings, PAGED, RINGED)
    active = tl.cdiv(slots, ring_share)
    if PAGED > 0:
        pages = _active(counts, columns, tl.where(in_ring, 0, place), splits, PAGE_SIZE, TILE, LEAST)
        active = tl.where(in_ring, active, pages)
    output = tl.program_id(1) * 32 + tl.arange(0, 32)
    first = row * most_splits * GROUP + member
    sums = parts + tl.num_programs(0).to(tl.int64) * most_splits * WIDE
    most = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    result = tl.zeros([32], tl.float32)
    if EARLY:
        gdc_wait()  # until ``attend_split`` has ended; the counts above were written before that launch
        gdc_launch_dependents()
    for start in tl.range(0, active, 64, num_stages=1):
        split = start + tl.arange(0, 64)
        part = first + split * GROUP
        valid = split < active
        peak = tl.load(sums + part * 2, mask=valid, other=float("-inf"), cache_modifier=".cg")
        mass = tl.load(sums + part * 2 + 1, mask=valid, other=0, cache_modifier=".cg")
        valid = valid[:, None] & (output < WIDE)[None, :]
        block = tl.load(parts + part[:, None] * WIDE + output[None, :], mask=valid, other=0, cache_modifier=".cg")
        new = tl.maximum(most, tl.max(peak, axis=0))
        finite = tl.where(new == float("-inf"), 0, new)
        weight = tl.exp2(peak - finite)
        fade = tl.exp2(most - finite)
        total = total * fade + tl.sum(mass * weight, axis=0)
        result = result * fade + tl.sum(block * weight[:, None], axis=0)
        most = new
    result = result / tl.where(total == 0, 1, total)
    tl.store(out + index * WIDE + output, result.to(out.dtype.element_ty), mask=output < WIDE)
