"""Check the attention of a decode step to cached keys on CUDA, against dense attention over the same numbers in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from support.on_gpu import ON_GPU

pytestmark = ON_GPU
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BATCH, PAGE = 2, 64


def keep(x: Tensor, kind: str, tokens: int, channels: int) -> tuple[Any, Tensor]:
    """Return ``x`` as pages store it, and the numbers that this stands for. A group is ``tokens`` x ``channels`` numbers."""
    from sparse_compile.passes.kernels.operands import Stored

    if kind == "":
        return Stored(x), x.double()
    if kind == "fp8":
        scale = (x.abs().amax(-1, keepdim=True) / 448).half()
        data = (x.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        return Stored(data, scale, None, kind), data.double() * scale.double()
    grouped = x.float().unflatten(3, (-1, channels)).unflatten(2, (-1, tokens))
    least, most = grouped.amin((3, 5), keepdim=True), grouped.amax((3, 5), keepdim=True)
    levels = 255 if kind == "int8" else 15
    scale, offset = ((most - least) / levels).half(), least.half()
    quantized = ((grouped - offset.float()) / scale.float()).round().clamp(0, levels)
    numbers = (quantized.double() * scale.double() + offset.double()).reshape(x.shape)
    data = quantized.reshape(x.shape).to(torch.uint8)
    if kind == "int4":
        low, high = data.chunk(2, dim=-1)
        data = low | high << 4
    return Stored(data, scale.flatten(2, 3).flatten(3), offset.flatten(2, 3).flatten(3), kind), numbers


def poison(kept: Any, unseen: Tensor, tokens: int) -> Any:
    """Return ``kept`` with NaN where no kernel may use a number. ``unseen`` is ``[B, H, N]``."""
    parts = []
    for part in kept[:3]:
        if part is not None and part.dtype.is_floating_point:
            gone = unseen if part.shape[2] == unseen.shape[2] else unseen.unflatten(2, (-1, tokens)).all(3)
            part = part.float().masked_fill(gone.unsqueeze(3), math.nan).to(part.dtype)
        parts.append(part)
    return kept._replace(data=parts[0], scale=parts[1], offset=parts[2])


def dense(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float) -> Tensor:
    group = q.shape[1] // keys.shape[1]
    keys, values, seen = (x.repeat_interleave(group, dim=1) for x in (keys, values, seen.unsqueeze(3)))
    scores = (q.double() @ keys.mT * scale).masked_fill(~seen.mT, -math.inf)
    result: Tensor = scores.softmax(-1).nan_to_num() @ values.masked_fill(~seen, 0)
    return result


def check(
    kinds: tuple[str, str] = ("", ""),
    reading: str = "all",
    rings: tuple[int, ...] = (),
    dtype: torch.dtype = torch.bfloat16,
    *,
    heads: int = 2,
    group: int = 4,
    dims: tuple[int, int] = (128, 128),
    groups: tuple[int, int] = (32, 128),
    page: int = PAGE,
    padded: bool = False,
) -> None:
    """Compare attention with the oracle. Heads in ``rings`` have a ring, and the others have pages.

    ``reading`` says which pages are read: ``all``, those ``listed`` at random, or ``none``.
    """
    from sparse_compile.passes.kernels.operands import PagedDecode, PageRead, RingRead
    from sparse_compile.passes.kernels.paged_decode import launch_paged_decode

    torch.manual_seed(0)
    device, (dim, wide), scale = "cuda", dims, dims[0] ** -0.5
    pages, slots = 40 * PAGE // page, 150
    columns, column = pages * page, pages * page - 75
    q = torch.randn(BATCH, 1, heads * group, dim, device=device).to(dtype).transpose(1, 2)
    by_head = q.unflatten(1, (heads, group))
    wanted = torch.empty(BATCH, heads, group, 1, wide, device=device, dtype=torch.double)
    paged = [head for head in range(heads) if head not in rings]
    keys = values = counts = table = texts = ring = None
    if paged:
        k = torch.randn(BATCH + 1, len(paged), columns, dim, device=device) + 3 * torch.randn(1, 1, 1, dim, device=device)
        v = torch.randn(BATCH + 1, len(paged), columns, wide, device=device)
        keys, exact_keys = keep(k.to(dtype), kinds[0], groups[0], 1)
        values, exact_values = keep(v.to(dtype), kinds[1], 1, groups[1])
        seen = (torch.arange(columns, device=device) <= column).expand(BATCH + 1, len(paged), columns)
        if padded:
            texts = torch.randint(-1, 9, (BATCH, columns), device=device)
            seen = seen & torch.cat([texts, texts[:1]]).ge(0).unsqueeze(1)
        if reading != "all":
            chosen = torch.rand(BATCH, len(paged), 1, pages, device=device) < (0.4 if reading == "listed" else 0)
            counts = chosen.sum(-1).int()
            table = torch.where(chosen, torch.arange(pages, device=device), pages).sort(-1).values.clamp(max=pages - 1).int()
            seen = seen & torch.cat([chosen, chosen[:1]]).squeeze(2).repeat_interleave(page, dim=2)
        seen = seen.contiguous()
        queries = by_head[:, paged].flatten(1, 2)
        attended = dense(queries, exact_keys[:BATCH], exact_values[:BATCH], seen[:BATCH], scale)
        wanted[:, paged] = attended.unflatten(1, (-1, group))
        keys, values = poison(keys, ~seen, groups[0]), poison(values, ~seen, 1)
    if rings:
        ring_keys, ring_values = (torch.randn(BATCH + 1, len(rings), slots, d, device=device).to(dtype) for d in dims)
        at = torch.stack([torch.randperm(slots + 40, device=device)[:slots] - 10 for _ in range(BATCH)])
        text = torch.tensor([[slots], [slots - 30]], device=device)
        seen = (at >= 0) & (at <= text) & ((at < 4) | (at > text - 60))
        seen = seen.unsqueeze(1).expand(BATCH, len(rings), slots)
        queries = by_head[:, list(rings)].flatten(1, 2)
        attended = dense(queries, ring_keys[:BATCH].double(), ring_values[:BATCH].double(), seen, scale)
        wanted[:, list(rings)] = attended.unflatten(1, (-1, group))
        for x in (ring_keys, ring_values):
            x[:BATCH].masked_fill_(~seen.unsqueeze(3), math.nan)
        ring = RingRead(ring_keys, ring_values, at, text, 4, 60, list(rings))
    at_column, usual = torch.tensor(column, device=device), pages if table is None else 16
    read = None
    if keys is not None and values is not None:
        read = PageRead(keys, values, counts, table, at_column, texts, page, usual)
    got = launch_paged_decode(PagedDecode(q, read, ring, scale))
    assert got.shape == (BATCH, heads * group, 1, wide) and got.is_contiguous()
    expected = wanted.flatten(1, 2)
    if reading == "none" and not rings:
        assert (got == 0).all()
    else:
        assert (got.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]


@pytest.mark.parametrize("reading", ["all", "listed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kinds", [("", ""), ("int8", "int8"), ("int4", "int4"), ("fp8", "fp8")])
def test_pages_of_all_kinds(kinds: tuple[str, str], dtype: torch.dtype, reading: str) -> None:
    check(kinds, reading, dtype=dtype, groups=(32, 32 if "int4" in kinds else 128))


@pytest.mark.parametrize("kinds", [("int8", "int4"), ("", "int8"), ("fp8", "")])
def test_keys_and_values_of_different_kinds(kinds: tuple[str, str]) -> None:
    check(kinds, groups=(64, 64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rings", [(0, 1, 2, 3), (1, 3), (0,)])
@pytest.mark.parametrize(("kinds", "reading"), [(("", ""), "listed"), (("int8", "int8"), "all")])
def test_rings_beside_pages(kinds: tuple[str, str], reading: str, rings: tuple[int, ...], dtype: torch.dtype) -> None:
    check(kinds, reading, rings, dtype, heads=4)


@pytest.mark.parametrize(("groups", "page"), [((16, 64), 16), ((64, 32), 64), ((32, 128), 128), ((16, 32), 48)])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_groups_and_pages_of_all_sizes(kind: str, groups: tuple[int, int], page: int) -> None:
    check((kind, kind), "listed", groups=groups, page=page)


@pytest.mark.parametrize(
    ("heads", "group", "dims"),
    [(8, 1, (64, 64)), (1, 3, (80, 96)), (2, 8, (256, 256)), (1, 20, (128, 64)), (1, 64, (64, 64)), (3, 2, (16, 32))],
)
@pytest.mark.parametrize("kinds", [("", ""), ("int8", "int4")])
def test_other_shapes(kinds: tuple[str, str], heads: int, group: int, dims: tuple[int, int]) -> None:
    check(kinds, heads=heads, group=group, dims=dims, groups=(32, dims[1]))


@pytest.mark.parametrize("reading", ["all", "listed"])
@pytest.mark.parametrize("kind", ["", "int8"])
def test_padding_is_not_seen(kind: str, reading: str) -> None:
    check((kind, kind), reading, padded=True)


@pytest.mark.parametrize("kind", ["", "int4"])
def test_nothing_listed_gives_zeros(kind: str) -> None:
    check((kind, kind), "none")


@pytest.mark.parametrize("kind", ["", "int8", "int4"])
def test_large_and_small_numbers_survive(kind: str) -> None:
    from sparse_compile.passes.kernels.operands import PagedDecode, PageRead
    from sparse_compile.passes.kernels.paged_decode import launch_paged_decode

    torch.manual_seed(0)
    q = torch.randn(1, 4, 1, 128, device="cuda", dtype=torch.bfloat16) * 1e-6
    keys, exact_keys = keep(torch.randn(1, 1, 1024, 128, device="cuda", dtype=torch.bfloat16) * 1e3, kind, 32, 1)
    values, exact_values = keep(torch.randn(1, 1, 1024, 128, device="cuda", dtype=torch.bfloat16) * 1e4, kind, 1, 128)
    at, scale = torch.tensor(1000, device="cuda"), 100.0
    got = launch_paged_decode(PagedDecode(q, PageRead(keys, values, None, None, at, None, 64, 16), None, scale))
    seen = (torch.arange(1024, device="cuda") <= 1000).view(1, 1, -1)
    wanted = dense(q, exact_keys, exact_values, seen, scale)
    assert (got.double() - wanted).norm() / wanted.norm() < 1e-2


@pytest.mark.parametrize("kind", ["", "int8"])
def test_a_graph_goes_on_as_columns_advance(kind: str) -> None:
    from sparse_compile.passes.kernels.operands import PagedDecode, PageRead
    from sparse_compile.passes.kernels.paged_decode import launch_paged_decode

    torch.manual_seed(0)
    q = torch.randn(1, 8, 1, 128, device="cuda", dtype=torch.bfloat16)
    keys, exact_keys = keep(torch.randn(1, 2, 8192, 128, device="cuda", dtype=torch.bfloat16), kind, 32, 1)
    values, exact_values = keep(torch.randn(1, 2, 8192, 128, device="cuda", dtype=torch.bfloat16), kind, 1, 128)
    column = torch.tensor(5, device="cuda")

    def attend() -> Tensor:
        return launch_paged_decode(PagedDecode(q, PageRead(keys, values, None, None, column, None, 64, 128), None, 0.1))

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = attend()
    for at in (0, 63, 64, 3000, 8191):
        column.fill_(at)
        graph.replay()
        seen = (torch.arange(8192, device="cuda") <= at).expand(1, 2, -1)
        wanted = dense(q, exact_keys, exact_values, seen, 0.1)
        assert (got.double() - wanted).norm() / wanted.norm() < 1e-2
