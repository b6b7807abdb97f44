# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
"""Select pages on CUDA. One kernel scores pages, and another appends a token, scores pages and selects them in one launch.

``masks/selection/page_scoring.py`` defines the results. No launch waits for the device, and all kernels read the current column
from device memory, so CUDA graphs can record them. Times were measured on an H200.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparse_compile.passes.kernels.append_token import (
    encode_tile,
    encode_token,
    group_sizes,
    new_token,
    quantized_pointers,
    store_token,
    summarize,
)
from sparse_compile.passes.kernels.launch import on_its_device, starts_early
from sparse_compile.passes.kernels.operands import SelectPages
from sparse_compile.passes.kernels.topk_pages import MOST_PAGES, aligned, pick_fitting, pick_into

# Three programs with two tiles each keep 192 KiB of loads in flight on a multiprocessor. 34 MB of page summaries take 11 us,
# and 134 MB take 34 us.
TILE_BYTES, PROGRAMS = 32768, 3

# Up to this many pages, the last program that scores a row also selects its pages. For more pages, selection would need
# registers that scoring cannot spare.
FUSED_PAGES = 4096


@on_its_device
def launch_score_pages(new: SelectPages[Tensor]) -> None:
    """Summarize the logical page of the newest key again. If scoring is due, score the full pages.

    The page that is being filled, and the pages that will be filled before the next scoring, get inf. Keys must not be NaN.
    """
    splits, sizes = _scoring(new)
    _score_pages[(splits + 1, new.q.shape[0] * new.keys.shape[1])](**_scored(new), **sizes, num_warps=4, num_stages=2)


@on_its_device
def launch_select_pages(new: SelectPages[Tensor], *, always: bool) -> None:
    """Append the token, then do what ``launch_score_pages`` does.

    Pages are selected if they were scored, if their classes changed, or if ``always``.
    """
    batch, heads, pages, width = new.q.shape[0], new.keys.shape[1], new.scores.shape[2], new.table.shape[3]
    quantized = quantized_pointers(new.key_quantized, new.value_quantized)
    state = (new.keys, new.values, new.summary, new.scores, new.counts, new.table, *quantized.values())
    assert pages <= MOST_PAGES and width < 1 << 16 and new.classes.stride(2) == 1
    assert all(tensor.is_contiguous() for tensor in state if tensor is not None)
    classes, changed = new.classes.expand(batch, heads, pages), None if always else new.changed
    encoding = group_sizes(new.key_form, new.value_form, new.k.shape[3], new.v.shape[3])
    splits, sizes = _scoring(new, encoding["PARTS"])
    older = pages - 1  # selection chooses from these: the newest page is always listed
    fused, early = older <= FUSED_PAGES, starts_early(new.q.device)
    _select_pages[(splits + encoding["PARTS"], batch * heads)](
        **_scored(new),
        **new_token(new.k, new.v),
        values=new.values,
        counts=new.counts,
        table=new.table,
        **quantized,
        classes=classes,
        changed=changed,
        class_b=classes.stride(0),
        class_h=classes.stride(1),
        slots=0 if new.key_quantized is None else new.key_quantized.data.shape[2],
        budget=new.budget,
        width=width,
        **sizes,
        **encoding,
        DIM_V=new.values.shape[3],
        PICK=fused,
        PICK_BLOCK=max(triton.next_power_of_2(older), 512),
        PICK_LEAST=512,
        PICK_WIDTH=triton.next_power_of_2(width),
        ALIGNED=aligned(classes),
        EARLY=early,
        num_warps=4,
        num_stages=2,
        launch_pdl=early,
    )
    if not fused:
        picked = (new.counts, new.table, new.budget, new.how.page_size, new.how.every)
        pick_into(new.scores, classes, new.columns, new.anchor, changed, *picked)


def _scored(new: SelectPages[Tensor]) -> dict[str, Any]:
    """Return the kernel arguments that scoring needs."""
    return {
        "q": new.q,
        "keys": new.keys,
        "summary": new.summary,
        "scores": new.scores,
        "columns": new.columns,
        "anchor": new.anchor,
        "texts": new.texts,
        "q_b": new.q.stride(0),
        "q_h": new.q.stride(1),
        "q_d": new.q.stride(3),
        "text_b": 0 if new.texts is None else new.texts.stride(0),
        "pages": new.scores.shape[2],
        "tail": new.keys.shape[2],
    }


def _scoring(new: SelectPages[Tensor], others: int = 1) -> tuple[int, dict[str, Any]]:
    """Return how many programs share the tiles of a row, besides ``others``, and the constants of scoring."""
    q, summary, how = new.q, new.summary, new.how
    (batch, heads, dim), pages = (q.shape[0], new.keys.shape[1], new.keys.shape[3]), new.scores.shape[2]
    width, per_page = summary.shape[3], how.page_size // how.page
    channels = triton.next_power_of_2(width)
    rows = min(128, max(16, TILE_BYTES // (channels * summary.element_size())))
    block = max(rows // per_page, 1)
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    splits = PROGRAMS * processors // (batch * heads)
    splits -= others if splits > 8 else 0  # leave room for the others: summarizing took 0.7 of 15 us with 32 heads
    splits = max(1, min(splits, triton.cdiv(pages, block)))
    return splits, {
        "HEADS": heads,
        "GROUP": q.shape[1] // heads,
        "ROWS": max(16, triton.next_power_of_2(q.shape[1] // heads)),
        "DIM": dim,
        "WIDTH": width,
        "CHANNELS": channels,
        "PAGE": how.page,
        "PAGE_SIZE": how.page_size,
        "EVERY": how.every,
        "AHEAD": triton.next_power_of_2(2 + how.every // how.page_size),
        "MINMAX": how.score == "minmax",
        "POOL": how.group,
        "BLOCK": block,
    }


@triton.jit
def _score(
    q, summary, scores, texts, newest, row, batch, head, q_b, q_h, q_d, text_b, pages, programs,
    GROUP, ROWS, DIM, WIDTH, CHANNELS, PAGE, PER, MINMAX, POOL, BLOCK,
):  # fmt: skip
    """Write the scores of this program's tiles of full pages. ``programs`` programs share the tiles, from program 1 on."""
    KEYS: tl.constexpr = triton.next_power_of_2(PAGE)
    # Minmax summaries need q twice: its negative numbers multiply the minima, and its positive ones the maxima.
    member = tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    source = q + batch * q_b + (head * GROUP + member)[:, None] * q_h + (channel % DIM)[None, :] * q_d
    query = tl.load(source, mask=(member < GROUP)[:, None] & (channel < WIDTH)[None, :], other=0)
    if MINMAX:
        query = tl.where((channel < DIM)[None, :] == (query < 0), query, 0)
    summary += row * pages * PER * WIDTH
    for tile in tl.range(tl.program_id(0) - 1, tl.cdiv(newest, BLOCK), programs):
        logical = tile * (BLOCK * PER) + tl.arange(0, BLOCK * PER)
        # Never read the newest page, because another program is summarizing it.
        valid = (logical < newest * PER)[:, None] & (channel < WIDTH)[None, :]
        block = tl.load(summary + logical.to(tl.int64)[:, None] * WIDTH + channel[None, :], mask=valid, other=0)
        products = tl.dot(block, tl.trans(query), input_precision="ieee")  # [logical pages, ROWS]
        if POOL == "max":
            pooled = tl.max(tl.where((member < GROUP)[None, :], products, float("-inf")), axis=1)
        else:
            pooled = tl.sum(tl.where((member < GROUP)[None, :], products, 0), axis=1)
            pooled = pooled / GROUP if POOL == "mean" else pooled
        if texts is not None:  # a logical page that holds only padding gets -inf
            key = tl.arange(0, KEYS)
            held = texts + batch * text_b + (logical * PAGE)[:, None] + key[None, :]
            known = (logical < newest * PER)[:, None] & (key < PAGE)[None, :]
            pooled = tl.where(tl.max(tl.load(held, mask=known, other=-1), axis=1) >= 0, pooled, float("-inf"))
        best = tl.max(tl.reshape(pooled, [BLOCK, PER]), axis=1)
        number = tile * BLOCK + tl.arange(0, BLOCK)
        tl.store(scores + number, best, mask=number < newest)


