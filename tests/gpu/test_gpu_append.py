"""Append tokens to quantized pages on CUDA, in one launch. Every bit must equal that of plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import sparse_compile as sc
from sparse_compile.masks.selection.page_scoring import summary_width
from sparse_compile.passes.kernels.operands import Append
from sparse_compile.passes.storage.codec import Format, QuantizedTensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    pytest.mark.filterwarnings("ignore:The CUDA Graph is empty"),
]
DEVICE, SEED = "cuda", 0
BATCH, HEADS, PAGE, PAGES = 2, 2, 32, 5
SLOTS = PAGE * PAGES
COLUMNS = (0, 1, PAGE - 1, PAGE, 2 * PAGE - 1, 2 * PAGE, 3 * PAGE + 5, SLOTS - 1)  # tails wrap around after two pages
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FORMATS = {
    "int8": sc.KVFormat(),
    "int4": sc.KVFormat("int4", "int4"),
    "fp8": sc.KVFormat("fp8", "fp8"),
    "int8 and int4": sc.KVFormat("int8", "int4"),
    "int4 and fp8": sc.KVFormat("int4", "fp8"),
    "fp8 and int8": sc.KVFormat("fp8", "int8"),
    "keys alone": sc.KVFormat("int8", None),
    "values alone": sc.KVFormat(None, "int4"),
}
SHAPES = {
    "groups of 8 and of 16": (sc.KVFormat("int4", "int8", 8, 16), (64, 64)),
    "groups of a half and of two": (sc.KVFormat("int8", "int4", 16, 2), (64, 64)),
    "groups of one": (sc.KVFormat("int4", "int4", 1, 1), (16, 16)),
    "groups across the halves of a head": (sc.KVFormat("int4", "int4", 4, 32), (72, 96)),
    "heads of 80": (sc.KVFormat("int8", "int4"), (80, 80)),
    "heads of 40 and 72": (sc.KVFormat("int4", "int8"), (40, 72)),
    "heads of 24 in fp8": (sc.KVFormat("fp8", "fp8"), (24, 20)),
    "large heads": (sc.KVFormat("int8", "int4"), (256, 128)),
}


@dataclass
class State:
    """The cached tensors of a layer, which are written in place."""

    key_tail: Tensor
    value_tail: Tensor
    keys: QuantizedTensor[Tensor]
    values: QuantizedTensor[Tensor]
    summary: Tensor | None

    def copy(self) -> State:
        """Return the same numbers in new tensors."""
        keys, values = (QuantizedTensor(*map(_clone, quantized)) for quantized in (self.keys, self.values))
        return State(_clone(self.key_tail), _clone(self.value_tail), keys, values, _clone(self.summary))

    def bits(self) -> list[Tensor]:
        """Return all tensors as bytes. All NaN become equal, because their bits may differ."""
        parts = (self.key_tail, self.value_tail, *self.keys, *self.values, self.summary)
        settled = (part.nan_to_num(12345.0, math.inf, -math.inf) for part in parts if part is not None)
        return [part.view(torch.uint8) for part in settled]


def _clone(x: Tensor | None) -> Any:
    return None if x is None else x.clone()


def random_state(
    forms: tuple[Format, Format], dims: tuple[int, int], dtype: torch.dtype, *, score: str = "", page: int = 1
) -> State:
    """Return a cache with more rows than are used, and random numbers in every slot."""
    key_tail, value_tail = (numbers(BATCH + 1, 2 * PAGE, dim, dtype) for dim in dims)
    sides: list[QuantizedTensor[Tensor]] = []
    for form, dim in zip(forms, dims, strict=True):
        shapes = [((BATCH + 1, *shape), kind) for shape, kind in form.parts(HEADS, SLOTS, dim, dtype)]
        sides.append(QuantizedTensor(*(torch.randint(0, 99, shape, device=DEVICE).to(kind) for shape, kind in shapes)))
    width = summary_width(score, dims[0]) if score else 0
    summary = torch.randn(BATCH + 1, HEADS, SLOTS // page, width, device=DEVICE).to(dtype) if score else None
    return State(key_tail, value_tail, sides[0], sides[1], summary)


def numbers(batch: int, tokens: int, dim: int, dtype: torch.dtype) -> Tensor:
    """Return random numbers ``[batch, HEADS, tokens, dim]`` whose channels have different means and ranges."""
    spread = torch.logspace(-2, 1, dim, device=DEVICE)
    x = torch.randn(batch, HEADS, tokens, dim, device=DEVICE) * spread + torch.linspace(-9, 9, dim, device=DEVICE)
    return x.to(dtype)


def check(
    kv: sc.KVFormat,
    dtype: torch.dtype = torch.bfloat16,
    dims: tuple[int, int] = (64, 64),
    *,
    columns: tuple[int, ...] = COLUMNS,
    padded: bool = False,
    score: str = "",
    change: Any = None,
) -> None:
    """Append a token at each of ``columns`` with Triton and with PyTorch, and compare.

    ``change`` modifies the numbers of tails and tokens in place.
    """
    from sparse_compile.passes.kernels.append_token import launch_append
    from sparse_compile.passes.ops.cache.quantized_append import append_in_torch

    torch.manual_seed(SEED)
    forms = kv.forms(*dims, PAGE)
    assert forms is not None
    page = 16 if score else 1
    for column in columns:
        state = random_state(forms, dims, dtype, score=score, page=page)
        k, v = (numbers(BATCH, 3, dim, dtype)[:, :, 1:2] for dim in dims)  # not contiguous
        for x in (state.key_tail, state.value_tail, k, v) if change is not None else ():
            change(x)
        texts = torch.randint(-1, 2, (BATCH, SLOTS), device=DEVICE) if padded else None
        wanted, at = state.copy(), torch.tensor(column, device=DEVICE)
        operands = (k, v, at, texts, *forms, page, score)
        append(append_in_torch, wanted, *operands)
        append(launch_append, state, *operands)
        assert_same(state, wanted, exactly=score != "mean")


def append(how: Callable[..., None], state: State, *operands: Any) -> None:
    how(Append(state.key_tail, state.value_tail, state.keys, state.values, state.summary, *operands))


def assert_same(got: State, wanted: State, *, exactly: bool = True) -> None:
    if not exactly and got.summary is not None and wanted.summary is not None:  # means are summed in another order
        torch.testing.assert_close(got.summary, wanted.summary, rtol=1e-2, atol=1e-5)
        got.summary = wanted.summary
    for number, (a, b) in enumerate(zip(got.bits(), wanted.bits(), strict=True)):
        assert torch.equal(a, b), f"part {number} differs in {int((a != b).sum())} of {a.numel()} bytes"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMATS)
def test_codes_have_the_bits_of_plain_pytorch(name: str, dtype: torch.dtype) -> None:
    check(FORMATS[name], dtype)


@pytest.mark.parametrize("name", SHAPES)
def test_heads_and_groups_of_all_sizes(name: str) -> None:
    kv, dims = SHAPES[name]
    check(kv, dims=dims)


@pytest.mark.parametrize("name", FORMATS)
def test_padding_has_no_say(name: str) -> None:
    check(FORMATS[name], padded=True)


@pytest.mark.parametrize("score", ["minmax", "mean"])
@pytest.mark.parametrize("padded", [False, True])
def test_pages_are_described_in_the_same_launch(score: str, padded: bool) -> None:
    check(FORMATS["int8"], score=score, padded=padded)
    check(FORMATS["values alone"], score=score, padded=padded)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [0.0, -3.0, 1e-7, 6e4])
def test_groups_of_one_number(number: float, dtype: torch.dtype) -> None:
    for name in ("int8", "int4", "fp8"):
        check(FORMATS[name], dtype, columns=COLUMNS[2:5], change=lambda x: x.fill_(number))


@pytest.mark.parametrize("size", [1e-8, 1e-4, 1e5, 1e30])
def test_small_and_large_numbers(size: float) -> None:
    for name in ("int8", "int4", "fp8"):
        check(FORMATS[name], torch.float32, columns=COLUMNS[2:5], change=lambda x: x.mul_(size))


def test_numbers_halfway_between_codes() -> None:
    def change(x: Tensor) -> None:
        x.copy_((torch.randint(0, 511, x.shape, device=DEVICE) / 2).to(x.dtype))
        x[..., 0, :], x[..., 0] = 0, 0

    for name in ("int8", "int4", "fp8"):
        check(FORMATS[name], torch.float32, change=change)


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_what_is_not_finite_stays_in_its_group(name: str, wrong: float) -> None:
    def change(x: Tensor) -> None:
        x.masked_fill_(torch.rand(x.shape, device=DEVICE) < 0.02, wrong)

    check(FORMATS[name], torch.float32, change=change)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_a_step_that_chooses_pages_encodes_as_well(name: str, padded: bool, every: int) -> None:
    from sparse_compile.passes.kernels.operands import PageScoring, SelectPages
    from sparse_compile.passes.kernels.page_scores import launch_select_pages
    from sparse_compile.passes.ops.cache.quantized_append import append_in_torch

    torch.manual_seed(SEED)
    forms = FORMATS[name].forms(64, 64, PAGE)
    assert forms is not None
    for column in COLUMNS:
        state = random_state(forms, (64, 64), torch.bfloat16, score="minmax", page=16)
        q = torch.randn(BATCH, 2 * HEADS, 1, 64, device=DEVICE).bfloat16()
        k, v = (numbers(BATCH, 3, 64, torch.bfloat16)[:, :, 1:2] for _ in range(2))
        texts = torch.randint(-1, 2, (BATCH, SLOTS), device=DEVICE) if padded else None
        classes = torch.ones(1, 1, PAGES, device=DEVICE, dtype=torch.int8)
        changed = torch.zeros(1, device=DEVICE, dtype=torch.int32)
        at, anchor = (torch.tensor(n, device=DEVICE) for n in (column, 1))
        choices = []
        wanted = state.copy()
        append(append_in_torch, wanted, k, v, at, texts, *forms, 16, "minmax")
        for x in (state, plain := wanted.copy()):
            scores = torch.zeros(BATCH + 1, HEADS, PAGES, device=DEVICE)
            counts = torch.zeros(BATCH + 1, HEADS, 1, device=DEVICE, dtype=torch.int32)
            table = torch.zeros(BATCH + 1, HEADS, 1, 3, device=DEVICE, dtype=torch.int32)
            buffers = (x.key_tail, x.value_tail, x.summary, scores, counts, table)
            quantized: Any = (x.keys, x.values, forms) if x is state else (None, None, (Format(), Format()))
            token, how = (q, k, v, classes, at, anchor, changed, texts), PageScoring(PAGE, 16, "minmax", "max", every)
            fields: Any = (*buffers, *quantized[:2], *token, how, 2, *quantized[2])
            launch_select_pages(SelectPages(*fields), always=every == 1)
            choices.append((scores, counts, table))
        assert all(torch.equal(a, b) for a, b in zip(*choices, strict=True))
        assert_same(state, wanted)
        assert_same(plain, wanted)


@pytest.mark.parametrize("name", ["int8", "int4", "fp8"])
def test_a_graph_goes_on_as_columns_advance(name: str) -> None:
    from sparse_compile.passes.kernels.append_token import launch_append
    from sparse_compile.passes.ops.cache.quantized_append import append_in_torch

    torch.manual_seed(SEED)
    forms = FORMATS[name].forms(64, 64, PAGE)
    assert forms is not None
    state = random_state(forms, (64, 64), torch.bfloat16)
    wanted, column = state.copy(), torch.tensor(0, device=DEVICE)
    k, v = (numbers(BATCH, 1, 64, torch.bfloat16) for _ in range(2))

    operands = (k, v, column, None, *forms, 1, "")
    append(launch_append, state, *operands)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        append(launch_append, state, *operands)
    for n in range(SLOTS):
        column.fill_(n)
        for x in (k, v):
            x.normal_()
        graph.replay()
        append(append_in_torch, wanted, *operands)
    assert_same(state, wanted)
