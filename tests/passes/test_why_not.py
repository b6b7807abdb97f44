"""Every kernel says why it does not run a call, and the report keeps every refusal of a faster kernel."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sparse_compile as sc
from sparse_compile.dynamo import Hooks
from sparse_compile.masks import Mask, causal, page_topk, per_head, sink, sliding_window
from sparse_compile.passes.choose import kernel_choice
from sparse_compile.passes.lower.kernels import KERNELS
from support.models import DECODERS, tokens

STREAMING = causal & (sink(4) | sliding_window(12))
PAGES = causal & page_topk(32, page=4)

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan as on a Hopper GPU without flash-attn-4."""
    monkeypatch.setattr(kernel_choice, "capability", lambda: (9, 0))
    monkeypatch.setattr(kernel_choice, "flash_installed", lambda: False)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def report_of(
    policy: Mask | None, *, device: str | None = "cuda", dtype: torch.dtype = torch.bfloat16, dim: int = 64
) -> sc.Report:
    q, k, v = torch.randn(3, 1, 4, 40, dim, dtype=dtype).unbind()
    backend = sc.Backend(policy, hooks=Hooks(dry=True, device=device))
    with torch.no_grad():
        torch.compile(attend, backend=backend)(q, k, v)
    return backend.report


def step_over_cache(policy: Mask, device: str | None, dtype: torch.dtype, **cache_options: Any) -> sc.Site:
    """The row of the first layer's decode step over a ``SparseCache``."""
    model = next(decoder for decoder in DECODERS if decoder.name == "llama").build().to(dtype)
    cache = sc.SparseCache(model.config, policy, max_length=128, page_size=16, dtype=dtype, **cache_options)
    backend = sc.Backend(policy, hooks=Hooks(dry=True, device=device))
    compiled: Any = torch.compile(model, backend=backend)
    with torch.no_grad():
        for length in (20, 1):
            compiled(tokens(1, length), past_key_values=cache)
    return next(site for site in backend.report.sites if site.phase == "decode")


def test_names_are_unique_and_the_last_kernel_refuses_nothing() -> None:
    names = [kernel.name for kernel in KERNELS]
    assert len(set(names)) == len(names)
    assert KERNELS[-1].name == "reference"


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("policy", "options", "kernel", "refused"),
    [
        (None, {}, "SDPA", []),
        (
            STREAMING,
            {},
            "FlexAttention",
            [("FlexAttention FLASH", "flash-attn-4 is not installed"), ("SDPA", "SDPA needs a dense mask for causal & ")],
        ),
        (
            None,
            {"dtype": torch.float32},
            "FlexAttention",
            [("SDPA", "fused kernels"), ("FlexAttention FLASH", "not installed")],
        ),
        (
            STREAMING,
            {"dim": 8},
            "dense reference",
            [("FlexAttention FLASH", "not installed"), ("SDPA", "dense mask"), ("FlexAttention", "head_dim of at least 16")],
        ),
        (STREAMING, {"device": None, "dtype": torch.float32}, "FlexAttention", []),
        (None, {"device": None, "dtype": torch.float32}, "SDPA", []),
    ],
)
def test_every_refusal_of_a_faster_kernel_is_in_the_report(
    policy: Mask | None, options: dict[str, Any], kernel: str, refused: list[tuple[str, str]]
) -> None:
    report = report_of(policy, **options)
    (site,) = report.sites
    assert site.kernel == kernel
    assert [name for name, _ in site.refused] == [name for name, _ in refused]
    assert all(part in reason for (_, reason), (_, part) in zip(site.refused, refused, strict=True))
    said = report.why(site).splitlines()
    assert said[0].startswith(f"(top), prefill: {kernel}")
    assert said[1:] == [f"  not {name}: {reason}" for name, reason in site.refused]
    (row,) = json.loads(report.to_json())["sites"]
    assert row["refused"] == [{"kernel": name, "reason": reason} for name, reason in site.refused]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("policy", [STREAMING, PAGES, causal], ids=str)
def test_a_step_over_a_cache_asks_page_attention_first(policy: Mask) -> None:
    site = step_over_cache(policy, "cuda", torch.bfloat16)
    if policy == causal:
        assert site.kernel == "FlexAttention"
        assert site.refused[0][0] == "page attention"
    else:
        assert (site.kernel, site.refused) == ("page attention", ())


def test_a_call_that_is_left_says_so() -> None:
    def dropped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.5)

    q, k, v = torch.randn(3, 1, 4, 40, 16).unbind()
    backend = sc.Backend(inner="eager")
    with torch.no_grad():
        torch.compile(dropped, backend=backend)(q, k, v)
    (site,) = backend.report.sites
    assert "left as it is, because" in backend.report.why(site)
    assert site.refused == ()


def test_heads_of_two_kernels_keep_the_refusals_of_both(hopper: None) -> None:
    (site,) = report_of(per_head([causal, causal, STREAMING, STREAMING])).sites
    assert site.kernel == "SDPA + FlexAttention"
    assert [name for name, _ in site.refused] == ["FlexAttention FLASH", "SDPA"]


def test_a_demanded_kernel_keeps_no_refusals() -> None:
    q, k, v = torch.randn(3, 1, 4, 40, 16).unbind()
    backend = sc.Backend(kernel="reference")
    with torch.no_grad():
        torch.compile(attend, backend=backend)(q, k, v)
    (site,) = backend.report.sites
    assert (site.kernel, site.refused) == ("dense reference", ())
