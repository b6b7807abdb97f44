"""Attend with one query per sequence to the cached keys of a layer, on CUDA: one launch over splits, and one to merge them.

Each KV head has a ring or pages, plain or quantized. All pages are read, or only the listed ones. One launch reads pages and
rings. Neither launch waits for the device. Both read the current column and the number of listed pages from device memory, so
CUDA graphs can record them. No state outlives a call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sparse_compile.passes.kernels.dequantize import PARTS
from sparse_compile.passes.kernels.launch import on_its_device, starts_early
from sparse_compile.passes.kernels.limits import MOST_KV_HEADS
from sparse_compile.passes.kernels.operands import PagedDecode, PageRead, RingRead, Stored
from sparse_compile.passes.kernels.paged_decode_splits import attend_split, merge_splits


class Launch(NamedTuple):
    """How work is divided: tiles of ``warps * tokens`` keys, pipeline ``stages``, and ``programs`` on each multiprocessor.

    ``registers`` limits the registers of a thread, where the compiler would otherwise use so many that fewer programs fit.
    """

    warps: int
    tokens: int
    stages: int
    programs: int
    registers: int | None = None


@on_its_device
def launch_paged_decode(operands: PagedDecode[Tensor]) -> Tensor:
    """Return ``softmax(q keys^T * scale) values`` over the keys that are seen, ``[B, Hq, 1, Dv]``; zeros if none is."""
    q, pages, ring, scale = operands
    paged = 0 if pages is None else pages.keys.data.shape[1]
    ringed, slots = (0, 0) if ring is None else ring.keys.shape[1:3]
    keys, values = _sources(operands)
    group, batch, wide = q.shape[1] // (paged + ringed), q.shape[0], _channels(values)
    _check(operands, keys, values, paged, ringed)
    rest = _rest(q, keys, values, group)
    listed = pages is not None and pages.table is not None
    launch = _launch(q, rest, group, listed=listed, beside_ring=ring is not None)
    both = {
        "PAGED": paged,
        "RINGED": ringed,
        "GROUP": group,
        "WIDE": wide,
        "PAGE_SIZE": 1 if pages is None else pages.page_size,
        "TILE": launch.warps * launch.tokens,
        "LEAST": max(16, rest["KEY_GROUP"]),
        "EARLY": q.is_cuda and starts_early(q.device),  # saves 1.1 us in the merging programs
    }
    # Each block of query heads of a KV head has programs of its own.
    blocks = triton.cdiv(group, rest["MEMBERS"])
    cut = _cut(pages, slots, launch.programs * _processors(q) // (batch * (paged or ringed) * blocks), both["TILE"])
    most = max(cut.splits, triton.cdiv(slots, cut.ring_share))
    out = torch.empty(batch, q.shape[1], 1, wide, dtype=q.dtype, device=q.device)
    # First the results of all splits, then all maxima and sums.
    parts = torch.empty(most * batch * q.shape[1] * (wide + 2), dtype=torch.float32, device=q.device)
    pdl = {"launch_pdl": True} if both["EARLY"] else {}
    limit = {"maxnreg": launch.registers} if q.is_cuda and launch.registers else {}
    shared = {
        "counts": None if pages is None else pages.counts,
        "columns": None if pages is None else pages.columns,
        "parts": parts,
        "rings": 0 if ring is None else sum(1 << head for head in ring.heads),
        "splits": cut.splits,
        "slots": slots,
        "ring_share": cut.ring_share,
    }
    attend_split[(most, batch * (paged + ringed) * blocks)](
        q=q,
        **_pointers("key", keys, keys.offset is not None),
        **_pointers("value", values, rest["GROUPS"] % 2 == 0),
        **_page_operands(pages, keys),
        **_ring_operands(ring),
        **shared,
        q_b=q.stride(0),
        q_h=q.stride(1),
        q_d=q.stride(3),
        scale=scale * 1.4426950408889634,
        **both,
        **rest,
        WARPS=launch.warps,
        STAGES=launch.stages,
        num_warps=launch.warps,
        **pdl,
        **limit,
    )
    merge_splits[(batch * q.shape[1], triton.cdiv(wide, 32))](out=out, most_splits=most, **shared, **both, num_warps=4, **pdl)
    return out


class _Cut(NamedTuple):
    """How many programs share the pages of a KV head, and how many slots of a ring one program takes."""

    splits: int
    ring_share: int


def _cut(pages: PageRead[Tensor] | None, slots: int, each: int, tile: int) -> _Cut:
    """Divide the work of a KV head into tiles for at most ``each`` programs."""
    each = max(1, each)
    tiles = triton.cdiv(pages.usual * pages.page_size, tile) if pages is not None else 1
    splits = min(tiles, each)
    if pages is not None and pages.table is not None:
        splits = triton.cdiv(tiles, triton.cdiv(tiles, splits))  # the fewest splits that take no longer
    return _Cut(splits, max(1, triton.cdiv(triton.cdiv(slots, each), tile)) * tile)


def _sources(operands: PagedDecode[Tensor]) -> tuple[Stored[Tensor], Stored[Tensor]]:
    """Return the keys and values that the kernel is compiled for: those of the pages, or of the ring if there are no pages."""
    if operands.pages is not None:
        return operands.pages.keys, operands.pages.values
    assert operands.ring is not None
    return Stored(operands.ring.keys), Stored(operands.ring.values)


def _check(operands: PagedDecode[Tensor], keys: Stored[Tensor], values: Stored[Tensor], paged: int, ringed: int) -> None:
    heads = 0 if operands.ring is None else len(operands.ring.heads)
    assert paged + ringed <= MOST_KV_HEADS and heads == ringed and operands.q.shape[1] % (paged + ringed) == 0
    assert operands.pages is None or operands.pages.page_size % 16 == 0
    assert all(stored.data.is_contiguous() and _channels(stored) % PARTS[stored.kind] == 0 for stored in (keys, values))


def _processors(q: Tensor) -> int:
    return int(torch.cuda.get_device_properties(q.device).multi_processor_count) if q.is_cuda else 4


def _page_operands(pages: PageRead[Tensor] | None, keys: Stored[Tensor]) -> dict[str, Any]:
    table, texts = (None, None) if pages is None else (pages.table, pages.texts)
    return {
        "table": table,
        "texts": texts,
        "text_b": 0 if texts is None else texts.stride(0),
        "tokens": keys.data.shape[2],
        "width": 0 if table is None else table.shape[3],
    }


def _ring_operands(ring: RingRead[Tensor] | None) -> dict[str, Any]:
    names = ("ring_keys", "ring_values", "ring_texts", "text")
    if ring is None:
        return {**dict.fromkeys(names), **dict.fromkeys(("ring_b", "now_b", "sink", "recent"), 0)}
    strides = {"ring_b": ring.texts.stride(0), "now_b": ring.text.stride(0)}
    return {**dict(zip(names, ring[:4], strict=True)), **strides, "sink": ring.sink, "recent": ring.recent}


def _channels(stored: Stored[Tensor]) -> int:
    """Return the number of channels of a head."""
    return stored.data.shape[3] * (2 if stored.kind == "int4" else 1)


def _rest(q: Tensor, keys: Stored[Tensor], values: Stored[Tensor], group: int) -> dict[str, Any]:
    """Return the constants that only ``attend_split`` is compiled for.

    The kernel computes the scores of ``MEMBERS`` query heads of a group at once. It repeats them for each group of value
    channels, ``REPEATS`` times in all, in rows that the tensor cores would otherwise leave empty. There are fewer than 64 rows:
    from 64 rows on, Hopper uses other products (``wgmma``), whose key layout is not the one that ``read_keys`` needs.
    """
    groups = values.scale.shape[3] if values.scale is not None else 1
    repeats = int(triton.next_power_of_2(groups))
    assert repeats <= 32
    members = max(16 // repeats, min(int(triton.next_power_of_2(group)), 32 // repeats), 1)
    return {
        "MEMBERS": members,
        "REPEATS": repeats,
        "DIM": q.shape[3],
        "KEYS": keys.kind,
        "VALUES": values.kind,
        "KEY_PARTS": PARTS[keys.kind],
        "VALUE_PARTS": PARTS[values.kind],
        "KEY_GROUP": keys.data.shape[2] // keys.scale.shape[2] if keys.scale is not None and keys.offset is not None else 0,
        "GROUPS": groups,
        "CHANNELS": _padded(keys, 16),
        "OUTPUTS": _padded(values, 2 * members * repeats),  # wider than high; else warps share rows and each reads all values
        "FAST": q.is_cuda and q.dtype != torch.float32,
    }


def _padded(stored: Stored[Tensor], least: int) -> int:
    return max(least * PARTS[stored.kind], int(triton.next_power_of_2(_channels(stored))))


def _pointers(name: str, stored: Stored[Tensor], pairs: bool) -> dict[str, Tensor | None]:
    """Return the kernel arguments: data in units, scale and offset. With ``pairs``, the last two are words of two numbers."""
    scale, offset = (part.view(torch.int32) if part is not None and pairs else part for part in (stored.scale, stored.offset))
    data = stored.data.view(torch.int16) if stored.kind else stored.data
    return {f"{name}s": data, f"{name}_scales": scale, f"{name}_offsets": offset}


def _launch(q: Tensor, rest: dict[str, Any], group: int, *, listed: bool, beside_ring: bool) -> Launch:
    """Return the fastest setting that was measured on an H200.

    Heads have 128 channels, and a KV head has a group of four query heads unless noted. Microseconds of both launches:

    | keys                                                | format   | setting              | us   |
    |-----------------------------------------------------|----------|----------------------|------|
    | 64 listed pages of 64 keys, 8 KV heads              | bfloat16 | 2 stages, 3 programs | 9.5  |
    |                                                     |          | 3 stages, 2 programs | 9.8  |
    |                                                     |          | 2 stages, 4 programs | 10.7 |
    | the same, 4 of the heads in a ring of 384 slots     | bfloat16 |                      | 8.2  |
    | 32 listed pages, 32 KV heads without groups         | bfloat16 |                      | 13.2 |
    | the same, page selection included                   | bfloat16 | 2 warps              | 28.4 |
    |                                                     |          | 4 warps              | 29.1 |
    | all of 131,072 keys (SDPA takes as long)            | bfloat16 |                      | 128  |

    Microseconds with everything that a cache does besides attention:

    | keys                                  | format | setting                       | us       |
    |---------------------------------------|--------|-------------------------------|----------|
    | all of 131,072 keys                   | int8   | tiles of 128 keys, 2 programs | 80       |
    |                                       |        | 3 programs, 168 registers     | 98       |
    |                                       |        | tiles of 64 keys              | 86 to 91 |
    |                                       | fp8    | 3 programs, 168 registers     | 76       |
    |                                       |        | 2 programs                    | 81       |
    |                                       | int4   | 3 programs, 168 registers     | 71       |
    |                                       |        | 2 programs                    | 85       |
    | 64 selected pages                     | int8   | 3 stages                      | 30.0     |
    |                                       |        | 2 stages                      | 31.0     |
    |                                       | int4   | tiles of 128 keys             | 29.7     |
    |                                       |        | tiles of 64 keys              | 31.6     |
    """
    kinds = (rest["KEYS"], rest["VALUES"])
    bits = max({"int4": 4, "": 16}.get(kind, 8) for kind in kinds)
    if q.dtype == torch.float32 or beside_ring:
        bits = 8 * q.element_size()
    size = max(rest["CHANNELS"], rest["OUTPUTS"]) * bits // 8  # bytes of a key; a tile has at most 16 KiB
    warps = min(4, max(1, 1024 // size))
    if kinds == ("", "") and listed and group == 1 and warps > 2:
        return Launch(2, 16, 3, 4)
    if kinds == ("", ""):
        return Launch(warps, 16, 2, 3) if listed else Launch(warps, 16, 3, 2)
    if size > 128 or rest["MEMBERS"] * rest["REPEATS"] > 16:
        return Launch(warps, 16, 2, 2)
    if listed:
        return Launch(warps, 32, 2, 2) if "int4" in kinds else Launch(warps, 16, 2 + ("int8" in kinds), 2)
    return Launch(warps, 32, 3, 2) if "int8" in kinds else Launch(warps, 32, 3, 3, 168)
