"""Attention of one query per sequence to what a cache keeps of a layer, on CUDA: a launch over splits, and one to merge them.

KV heads keep pages, plain or quantised, of which all or those listed are read, or a ring; one launch reads both. Neither waits
for the device, and both read there how far decoding is and how many pages are listed, so that CUDA graphs can hold them.
Nothing outlives a call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sparse_compile.passes.kernels.dequantize import PARTS
from sparse_compile.passes.kernels.launch import starts_early, where_it_lies
from sparse_compile.passes.kernels.limits import MOST_KV_HEADS
from sparse_compile.passes.kernels.paged_decode_splits import attend_split, merge_splits


class Kept(NamedTuple):
    """Keys or values in pages: plain ``[B', H, N, D]``, or codes of a kind with float16 scales and offsets.

    ``int8`` and ``int4`` are ``data * scale + offset``; int4 has channel ``c`` in the lower half of a byte and ``c + D / 2`` in
    the upper one. Keys share a scale over neighbouring tokens, a power of two from 8, ``[B', H, N / group, D]``, values over
    neighbouring channels, ``[B', H, N, D / group]``. ``fp8`` is e4m3, or its bits, with a scale for each token,
    ``[B', H, N, 1]``.
    """

    data: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None
    kind: str = ""

    @property
    def dim(self) -> int:
        """Channels of a head."""
        return self.data.shape[3] * (2 if self.kind == "int4" else 1)


class Ring(NamedTuple):
    """Plain keys and values ``[B', H, slots, D]``, and the text position of each slot, ``[B, slots]``, negative if it is empty.

    The query at ``text`` ``[B, 1]`` sees the first ``sink`` positions and the last ``recent``, its own included.
    """

    keys: Tensor
    values: Tensor
    texts: Tensor
    text: Tensor
    sink: int
    recent: int


class Launch(NamedTuple):
    """How work is cut: tiles of ``warps`` times ``tokens`` keys in so many ``stages``, ``programs`` on a multiprocessor.

    ``registers`` are the most of a thread, where the compiler would take so many that fewer programs fit.
    """

    warps: int
    tokens: int
    stages: int
    programs: int
    registers: int | None = None


@where_it_lies
def attend_kept(
    q: Tensor,
    keys: Kept | None,
    values: Kept | None,
    counts: Tensor | None,
    table: Tensor | None,
    columns: Tensor | None,
    texts: Tensor | None,
    ring: Ring | None,
    *,
    rings: int,
    page_size: int,
    scale: float,
    usual: int,
) -> Tensor:
    """``softmax(q keys^T * scale) values`` over what is seen, ``[B, Hq, 1, Dv]``; zeros if nothing is.

    ``q`` is ``[B, Hq, 1, D]``. KV head ``h`` is in the ring if bit ``h`` of ``rings`` is set, else in the pages; the heads of a
    part keep their order. The pages read are the first ``counts[b, h, 0]`` of ``table[b, h, 0]``, or all if there is no table;
    ``usual`` is how many that usually are: more take longer. The query is at column ``columns``. Keys above it are not seen,
    nor those with a negative ``texts[b]``; what is not seen may be NaN.
    """
    paged = 0 if keys is None else keys.data.shape[1]
    ringed, slots = (0, 0) if ring is None else ring.keys.shape[1:3]
    if keys is None or values is None:
        assert ring is not None
        keys, values = Kept(ring.keys), Kept(ring.values)
    assert paged + ringed <= MOST_KV_HEADS and rings.bit_count() == ringed and q.shape[1] % (paged + ringed) == 0
    assert paged == 0 or page_size % 16 == 0
    assert all(kept.data.is_contiguous() and kept.dim % PARTS[kept.kind] == 0 for kept in (keys, values))
    batch, wide, rows = q.shape[0], values.dim, q.shape[0] * (paged + ringed)
    rest = _rest(q, keys, values, q.shape[1] // (paged + ringed))
    launch = _launch(q, rest, q.shape[1] // (paged + ringed), listed=table is not None, beside_ring=ring is not None)
    both = {
        "PAGED": paged,
        "RINGED": ringed,
        "GROUP": q.shape[1] // (paged + ringed),
        "WIDE": wide,
        "PAGE_SIZE": page_size,
        "TILE": launch.warps * launch.tokens,
        "LEAST": max(16, rest["KEY_GROUP"]),
        "EARLY": q.is_cuda and starts_early(q.device),  # saves 1.1 us of the merging programs
    }
    # Programs of one KV head, in blocks of query heads.
    blocks = triton.cdiv(both["GROUP"], rest["MEMBERS"])
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    each = max(1, launch.programs * processors // (batch * (paged or ringed) * blocks))
    tiles = triton.cdiv(usual * page_size, both["TILE"]) if paged else 1
    splits = min(tiles, each)
    if table is not None:
        splits = triton.cdiv(tiles, triton.cdiv(tiles, splits))  # as few as take no longer
    ring_share = max(1, triton.cdiv(triton.cdiv(slots, each), both["TILE"])) * both["TILE"]
    most = max(splits, triton.cdiv(slots, ring_share))
    out = torch.empty(batch, q.shape[1], 1, wide, dtype=q.dtype, device=q.device)
    # A split's result, then all maxima and sums.
    parts = torch.empty(most * batch * q.shape[1] * (wide + 2), dtype=torch.float32, device=q.device)
    pdl = {"launch_pdl": True} if both["EARLY"] else {}
    limit = {"maxnreg": launch.registers} if q.is_cuda and launch.registers else {}
    attend_split[(most, rows * blocks)](
        *(q, *_pointers(keys, keys.offset is not None), *_pointers(values, rest["GROUPS"] % 2 == 0)),
        *(counts, table, columns, texts, *((None,) * 4 if ring is None else ring[:4]), parts, rings),
        *(q.stride(0), q.stride(1), q.stride(3), 0 if texts is None else texts.stride(0)),
        *((0, 0, 0, 0) if ring is None else (ring.texts.stride(0), ring.text.stride(0), ring.sink, ring.recent)),
        *(keys.data.shape[2], 0 if table is None else table.shape[3], slots, splits, ring_share, scale * 1.4426950408889634),
        **both,
        **rest,
        WARPS=launch.warps,
        STAGES=launch.stages,
        num_warps=launch.warps,
        **pdl,
        **limit,
    )
    merge_splits[(batch * q.shape[1], triton.cdiv(wide, 32))](
        counts, columns, parts, out, rings, most, splits, slots, ring_share, **both, num_warps=4, **pdl
    )
    return out


def _rest(q: Tensor, keys: Kept, values: Kept, group: int) -> dict[str, Any]:
    """What only the first kernel is compiled for.

    It computes the scores of all ``MEMBERS`` of a group at once; for each group of channels of values anew, ``REPEATS`` in all,
    in rows that tensor cores would otherwise leave empty. From 64 rows on Hopper takes other products (``wgmma``), which lay
    out keys otherwise than ``read_keys`` needs them.
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
        "OUTPUTS": _padded(values, 2 * members * repeats),  # wider than high, or warps share rows and each reads all values
        "FAST": q.is_cuda and q.dtype != torch.float32,
    }


def _padded(kept: Kept, least: int) -> int:
    return max(least * PARTS[kept.kind], int(triton.next_power_of_2(kept.dim)))


def _pointers(kept: Kept, pairs: bool) -> list[Tensor | None]:
    """Data in units, scale and offset; these as words of two if there are ``pairs`` of them."""
    numbers = [part.view(torch.int32) if part is not None and pairs else part for part in (kept.scale, kept.offset)]
    return [kept.data.view(torch.int16) if kept.kind else kept.data, *numbers]


def _launch(q: Tensor, rest: dict[str, Any], group: int, *, listed: bool, beside_ring: bool) -> Launch:
    """The quickest found on an H200. Microseconds of both launches, with heads of 128 channels, a group of four to a KV head:

    64 pages of 64 listed, 8 KV heads: bfloat16 9.5 with 2 stages and 3 programs, 9.8 with 3 and 2, 10.7 with 2 and 4. With 4 of
    the heads in a ring of 384 slots: 8.2. 32 KV heads without groups, 32 pages: 13.2,
    and with the choice of pages 28.4 with 2 warps, 29.1 with 4. All of 131,072 keys: bfloat16 128, as
    SDPA takes. With what a cache does beside attention, all keys: int8 80 in tiles of 128 keys with 2 programs, 98 with 3 of
    168 registers, 86 to 91 in tiles of 64; fp8 76 with 3 of 168, 81 with 2; int4 71 with 3 of 168, 85 with 2; 64 pages chosen:
    int8 30.0 with 3 stages, 31.0 with 2; int4 29.7 in tiles of 128, 31.6 of 64.
    """
    kinds = (rest["KEYS"], rest["VALUES"])
    bits = max({"int4": 4, "": 16}.get(kind, 8) for kind in kinds)
    if q.dtype == torch.float32 or beside_ring:
        bits = 8 * q.element_size()
    size = max(rest["CHANNELS"], rest["OUTPUTS"]) * bits // 8  # of a key; tiles have 16 KiB at most
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
