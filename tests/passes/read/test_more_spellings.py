"""Attention over merged axes, with einsum, in place, or with unusual changes of scores and weights is read exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sparse_compile as sc
from sparse_compile.masks import causal, per_head, sink, sliding_window
from support.comparison import assert_read, compare, qkv
from support.spelling import SMALLEST, Attention, B, D, H, N, additive, merged, sdpa, tril


def bmm(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """OPT and BART of older versions: heads are merged into the batch, and scores are split for the mask only."""
    q, k, v = merged(q), merged(k), merged(v)
    scores = torch.bmm(q, k.transpose(1, 2)).view(B, H, N, N) + additive(m, SMALLEST)
    weights = torch.max(scores, torch.tensor(SMALLEST)).view(B * H, N, N).softmax(-1)
    return torch.bmm(weights, v).view(B, H, N, D)


def bloom(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    alibi = torch.arange(1.0, H + 1).view(1, H, 1, 1) * torch.arange(N) / 10
    alibi = alibi.expand(B, H, 1, N).reshape(B * H, 1, N)
    scores = alibi.baddbmm(batch1=merged(q), batch2=merged(k.transpose(2, 3)), beta=0.5, alpha=0.3)
    weights = F.softmax(scores.view(B, H, N, N) + additive(m), dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.bmm(weights.view(B * H, N, N), merged(v)).view(B, H, N, D)


def in_place(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    scores = q @ k.mT
    scores.div_(2)
    scores /= 1.5
    scores *= 3
    scores += torch.arange(N) / 10
    scores.masked_fill_(~m, -torch.inf)
    weights = scores.softmax(-1)
    weights.nan_to_num_()
    return weights @ v


def last_axis_of_heads(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """XLNet: lengths come first, and the mask is subtracted."""
    q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
    scores = (torch.einsum("ibnd,jbnd->bnij", q, k) + torch.einsum("ibnd,jbnd->bnij", q, k.flip(0))) * 0.2
    weights = (scores - 1e30 * (~m).float()).softmax(3)
    return torch.einsum("bnij,jbnd->ibnd", weights, v).permute(1, 2, 0, 3)


def grouped(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    q = q.unflatten(1, (2, 2))
    scores = q @ k[:, :2].unsqueeze(2).mT + additive(m)
    return (scores.softmax(-1) @ v[:, :2].unsqueeze(2)).flatten(1, 2)


SPELLINGS: dict[str, tuple[Attention, str]] = {
    "keys transposed at once": (lambda q, k, v, m: (q @ k.transpose(1, 2).permute(0, 2, 3, 1)).softmax(-1) @ v, "full"),
    "keys from the length axis": (
        lambda q, k, v, m: (q @ k.transpose(1, 2).contiguous().permute(0, 2, 3, 1)).softmax(-1) @ v,
        "full",
    ),
    "keys held transposed": (lambda q, k, v, m: (q @ k.mT.contiguous()).softmax(-1) @ v, "full"),
    "bmm": (bmm, "explicit"),
    "bmm for scores only": (
        lambda q, k, v, m: (torch.bmm(merged(q), merged(k).mT).view(B, H, N, N) + additive(m)).softmax(-1) @ v,
        "explicit",
    ),
    "bmm for values only": (
        lambda q, k, v, m: torch.bmm(merged((q @ k.mT).masked_fill(~m, -torch.inf).softmax(-1)), merged(v)).view(B, H, N, D),
        "explicit",
    ),
    "a bias while merged": (
        lambda q, k, v, m: (merged(q @ k.mT) + torch.arange(B * H).view(-1, 1, 1) * m).view(B, H, N, N).softmax(-1) @ v,
        "full, bias",
    ),
    "bmm without a batch": (lambda q, k, v, m: torch.bmm(torch.bmm(q[0], k[0].mT).softmax(-1), v[0]), "full"),
    "bloom": (bloom, "explicit, bias"),
    "in place": (in_place, "explicit, bias"),
    "einsum": (
        lambda q, k, v, m: torch.einsum("bhqk,bhkd->bqhd", torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1), v),
        "full",
    ),
    "einsum with an ellipsis": (
        lambda q, k, v, m: torch.einsum("...qk,...kd->...qd", torch.einsum("...qd,...kd->...qk", q, k).softmax(-1), v),
        "full",
    ),
    "xlnet": (last_axis_of_heads, "explicit, bias"),
    "grouped": (grouped, "explicit"),
    "a mask, then a scale": (lambda q, k, v, m: ((q @ k.mT + additive(m, -1e9)) / 2).softmax(-1) @ v, "explicit"),
    "a bias, then a scale": (lambda q, k, v, m: ((q @ k.mT + m.float()) * 0.5).softmax(-1) @ v, "full, bias"),
    "a fill, then a scale": (lambda q, k, v, m: ((q @ k.mT).masked_fill(~m, -1e9) / 2).softmax(-1) @ v, "explicit"),
    "a cap, then scales": (lambda q, k, v, m: ((q @ k.mT).tanh() * 2 * 3).softmax(-1) @ v, "full, softcap(6.0)"),
    "a temperature": (lambda q, k, v, m: (q @ k.mT / (m.sum() / 9)).softmax(-1) @ v, "full"),
    "a temperature by head": (
        lambda q, k, v, m: (q @ k.mT * torch.arange(1.0, H + 1).view(H, 1, 1) + additive(m)).softmax(-1) @ v,
        "explicit",
    ),
    "a subtracted bias": (lambda q, k, v, m: (q @ k.mT - m.float()).softmax(-1) @ v, "full, bias"),
    "an added number": (lambda q, k, v, m: (1.5 + (q @ k.mT + 0) * 0.5 - 2).softmax(-1) @ v, "full"),
    "a subtracted maximum": (lambda q, k, v, m: ((s := q @ k.mT) - s.amax(-1, keepdim=True)).softmax(-1) @ v, "full"),
    "a smallest score": (
        lambda q, k, v, m: (q @ k.mT + additive(m)).clamp(min=SMALLEST).softmax(-1) @ v,
        "explicit",
    ),
    "nan_to_num": (lambda q, k, v, m: (q @ k.mT + additive(m)).softmax(-1).nan_to_num(0.0) @ v, "explicit"),
    "zeroed where hidden": (
        lambda q, k, v, m: (q @ k.mT).masked_fill(hidden := ~m, -1e9).softmax(-1).masked_fill(hidden, 0.0) @ v,
        "explicit",
    ),
    "filled with a tensor": (
        lambda q, k, v, m: torch.where(m, s := q @ k.mT, torch.full_like(s, -1e9)).softmax(-1) @ v,
        "explicit",
    ),
    "where as a method": (lambda q, k, v, m: (q @ k.mT).where(m, -torch.inf).softmax(-1) @ v, "explicit"),
    "special.softmax": (lambda q, k, v, m: torch.special.softmax(q @ k.mT, -1) @ v, "full"),
    "log_softmax": (lambda q, k, v, m: (q @ k.mT).log_softmax(-1).exp() @ v, "full"),
    "a bias made of queries": (
        lambda q, k, v, m: (q @ k.mT + (q @ k[:, :, :3].mT).repeat(1, 1, 1, 4)).softmax(-1) @ v,
        "full, bias",
    ),
    "sdpa of three axes": (lambda q, k, v, m: sdpa(q[:, 0], k[:, 0], v[:, 0], attn_mask=m, scale=0.3), "explicit"),
    "sdpa of merged heads": (
        lambda q, k, v, m: sdpa(merged(q), merged(k), merged(v), is_causal=True, scale=0.3),
        "causal",
    ),
    "sdpa of five axes": (lambda q, k, v, m: sdpa(q[None], k[None], v[None], attn_mask=m[None], scale=0.3), "explicit"),
    "sdpa without a batch, grouped": (
        lambda q, k, v, m: sdpa(q[0], k[0, :2], v[0, :2], scale=0.3, enable_gqa=True),
        "full",
    ),
}


@pytest.mark.parametrize("form", SPELLINGS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["", "dynamic"])
def test_a_spelling_is_read(form: str, dynamic: bool) -> None:
    attention, mask = SPELLINGS[form]
    assert_read(compare(attention, *qkv(), tril(), dynamic=dynamic or None), mask)


def test_no_policy_applies_to_parts_of_a_text() -> None:
    """Attention over five axes may be local attention, in which the first key of a block is not the first of the text."""
    blocks = [x.unflatten(2, (3, 4)).transpose(1, 2) for x in qkv()]  # [batch, blocks, heads, length, channels]
    with pytest.warns(sc.SparseCompileWarning, match="may be parts of a text, and a policy needs their positions"):
        result = compare(lambda q, k, v: (q @ k.mT).softmax(-1) @ v, *blocks, policy=causal)
    assert result.error < 1e-5
    assert [site.action for site in result.report.sites] == ["left"]


# Where no policy applies or hidden keys are no large negative products, and where heads share keys or are not in the graph.
NO_ORACLE = {"sdpa of five axes", "xlnet", "a cap, then scales", "a bias made of queries"}
ALIKE = {"grouped", "bmm without a batch", "sdpa of three axes", "sdpa without a batch, grouped"}


@pytest.mark.parametrize("form", [form for form in SPELLINGS if form not in NO_ORACLE])
def test_a_policy_acts_the_same_on_every_spelling(form: str) -> None:
    """In the oracle, every query has a channel of its own, on which keys hold a large negative number to be hidden."""
    attention, _ = SPELLINGS[form]
    streaming = causal & (sink(1) | sliding_window(3))
    policy = streaming if form in ALIKE else per_head([causal, streaming, streaming, causal & sliding_window(5)])
    q, k, v = qkv()
    one_hot = torch.eye(N).expand(B, H, N, N)
    hiding = torch.where(policy.dense(N, N, heads=H), 0.0, -1e5).mT.expand(B, H, N, N)
    wanted = attention(torch.cat([q, one_hot], -1), torch.cat([k, hiding], -1), v, tril())
    result = compare(attention, q, k, v, tril(), policy=policy)
    assert {site.action for site in result.report.sites} == {"sparse"}
    assert (result.got - wanted).abs().max() < 1e-4
    assert (result.wanted - wanted).abs().max() > 1e-2, "the policy hides nothing: the test shows nothing"


def test_a_product_with_a_parameter_is_no_attention() -> None:
    """The router of a mixture of experts, whose weights mix what the experts return."""

    class Router(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.Parameter(torch.randn(D, 5))

        def forward(self, x: Tensor) -> Any:
            return (x @ self.experts).softmax(-1) @ torch.randn(5, D, generator=torch.Generator().manual_seed(0))

    assert compare(Router(), qkv()[0]).report.sites == []


def test_scores_changed_in_place_leave_no_dead_product() -> None:
    kept: list[str] = []

    def look(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        result = sc.Backend(inner="eager")(gm, inputs)
        kept.extend(str(node.target) for node in gm.graph.nodes)
        return result

    torch._dynamo.reset()
    torch.compile(in_place, backend=look)(*qkv(), tril())
    assert not any("masked_fill_" in name or "itruediv" in name or "matmul" in name for name in kept)


def test_merged_keys_that_are_written_in_place_are_read_from_the_copy() -> None:
    """Merging transposed axes copies, so what is written to the copy is not in the original."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = merged(k.transpose(1, 2).contiguous().transpose(1, 2)), merged(v)
        keys.mul_(0.5)
        return torch.bmm(torch.bmm(merged(q), keys.mT).softmax(-1), values)

    assert_read(compare(attention, *qkv()), "full")

    def source_written(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        source = k.transpose(1, 2).contiguous().transpose(1, 2)
        keys = merged(source)
        source.zero_()
        return torch.bmm(torch.bmm(merged(q), keys.mT).softmax(-1), merged(v))

    assert_read(compare(source_written, *qkv()), "full")


def test_a_wide_temperature_keeps_the_dtype_of_the_queries() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ((q @ k.mT) * torch.full((H, 1, 1), 0.3)).softmax(-1).to(v.dtype) @ v

    result = compare(attention, *(x.bfloat16() for x in qkv()), output=lambda out: out.float())
    assert result.masks == ["full"]
    assert result.error < 2**-6


def test_dropout_of_probability_zero_that_became_a_symbol_is_read() -> None:
    class Dropping(torch.nn.Module):
        p = 0.0

        def forward(self, x: Tensor) -> Any:
            q = x.unflatten(-1, (4, 8)).transpose(1, 2)
            weights = F.dropout((q @ q.mT).softmax(-1), self.p, training=True)
            return weights @ q + sdpa(q, q, q, dropout_p=self.p)

    assert_read(compare(Dropping(), torch.randn(B, N, 32), dynamic=True), "full", calls=2)
