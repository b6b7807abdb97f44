# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"
"""Select the best pages on CUDA, with one program for each row.

``choose`` in ``masks/selection/page_scoring.py`` defines the result. Times were measured on an H200.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from sparse_compile.passes.kernels.launch import on_its_device, starts_early

MOST_PAGES = 32768  # a program holds the pages of a row in registers, and counts them in 16-bit fields


@on_its_device
def pick_pages(
    scores: Tensor, classes: Tensor, columns: Tensor | None = None, *, batch: int, budget: int, width: int, page_size: int = 1
) -> tuple[Tensor, Tensor]:
    """Select pages as ``choose`` does, for the first ``batch`` rows of scores ``[B, H, P]``.

    Returns counts ``[batch, H, 1]`` and pages ``[batch, H, 1, width]``. ``classes`` is ``[batch | 1, H | 1, P]``. With
    ``columns``, the page of that column counts as class 2, and the pages after it count as class 0.
    """
    heads, pages = scores.shape[1:]
    assert pages <= MOST_PAGES and scores.is_contiguous() and classes.stride(2) == 1
    classes = classes.expand(batch, heads, pages)
    counts = torch.empty(batch, heads, 1, dtype=torch.int32, device=scores.device)
    table = torch.empty(batch, heads, 1, width, dtype=torch.int32, device=scores.device)
    pick_into(scores, classes, columns, None, None, counts, table, budget, page_size, 1)
    return counts, table


def pick_into(
    scores: Tensor,
    classes: Tensor,
    columns: Tensor | None,
    anchor: Tensor | None,
    changed: Tensor | None,
    counts: Tensor,
    table: Tensor,
    budget: int,
    page_size: int,
    every: int,
) -> None:
    """Write the selected pages to ``counts`` and ``table``. ``classes`` must be expanded to the rows to select in.

    With ``changed``, the kernel does nothing unless scoring is due or ``changed`` is not 0.
    """
    batch, heads, pages = classes.shape
    width = table.shape[3]
    # Most of the time goes into sums over all threads, which are fast with few warps: 6 us for 2048 pages, 10 us for 8192.
    most = pages if columns is None else pages - 1
    warps = 4 if most <= 4096 else 8 if most <= 16384 else 16
    _pick_pages[(batch * heads,)](
        scores=scores,
        classes=classes,
        columns=columns,
        anchor=anchor,
        changed=changed,
        counts=counts,
        table=table,
        class_b=classes.stride(0),
        class_h=classes.stride(1),
        heads=heads,
        pages=pages,
        budget=budget,
        width=width,
        BLOCK=max(triton.next_power_of_2(most), warps * 128),
        LEAST=warps * 128,
        PAGE_SIZE=page_size,
        WIDTH=triton.next_power_of_2(width),
        ALIGNED=aligned(classes),
        EVERY=every,
        EARLY=starts_early(scores.device),
        num_warps=warps,
        launch_pdl=starts_early(scores.device),
    )


def aligned(classes: Tensor) -> bool:
    """Whether rows of scores and of classes can be read four pages at a time."""
    return classes.shape[2] % 4 == 0 and all(stride % 4 == 0 for stride in classes.stride()[:2])


@triton.jit
def _survey(count, least, most, count_, least_, most_):
    return count + count_, tl.minimum(least, least_), tl.maximum(most, most_)


@triton.jit
def _fold(count, least, most, SHAPE, AXIS):
    """Reduce the numbers that each thread holds."""
    return tl.reduce((tl.reshape(count, SHAPE), tl.reshape(least, SHAPE), tl.reshape(most, SHAPE)), AXIS, _survey)


@triton.jit
def _survey_groups(count, least, most, bound, some, count_, least_, most_, bound_, some_):
    return count + count_, tl.minimum(least, least_), tl.maximum(most, most_), tl.maximum(bound, bound_), some + some_


@triton.jit
def _add(a, b, c, d, a_, b_, c_, d_):
    return a + a_, b + b_, c + c_, d + d_


@triton.jit
def _field(word, index):
    """Return the ``index``-th field of 16 bits."""
    return ((word >> (index * 16)) & 0xFFFF).to(tl.int32)


# Triton may assume only that four divides the offsets. Each thread then holds the same pages of scores and of classes.
@triton.jit(do_not_specialize=["class_b", "class_h", "heads", "pages", "budget", "width"])
def _pick_pages(
    scores, classes, columns, anchor, changed, counts, table, class_b, class_h, heads, pages, budget, width,
    BLOCK: tl.constexpr, LEAST: tl.constexpr, PAGE_SIZE: tl.constexpr, WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
    EVERY: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0)
    if changed is not None and ((tl.load(columns) - tl.load(anchor)) % EVERY != 0) & (tl.load(changed) == 0):
        return
    source, place = row * pages, row // heads * class_b + row % heads * class_h
    if ALIGNED:
        source, place = tl.multiple_of(source, 4), tl.multiple_of(place, 4)
    scores, classes, counts, table = scores + source, classes + place, counts + row, table + row * width
    if columns is not None:
        pages = tl.minimum((tl.load(columns) // PAGE_SIZE).to(tl.int32), pages - 1)
    pick_fitting(scores, classes, counts, table, pages, budget, width, BLOCK, LEAST, WIDTH, columns is not None)


@triton.jit
def pick_fitting(
    scores, classes, counts, table, pages, budget, width,
    BLOCK: tl.constexpr, LEAST: tl.constexpr, WIDTH: tl.constexpr, NEWEST: tl.constexpr,
):  # fmt: skip
    """Select the pages of a row with the smallest BLOCK that holds them. The time grows with BLOCK.

    The newest page is left out: in a context of 131,072 tokens it is the last of 2049 pages, and BLOCK would double for it.
    """
    if BLOCK >= 2 * LEAST:
        if pages <= BLOCK // 2:
            pick_fitting(scores, classes, counts, table, pages, budget, width, BLOCK // 2, LEAST, WIDTH, NEWEST)
        else:
            _pick_row(scores, classes, counts, table, pages, budget, width, BLOCK, LEAST, WIDTH, NEWEST)
    else:
        _pick_row(scores, classes, counts, table, pages, budget, width, BLOCK, LEAST, WIDTH, NEWEST)


@triton.jit
def _pick_row(
    scores, classes, counts, table, pages, budget, width,
    BLOCK: tl.constexpr, LEAST: tl.constexpr, WIDTH: tl.constexpr, NEWEST: tl.constexpr,
):  # fmt: skip
    """Select from one row of at most BLOCK pages. With NEWEST, the page after them is selected as well."""
    ROWS: tl.constexpr = min(8, BLOCK // LEAST)
    number = tl.arange(0, BLOCK)
    score = tl.load(scores + number, mask=number < pages, other=0, cache_modifier=".cg")  # other programs wrote them
    kind = tl.load(classes + number, mask=number < pages, other=0)
    kept, offered = kind == 2, kind == 1

    # One integer key for each page: the better the score, the smaller the key. The key 0 means always selected, and the largest
    # key never. No score maps to either.
    score = tl.where(score != score, float("-inf"), tl.where(score == 0, 0.0, score))
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits, bits ^ 0x7FFFFFFF).to(tl.uint32, bitcast=True)
    never = tl.full([BLOCK], 0xFFFFFFFF, tl.uint32)
    tally = tl.where(kept, 1 << 16, offered.to(tl.int32))
    best, worst = tl.where(offered, key, never), tl.where(offered, key, 0)
    tally, best, worst = _fold(tally, best, worst, [BLOCK // LEAST, LEAST], 0)
    if 4 * WIDTH <= LEAST:
        tally, best, worst = _fold(tally, best, worst, [LEAST // 4, 4], 1)
    some = best != 0xFFFFFFFF
    bound = tl.where(some, best, 0)
    tally, low, high, bound, groups = tl.reduce((tally, best, worst, bound, some.to(tl.int32)), 0, _survey_groups)
    all_kept, among = (tally >> 16) & 0xFFFF, tally & 0xFFFF
    room = width
    if NEWEST:
        last = (all_kept < width).to(tl.int32)  # whether the newest page is listed, as the last one
        room, budget = width - last, budget - 1
    count = tl.minimum(tl.maximum(all_kept, tl.minimum(all_kept + among, budget)), room)
    rest = count - all_kept
    # If at least ``rest`` groups offer a page, no selected page is worse than the worst of the groups' best pages.
    span = tl.where(groups >= rest, bound, high) - low
    key = tl.where(kept, 0, tl.where(offered, key, never))
    full = all_kept > room  # then select only the first pages of class 2
    rest = tl.where(full, room, rest)
    low, span = tl.where(full, 0, low).to(tl.uint32), tl.where(full, 0, span).to(tl.uint32)

    # Find the `rest`-th smallest key: low <= it <= low + span, among `among` keys. Each round leaves an eighth of the range.
    while (rest > 0) & (rest < among) & (span > 0):
        step = tl.maximum((span.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 129, 0).to(tl.uint32)
        inside = (key - low) <= span
        digit = ((key - low) >> step) & 7
        # Count keys by digit: in 4-bit fields while a thread adds up its ROWS <= 15 keys, then in 16-bit fields, which hold the
        # digits 0 and 4, 1 and 5, and so on.
        nibbles = tl.sum(tl.reshape(inside.to(tl.uint32) << (digit * 4), [ROWS, BLOCK // ROWS]), axis=0)
        ones = 0x000F000F
        a, b, c, d = tl.reduce((nibbles & ones, (nibbles >> 4) & ones, (nibbles >> 8) & ones, (nibbles >> 12) & ones), 0, _add)
        lower = _field(a + b + c + d, 0)
        half = (lower < rest).to(tl.int32)
        rest -= half * lower
        first, second, third, fourth = _field(a, half), _field(b, half), _field(c, half), _field(d, half)
        two, three = first + second, first + second + third
        unit = (first < rest).to(tl.int32) + (two < rest) + (three < rest)
        rest -= tl.where(unit == 0, 0, tl.where(unit == 1, first, tl.where(unit == 2, two, three)))
        among = tl.where(unit == 0, first, tl.where(unit == 1, second, tl.where(unit == 2, third, fourth)))
        below = (half * 4 + unit).to(tl.uint32) << step
        low += below
        span = tl.minimum((tl.full([], 1, tl.uint32) << step) - 1, span - below)

    # Take all pages with keys below `low`, and the first `rest` pages of the range that is left.
    ahead, equal = key < low, (key - low) <= span
    seen = tl.cumsum(ahead.to(tl.int32) + (equal.to(tl.int32) << 16), axis=0)
    equals = (seen >> 16) & 0xFFFF
    taken = ahead | (equal & (equals <= rest))
    tl.store(table + (seen & 0xFFFF) + tl.minimum(equals, rest) - 1, number, mask=taken)
    if NEWEST:
        tl.store(table + count, pages, mask=last != 0)
        count += last
    column = tl.arange(0, WIDTH)
    tl.store(table + column, tl.zeros([WIDTH], tl.int32), mask=(column >= count) & (column < width))
    tl.store(counts, count)