@triton.jit
def _open(scores, newest, pages, AHEAD, COUNT):
    """Rank the page that is being filled, and those that will be filled next, above every score."""
    ahead = tl.arange(0, AHEAD)
    infinite = tl.full([AHEAD], float("inf"), tl.float32)
    tl.store(scores + newest + ahead, infinite, mask=(ahead < COUNT) & (newest + ahead < pages))


@triton.jit
def _score_pages(
    q, keys, summary, scores, columns, anchor, texts, q_b, q_h, q_d, text_b, pages, tail,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, PAGE: tl.constexpr, PAGE_SIZE: tl.constexpr, EVERY: tl.constexpr, AHEAD: tl.constexpr,
    MINMAX: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // HEADS, row % HEADS
    PER: tl.constexpr = PAGE_SIZE // PAGE
    now = tl.load(columns)
    due = (now - tl.load(anchor)) % EVERY == 0
    newest = (now // PAGE_SIZE).to(tl.int32)
    scores += row * pages
    if split == 0:
        summarize(keys, None, summary, texts, now, row, batch, text_b, pages, tail, DIM, WIDTH, PAGE, PAGE_SIZE, MINMAX)
        if due:
            _open(scores, newest, pages, AHEAD, 2 + EVERY // PAGE_SIZE)
    elif due:
        _score(q, summary, scores, texts, newest, row, batch, head, q_b, q_h, q_d, text_b, pages,
               tl.num_programs(0) - 1, GROUP, ROWS, DIM, WIDTH, CHANNELS, PAGE, PER, MINMAX, POOL, BLOCK)  # fmt: skip


# As in `_pick_pages`, Triton must not assume that the offsets of scores and classes are multiples of more than four.
@triton.jit(do_not_specialize=["class_b", "class_h", "pages", "budget", "width"])
def _select_pages(
    q, k, v, keys, values, summary, scores, counts, table,
    key_data, key_scale, key_offset, value_data, value_scale, value_offset, classes, columns, anchor, changed, texts,
    q_b, q_h, q_d, k_b, k_h, k_d, v_b, v_h, v_d, text_b, class_b, class_h, pages, tail, slots, budget, width,
    HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr, PAGE: tl.constexpr, PAGE_SIZE: tl.constexpr, EVERY: tl.constexpr, AHEAD: tl.constexpr,
    MINMAX: tl.constexpr, POOL: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, KEY_GROUP: tl.constexpr, VALUES: tl.constexpr, VALUE_GROUP: tl.constexpr, TILE: tl.constexpr,
    PARTS: tl.constexpr,
    PICK: tl.constexpr, PICK_BLOCK: tl.constexpr, PICK_LEAST: tl.constexpr, PICK_WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    split = tl.program_id(0)
    first_encoding = tl.num_programs(0) - PARTS + 1
    row = tl.program_id(1).to(tl.int64)
    batch, head = row // HEADS, row % HEADS
    PER: tl.constexpr = PAGE_SIZE // PAGE
    now = tl.load(columns)
    due = (now - tl.load(anchor)) % EVERY == 0
    newest = (now // PAGE_SIZE).to(tl.int32)
    source = row * pages
    if ALIGNED:
        source = tl.multiple_of(source, 4)
    k += batch * k_b + head * k_h
    v += batch * v_b + head * v_h
    # This branch comes first: after the others, its code would cost 0.9 of 29.8 us, whether or not it runs.
    if KEY_GROUP > 1 and split >= first_encoding:
        encode_tile(split - first_encoding, k, k_d, keys, key_data, key_scale, key_offset, texts, now.to(tl.int32), row, batch,
                    text_b, slots, tail, KEYS, DIM, KEY_GROUP, TILE)  # fmt: skip
    elif split == 0:
        column = now.to(tl.int32)
        fresh = store_token(k, k_d, keys, column, row, tail, DIM)
        store_token(v, v_d, values, column, row, tail, DIM_V)
        if key_data is not None:
            encode_token(v, v_d, value_data, value_scale, value_offset, column, row, slots, VALUES, DIM_V, VALUE_GROUP)
            if KEY_GROUP == 1:
                encode_token(k, k_d, key_data, key_scale, key_offset, column, row, slots, KEYS, DIM, 1)
        summarize(keys, fresh, summary, texts, column, row, batch, text_b, pages, tail, DIM, WIDTH, PAGE, PAGE_SIZE, MINMAX)
        if due:
            _open(scores + source, newest, pages, AHEAD, 2 + EVERY // PAGE_SIZE)
    elif due:
        _score(q, summary, scores + source, texts, newest, row, batch, head, q_b, q_h, q_d, text_b, pages,
               first_encoding - 1, GROUP, ROWS, DIM, WIDTH, CHANNELS, PAGE, PER, MINMAX, POOL, BLOCK)  # fmt: skip
    if PICK and split < first_encoding:  # selection does not wait for the programs that quantize keys
        if due:
            # The last program of a row selects. Programs count themselves in the upper half of `counts`; selection clears it.
            tl.debug_barrier()
            turn = tl.atomic_add(counts + row, 1 << 16, sem="acq_rel") >> 16
            picks = turn == first_encoding - 1
        else:
            picks = split == 0
            if changed is not None:
                picks = picks & (tl.load(changed) != 0)
        if picks:
            place = batch * class_b + head * class_h
            if ALIGNED:
                place = tl.multiple_of(place, 4)
            pick_fitting(scores + source, classes + place, counts + row, table + row * width, tl.minimum(newest, pages - 1),
                          budget, width, PICK_BLOCK, PICK_LEAST, PICK_WIDTH, True)  # fmt: skip
