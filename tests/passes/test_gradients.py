"""Training through the backend on CPU: gradients equal those of the plain model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, full, per_head, sink, sliding_window
from support.models import DECODERS, VOCABULARY, tokens

STREAMING = causal & (sink(2) | sliding_window(6))

pytestmark = pytest.mark.usefixtures("fresh")


class Attention(nn.Module):
    """Grouped-query attention, under a policy as a dense mask or without one, so that the backend applies it."""

    def __init__(self, policy: Mask | None = None, *, float_mask: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 64)
        self.bias = nn.Parameter(torch.randn(4, 20, 20)) if float_mask else None
        self.policy, self.dropout = policy, dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([32, 16, 16], dim=-1)
        q, k, v = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in (q, k, v))
        seen = causal.dense(20, 20) if self.policy is None else (causal & self.policy).dense(20, 20, heads=4)
        mask = seen if self.bias is None else torch.where(seen, self.bias, -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=self.dropout, enable_gqa=True)


def gradients(model: nn.Module, run: Any, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    run(x).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert float((got[name] - gradient).abs().max() / gradient.abs().max()) < 1e-5, name


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("float_mask", [False, True], ids=["mask", "trained bias"])
@pytest.mark.parametrize("policy", [None, STREAMING, per_head([causal, STREAMING])], ids=["exact", "sparse", "per head"])
def test_gradients_are_those_of_dense_attention(inner: str, float_mask: bool, policy: Mask | None) -> None:
    torch.manual_seed(0)
    model, x = Attention(float_mask=float_mask), torch.randn(2, 20, 16)
    oracle = Attention(policy, float_mask=float_mask)
    oracle.load_state_dict(model.state_dict())
    backend = sc.Backend(policy, inner=inner)
    got = gradients(model, torch.compile(model, backend=backend), x)
    assert_same_gradients(got, gradients(oracle, oracle, x))
    assert backend.report.left == []


def test_inductor_trains_on_cpu_through_the_dense_reference() -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 20, 16)
    oracle = Attention(STREAMING)
    oracle.load_state_dict(model.state_dict())
    backend = sc.Backend(STREAMING)
    got = gradients(model, torch.compile(model, backend=backend), x)
    assert_same_gradients(got, gradients(oracle, oracle, x))
    (site,) = backend.report.sites
    assert (site.kernel, site.reason) == ("dense reference", "FlexAttention has no gradients on CPU")


@pytest.mark.parametrize("decoder", [d for d in DECODERS if d.name in ("llama", "gemma2 eager", "gpt_oss")], ids=str)
def test_a_model_in_training_mode_gets_the_gradients_of_the_plain_model(decoder: Any) -> None:
    model = decoder.build().train()
    other = copy.deepcopy(model)
    backend = sc.Backend(inner="eager")
    ids = tokens()
    fast: Any = torch.compile(model, backend=backend)
    fast(ids, labels=ids, use_cache=False).loss.backward()
    other(ids, labels=ids, use_cache=False).loss.backward()
    for (name, got), wanted in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (got.grad is None) == (wanted.grad is None), name
        if wanted.grad is not None and got.grad is not None:
            scale = max(float(wanted.grad.abs().max()), 1e-3)
            assert float((got.grad - wanted.grad).abs().max()) / scale < 1e-5, name
    assert backend.report.left == []


def bert(dropout: float) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**sizes, vocab_size=VOCABULARY, hidden_dropout_prob=0.0, attention_probs_dropout_prob=dropout)
    return BertModel(config, add_pooling_layer=False).train()


@pytest.mark.parametrize("policy", [None, STREAMING], ids=["exact", "sparse"])
def test_an_encoder_in_training_gets_the_gradients_of_a_dense_mask(policy: Mask | None) -> None:
    model, other, ids = bert(0.0), bert(0.0), tokens()
    visible = full if policy is None else policy
    backend = sc.Backend(policy, inner="eager")
    fast: Any = torch.compile(model, backend=backend)
    fast(ids).last_hidden_state.square().mean().backward()
    other(ids, attention_mask=visible.dense(24, 24).expand(2, 1, 24, 24)).last_hidden_state.square().mean().backward()
    for (name, got), wanted in zip(model.named_parameters(), other.parameters(), strict=True):
        assert got.grad is not None and wanted.grad is not None, name
        scale = max(float(wanted.grad.abs().max()), 1e-3)
        assert float((got.grad - wanted.grad).abs().max()) / scale < 1e-5, name
    assert len(backend.report.rewritten) == 2


def test_an_encoder_with_dropout_is_left_in_training_and_read_in_evaluation() -> None:
    model: Any = bert(0.1)
    backend = sc.Backend(STREAMING, inner="eager")
    run: Any = torch.compile(model, backend=backend)
    with pytest.warns(sc.SparseCompileWarning, match=r"2 attention calls .* run without the policy: dropout_p=0\.1"):
        run(tokens())
    assert [site.reason for site in backend.report.sites] == ["dropout_p=0.1: FlexAttention has no dropout"] * 2
    model.eval()
    run(tokens())
    assert [site.action for site in backend.report.sites] == ["left", "left", "sparse", "sparse"]


def test_dropout_in_training_is_left_alone_with_the_reason() -> None:
    model = Attention(dropout=0.1)
    backend = sc.Backend(inner="eager")
    torch.compile(model, backend=backend)(torch.randn(1, 20, 16))
    assert [site.reason for site in backend.report.left] == ["dropout_p=0.1: FlexAttention has no dropout"]


def test_rows_that_see_nothing_have_gradients_that_are_numbers() -> None:
    """The first queries of a left-padded row see no key, so their output and their gradients are zero."""
    torch.manual_seed(0)
    model, x = Attention(float_mask=True), torch.randn(2, 20, 16)
    backend = sc.Backend(causal & ~sink(3), inner="eager")
    by_name = gradients(model, torch.compile(model, backend=backend), x)
    assert all(bool(g.isfinite().all()) for g in by_name.values())


def test_double_precision_attention_with_a_bias_passes_gradcheck() -> None:
    """A score mod runs the dense reference, which computes in the precision of its inputs."""
    torch.manual_seed(0)
    shape = (1, 2, 5, 4)
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (torch.tanh(q @ k.transpose(2, 3)) * 5.0).softmax(-1) @ v

    fast = torch.compile(attention, backend=(backend := sc.Backend(inner="eager")))
    assert torch.autograd.gradcheck(fast, (q, k, v))
    assert [site.score_mod for site in backend.report.sites] == ["softcap(5.0)"]
