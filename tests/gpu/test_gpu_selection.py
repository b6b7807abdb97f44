"""Check page selection on CUDA: kernels against plain PyTorch, models against the reference, and one graph without syncs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, page_topk, per_head, sink, sliding_window
from sparse_compile.masks.selection.page_scoring import alive, choose, pool, score_summaries, summarize
from support.models import DECODERS, tokens
from support.on_gpu import ON_GPU, logits_of_chunks, logits_of_padded
from support.one_graph import assert_steps_are_one_graph

pytestmark = ON_GPU
CHOSEN = causal & (sink(4) | sliding_window(8) | page_topk(64, page=4))
STREAMING = causal & (sink(4) | sliding_window(20))
POLICIES: dict[str, sc.Policy | Mask] = {
    "decode": sc.Policy(prefill=causal, decode=CHOSEN),
    "both phases": sc.Policy(prefill=causal & page_topk(256), decode=CHOSEN),
    "means": sc.Policy(prefill=causal, decode=causal & page_topk(64, page=16, score="mean", group="sum")),
    "keys": sc.Policy(prefill=causal, decode=causal & page_topk(64, score="keys")),
    "every": sc.Policy(prefill=causal, decode=causal & page_topk(64, every=3)),
    "shared": sc.Policy(prefill=causal, decode=causal & page_topk(64, every=2, share={1: 0})),
    "by KV head": sc.Policy(prefill=causal, decode=per_head([CHOSEN, STREAMING])),
    "beside dense heads": sc.Policy(prefill=causal, decode=per_head([causal, CHOSEN])),
}


def run(policy: sc.Policy | Mask, chunks: list[int], ids: Tensor, inner: str, kernel: str = "auto") -> Tensor:
    """Return the logits of a text in chunks, with a cache that has more rows than are used."""
    torch._dynamo.reset()
    model = next(d for d in DECODERS if d.name == "llama").build().cuda()
    sizes: dict[str, Any] = {"max_length": 512, "max_batch": 3, "page_size": 16, "dtype": torch.float32, "device": "cuda"}
    cache = sc.SparseCache(model.config, policy, **sizes)
    model = sc.compile(model, policy, inner=inner, kernel=kernel, mode="reduce-overhead" if inner == "inductor" else None)
    return logits_of_chunks(model, cache, ids, chunks)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_kernels_equal_the_reference(policy: sc.Policy | Mask) -> None:
    ids, chunks = tokens(length=420).cuda(), [300, 100, *[1] * 20]
    got, wanted = (run(policy, chunks, ids, inner) for inner in ("inductor", "eager"))
    assert (got - wanted).abs().max() < 1e-5


def test_flex_attention_reads_the_chosen_pages_too() -> None:
    ids, chunks = tokens(length=420).cuda(), [400, *[1] * 20]
    got, wanted = (run(POLICIES["decode"], chunks, ids, *how) for how in (("inductor", "triton"), ("eager", "auto")))
    assert (got - wanted).abs().max() < 1e-5


def test_a_budget_above_the_length_is_dense() -> None:
    ids, chunks = tokens(length=130).cuda(), [100, *[1] * 30]
    chosen = sc.Policy(causal & (sink(4) | page_topk(144)))
    got, wanted = run(chosen, chunks, ids, "inductor"), run(causal, chunks, ids, "eager")
    assert (got - wanted).abs().max() < 1e-5


def test_padded_rows_equal_the_reference() -> None:
    results = []
    for inner in ("inductor", "eager"):
        torch._dynamo.reset()
        model = next(d for d in DECODERS if d.name == "llama").build().cuda()
        policy = POLICIES["decode"]
        sizes: dict[str, Any] = {"max_length": 250, "max_batch": 2, "page_size": 16, "dtype": torch.float32, "device": "cuda"}
        cache = sc.SparseCache(model.config, policy, **sizes)
        model = sc.compile(model, policy, inner=inner)
        results.append(logits_of_padded(model, cache, 200, 45))
    assert (results[0] - results[1]).abs().max() < 1e-5


@pytest.mark.parametrize("score", ["minmax", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "group", "dim"), [(2, 4, 128), (8, 1, 64), (1, 3, 80)])
def test_scores_equal_those_of_plain_pytorch(heads: int, group: int, dim: int, dtype: torch.dtype, score: str) -> None:
    from sparse_compile.passes.kernels.operands import PageScoring, SelectPages
    from sparse_compile.passes.kernels.page_scores import launch_score_pages
    from sparse_compile.passes.storage.codec import Format

    torch.manual_seed(0)
    batch, pages, column = 2, 100, 64 * 90 + 21
    keys = torch.randn(3, heads, pages * 64, dim, device="cuda", dtype=dtype)
    q = torch.randn(batch, heads * group, 1, dim, device="cuda", dtype=dtype)
    texts = torch.randint(-1, 9, (batch, pages * 64 - 7), device="cuda", dtype=torch.int32)
    texts[:, 160:176] = -1  # a logical page of padding
    valid = torch.nn.functional.pad(texts >= 0, (0, 7)) & (torch.arange(pages * 64, device="cuda") <= column)
    wanted = summarize(keys[:batch], valid, 16, score)
    summary = torch.full((3, *wanted.shape[1:]), torch.nan, device="cuda", dtype=dtype)
    summary[:batch, :, : 4 * 90 + 1] = wanted[:, :, : 4 * 90 + 1]
    summary[:batch, :, 4 * 90 + 1] = 1e4  # stale
    scores = torch.full((3, heads, pages), -7.0, device="cuda")
    at = torch.tensor(column, device="cuda")
    how, unread = PageScoring(64, 16, score, "max", 3), torch.empty(0, device="cuda")

    def score_pages(q: Tensor, anchor: Tensor) -> None:
        state = (keys, unread, summary, scores, unread, unread, None, None)
        token = (q, unread, unread, unread, at, anchor, unread, texts)
        launch_score_pages(SelectPages(*state, *token, how, 0, Format(), Format()))

    score_pages(q, at - 6)
    exact = {"rtol": 0, "atol": 0} if score == "minmax" else {"rtol": 1e-2, "atol": 1e-6}  # means are summed in another order
    torch.testing.assert_close(summary[:batch, :, 4 * 90 + 1], wanted[:, :, 4 * 90 + 1], **exact)
    by_head = score_summaries(q.unflatten(1, (heads, group)).squeeze(3), wanted, score)
    pooled = pool(by_head, "max", 4, alive(valid, 16).unsqueeze(1))
    torch.testing.assert_close(scores[:batch, :, :90], pooled[:, :, :90], rtol=1e-4, atol=1e-3)
    assert (scores[:batch, :, 90] == math.inf).all()
    before = scores.clone()
    score_pages(q * 2, at - 7)
    assert torch.equal(scores, before)  # scoring is not due


@pytest.mark.parametrize("pages", [1, 7, 512, 2048, 5000, 16384])
def test_pages_are_picked_as_by_plain_pytorch(pages: int) -> None:
    from sparse_compile.passes.kernels.topk_pages import pick_pages

    torch.manual_seed(pages)
    scores = torch.randn(4, 3, pages, device="cuda").mul(4).round()  # with ties
    scores[0, 0, ::5] = torch.nan
    scores[1, 1, ::3] = math.inf
    for classes in (torch.randint(0, 3, (1, 1, pages)), torch.zeros(3, 3, pages), (torch.rand(3, 1, pages) < 0.9).int()):
        known = classes.to("cuda", torch.int8)
        for budget in (1, 3, 64, pages + 1):
            width = min(pages, max(budget, int((known == 2).sum(-1).max())))
            got = pick_pages(scores, known, batch=3, budget=budget, width=width)
            for picked, plain in zip(got, choose(scores[:3], known, budget, width), strict=True):
                assert torch.equal(picked.squeeze(2), plain)


@pytest.mark.parametrize("later", [0, 63])
@pytest.mark.parametrize("newest", [0, 1, 512, 2048, 4096, 8192])
def test_the_newest_page_is_listed_without_being_searched(newest: int, later: int) -> None:
    from sparse_compile.passes.kernels.topk_pages import pick_pages

    torch.manual_seed(newest)
    pages, at = newest + 1 + later, torch.tensor(newest * 64 + 5, device="cuda")
    scores = torch.randn(2, 3, pages, device="cuda").mul(4).round()
    known = torch.randint(0, 3, (1, 3, pages), device="cuda", dtype=torch.int8)
    known[..., newest], known[..., newest + 1 :] = 2, 0
    for budget, width in ((1, 1), (3, min(64, pages)), (64, min(64, pages)), (pages, pages)):
        got = pick_pages(scores, known, at, batch=2, budget=budget, width=width, page_size=64)
        for picked, plain in zip(got, choose(scores, known, budget, width), strict=True):
            assert torch.equal(picked.squeeze(2), plain)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("heads", "group", "dim", "value_dim"), [(2, 4, 128, 128), (8, 1, 64, 64), (1, 3, 80, 96)])
def test_attention_to_listed_pages(
    heads: int, group: int, dim: int, value_dim: int, dtype: torch.dtype, tolerance: float
) -> None:
    from sparse_compile.passes.kernels.operands import PagedDecode, PageRead, Stored
    from sparse_compile.passes.kernels.paged_decode import launch_paged_decode

    torch.manual_seed(0)
    batch, pages, column = 2, 40, 64 * 37 + 20
    keys = torch.randn(3, heads, pages * 64, dim, device="cuda", dtype=dtype)
    values = torch.randn(3, heads, pages * 64, value_dim, device="cuda", dtype=dtype)
    q = torch.randn(batch, heads * group + 2, 1, dim, device="cuda", dtype=dtype)[:, 2:]  # a view with an offset
    chosen = torch.rand(batch, heads, 1, pages, device="cuda") < 0.4
    chosen[..., 37] = True
    counts = chosen.sum(-1).int()
    table = torch.where(chosen, torch.arange(pages, device="cuda"), pages).sort(-1).values.clamp(max=pages - 1).int()
    at = torch.tensor(column, device="cuda")
    read = PageRead(Stored(keys), Stored(values), counts, table, at, None, 64, 16)
    got = launch_paged_decode(PagedDecode(q, read, None, dim**-0.5))
    seen = chosen.repeat_interleave(64, dim=3) & (torch.arange(pages * 64, device="cuda") <= column)
    k, v = (x[:batch].repeat_interleave(group, dim=1).double() for x in (keys, values))
    scores = (q.double() @ k.mT * dim**-0.5).masked_fill(~seen.repeat_interleave(group, dim=1), -math.inf)
    wanted = scores.softmax(-1) @ v
    assert (got.double() - wanted).norm() / wanted.norm() < tolerance


@pytest.mark.slow
def test_steps_are_one_graph_without_syncs() -> None:
    model = next(d for d in DECODERS if d.name == "llama").build().cuda().bfloat16()
    assert_steps_are_one_graph(model, POLICIES["by KV head"], prompt=200, steps=300, page_size=16)


def test_chosen_blocks_of_a_prompt_equal_the_mask_they_are() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 1000, 64, device="cuda", dtype=torch.bfloat16) for heads in (4, 2, 2))
    mask = causal & (sink(64) | page_topk(384))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    step: Any = torch.compile(attend, backend=sc.Backend(mask))
    seen = mask.selected(q, k, page_size=128, q_block=128).dense(1000, 1000, heads=4, device="cuda")
    k, v = (x.repeat_interleave(2, dim=1).float() for x in (k, v))
    wanted = scaled_dot_product_attention(q.float(), k, v, attn_mask=seen)
    got = step(q, k[:, ::2].bfloat16(), v[:, ::2].bfloat16()).float()
    assert (got - wanted).norm() / wanted.norm() < 5e-3
