"""Policies whose tensors do not fit the text or the batch raise before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, document, explicit, padding, prefix
from support.comparison import relative_error

pytestmark = pytest.mark.usefixtures("fresh")

SHORT: dict[str, tuple[Mask, str]] = {
    "padding": (
        padding(torch.ones(1, 8, dtype=torch.bool)),
        "padding covers 8 positions, but the attention reaches",
    ),
    "document": (document(torch.zeros(1, 8, dtype=torch.int64)), "document covers 8 positions, but the attention reaches"),
    "explicit": (explicit(torch.ones(1, 1, 8, 8, dtype=torch.bool)), "explicit covers queries 0 to 7, but the attention has"),
    "prefix of another batch": (prefix(torch.tensor([3, 4])), "prefix was built for batch size 2, but the attention has batch"),
}


def attention(x: Tensor, mask: Tensor | None = None) -> Tensor:
    q = x.unflatten(-1, (4, 8)).transpose(1, 2)
    return sdpa(q, q, q, attn_mask=mask, is_causal=mask is None)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("form", SHORT)
def test_a_tensor_that_does_not_fit_is_an_error(form: str, dynamic: bool, inner: str) -> None:
    mask, message = SHORT[form]
    run = torch.compile(attention, backend=sc.Backend(causal & mask, inner=inner), dynamic=dynamic)
    with pytest.raises(ValueError, match=message):
        run(torch.randn(1 if "batch" in form else 3, 12, 32))


def test_a_graph_with_dynamic_lengths_checks_every_run() -> None:
    policy = causal & padding(torch.tensor([[False] + [True] * 11]))
    backend = sc.Backend(policy, inner="eager")
    run: Any = torch.compile(attention, backend=backend, dynamic=True)
    for length in (8, 12):
        x = torch.randn(2, length, 32)
        assert relative_error(run(x), attention(x, policy.dense(length, length))) < 1e-5
    with pytest.raises(ValueError, match="padding covers 12 positions, but the attention reaches position 15"):
        run(torch.randn(2, 16, 32))
    assert backend.report.compiles == 1
