"""Run a model eagerly and through the backend, and compare the results."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import sparse_compile as sc
from sparse_compile.masks import Mask


@dataclass(frozen=True)
class Comparison:
    """The eager and compiled outputs of a model, and the report of the backend."""

    wanted: Tensor
    got: Tensor
    report: sc.Report

    @property
    def error(self) -> float:
        """The largest difference, relative to the largest value."""
        return relative_error(self.got, self.wanted)

    @property
    def masks(self) -> list[str]:
        """The model's own mask of every rewritten call, and its score mod, without the names of tensors."""
        return [
            words(site.model_mask) + (f", {words(site.score_mod)}" if site.score_mod else "") for site in self.report.rewritten
        ]

    @property
    def reasons(self) -> list[str]:
        """The reasons why calls were left as they are."""
        return [site.reason for site in self.report.left]


def compare(
    model: Callable[..., Any],
    *args: Any,
    policy: sc.Policy | Mask | None = None,
    inner: str = "eager",
    dynamic: bool | None = None,
    output: Callable[[Any], Tensor] | None = None,
    **kwargs: Any,
) -> Comparison:
    """Call ``model`` twice with copies of the same inputs, the second time compiled. ``output`` picks the tensor to compare."""
    torch._dynamo.reset()
    pick = output or (lambda result: result)
    backend = sc.Backend(policy, inner=inner)
    with torch.no_grad():
        wanted = pick(model(*copied(args), **copied(kwargs)))
        got = pick(torch.compile(model, backend=backend, dynamic=dynamic)(*copied(args), **copied(kwargs)))
    return Comparison(wanted, got, backend.report)


def assert_read(result: Comparison, mask: str, calls: int = 1) -> None:
    """Assert that ``calls`` calls were rewritten with this mask, that none was left, and that the output is exact."""
    assert result.reasons == []
    assert result.masks == [mask] * calls
    assert result.error < 1e-5


def assert_left(result: Comparison, reason: str) -> None:
    """Assert that the output is exact, and that the report has one call, left for this reason."""
    assert result.masks == []
    assert len(result.reasons) == 1
    assert reason in result.reasons[0]
    assert result.error < 1e-5


def copied(inputs: Any) -> Any:
    """The inputs with every tensor cloned, so that a model may write to them."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, inputs)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The largest difference relative to the largest value. It is infinite if only one side is NaN somewhere."""
    if not torch.equal(got.isnan(), wanted.isnan()):
        return float("inf")
    return float((got - wanted).nan_to_num().abs().max() / wanted.nan_to_num().abs().max())


def words(text: str) -> str:
    """A mask or score mod as text without the names of tensors: ``padding`` for ``padding(l_valid_)``."""
    return re.sub(r"(explicit|padding|documents?|prefix|bias|scaled|sink_logits)\([A-Za-z_][^()]*\)", r"\1", text)


def qkv(
    q_len: int = 12, kv_len: int | None = None, *, heads: int = 4, kv_heads: int | None = None, batch: int = 2, dim: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Random queries, keys and values ``[batch, heads, length, dim]`` with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, q_len, dim, generator=generator)
    shape = (batch, kv_heads or heads, kv_len or q_len, dim)
    return q, torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
