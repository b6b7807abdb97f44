"""Check compiled models on CUDA: Triton kernels against the dense reference, gradients, and CUDA graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, StaticCache

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, document, per_head, sink, sliding_window
from sparse_compile.passes.choose import kernel_choice
from support.models import DECODERS, Decoder, left_padding, tokens
from support.on_gpu import ON_GPU

pytestmark = [
    *ON_GPU,
    pytest.mark.filterwarnings(r"ignore:\s*Online softmax is disabled"),  # from torch, in mixtures of experts
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),  # from autotuning
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning"),  # from packages that flash-attn-4 imports
]
STREAMING = causal & (sink(4) | sliding_window(64))
LENGTH = 300


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


def long(decoder: Decoder) -> Any:
    return Decoder(decoder.name, {**decoder.config, "max_position_embeddings": 512}, attention=decoder.attention).build().cuda()


@pytest.mark.parametrize("decoder", [d for d in DECODERS if d.name not in ("mpt", "opt")], ids=str)
@pytest.mark.parametrize("policy", [None, STREAMING], ids=["exact", "sparse"])
def test_kernels_equal_the_reference(decoder: Decoder, policy: Mask | None) -> None:
    """Nothing pads head dimensions below 16: the kernel accepts the model's own, or the call goes to the reference."""
    model = long(decoder)
    ids, padding = tokens(length=200).cuda(), left_padding(length=200, pad=37).cuda()
    backend = sc.Backend(policy)
    fast: Any = torch.compile(model, backend=backend)
    slow: Any = torch.compile(model, backend=sc.Backend(policy, inner="eager"))
    with torch.no_grad():
        for mask in (None, padding):
            got, wanted = (m(ids, attention_mask=mask, use_cache=False).logits for m in (fast, slow))
            rows = padding.bool() if mask is not None else torch.ones_like(padding).bool()
            assert relative_error(got[rows], wanted[rows]) < 1e-3  # Triton multiplies fp32 in tf32 by default
    assert {site.kernel for site in backend.report.sites} == {"FlexAttention"}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("policy", [None, STREAMING, per_head([causal, STREAMING])], ids=["exact", "sparse", "per head"])
def test_decoding_equals_a_whole_pass(kind: str, policy: Mask | None) -> None:
    model = long(DECODERS[0])
    ids = tokens(length=LENGTH).cuda()
    with torch.no_grad():
        slow: Any = torch.compile(model, backend=sc.Backend(policy, inner="eager"))
        wanted = slow(ids, use_cache=False).logits
        torch._dynamo.reset()
        fast: Any = torch.compile(model, backend=sc.Backend(policy))
        cache: Any = DynamicCache(config=model.config)
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=400)
        logits = [fast(ids[:, :296], past_key_values=cache).logits]
        logits += [fast(ids[:, k : k + 1], past_key_values=cache).logits for k in range(296, LENGTH)]
    assert relative_error(torch.cat(logits, dim=1), wanted) < 1e-3


def test_decoding_runs_under_cuda_graphs() -> None:
    model = long(DECODERS[0])
    ids = tokens(length=LENGTH).cuda()
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        cache = StaticCache(config=model.config, max_cache_len=400)
        backend = sc.Backend()
        fast: Any = torch.compile(model, backend=backend, mode="reduce-overhead")
        model(ids[:, :280], past_key_values=cache)
        logits = []
        for k in range(280, LENGTH):
            torch.compiler.cudagraph_mark_step_begin()
            logits.append(fast(ids[:, k : k + 1], past_key_values=cache).logits.clone())
    assert relative_error(torch.cat(logits, dim=1), wanted[:, 280:]) < 1e-3
    assert backend.report.compiles <= 2


class Attention(nn.Module):
    def __init__(self, heads: int = 4, kv_heads: int = 2, dim: int = 64) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.q = nn.Linear(128, heads * dim)
        self.kv = nn.Linear(128, 2 * kv_heads * dim)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, self.dim)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.kv_heads, self.dim)).permute(2, 0, 3, 1, 4)
        if bias is not None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("policy", [None, STREAMING, per_head([causal, STREAMING])], ids=["exact", "sparse", "per head"])
@pytest.mark.parametrize("length", [128, 300])
def test_gradients_equal_those_of_the_reference(policy: Mask | None, length: int) -> None:
    torch.manual_seed(0)
    model, x = Attention().cuda(), torch.randn(2, length, 128, device="cuda")
    other = copy.deepcopy(model)
    backend = sc.Backend(policy)
    torch.compile(model, backend=backend)(x).square().sum().backward()
    torch.compile(other, backend=sc.Backend(policy, inner="eager"))(x).square().sum().backward()
    for got, wanted in zip(model.parameters(), other.parameters(), strict=True):
        assert got.grad is not None
        assert wanted.grad is not None
        assert relative_error(got.grad, wanted.grad) < 5e-3
    assert {site.kernel for site in backend.report.sites} == {"FlexAttention"}


def test_gradients_reach_a_bias() -> None:
    torch.manual_seed(0)
    model, x = Attention().cuda(), torch.randn(2, 128, 128, device="cuda")
    biases = [torch.randn(1, 4, 128, 128, device="cuda").requires_grad_() for _ in range(1)]
    wanted_bias = biases[0].detach().clone().requires_grad_()
    torch.compile(model, backend=sc.Backend())(x, biases[0]).square().sum().backward()
    model(x, wanted_bias).square().sum().backward()
    assert biases[0].grad is not None
    assert wanted_bias.grad is not None
    assert relative_error(biases[0].grad, wanted_bias.grad) < 5e-3


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def decode_step(q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> Tensor:
    """Decode as transformers does over a static cache: the mask follows from a position that is a tensor."""
    seen = torch.arange(k.shape[2], device=k.device)[None] <= (position + torch.arange(1, device=k.device))[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[None, None], enable_gqa=True)


def bf16_errors(run: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *more: Tensor, start: int = 0) -> tuple[float, float]:
    """Return the errors of ``run`` and of SDPA under a dense mask, both in bf16, against float64."""
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    visible = mask.for_heads(heads).dense(q.shape[2], k.shape[2], q_offset=start, heads=heads, device="cuda")
    k_all, v_all = (x.repeat_interleave(group, 1) for x in (k, v))
    exact = F.scaled_dot_product_attention(q.double(), k_all.double(), v_all.double(), attn_mask=visible)
    stock = F.scaled_dot_product_attention(q, k_all, v_all, attn_mask=visible)
    return relative_error(run(q, k, v, *more), exact), relative_error(stock, exact)


@pytest.mark.parametrize("group", [1, 3, 4, 6, 7, 8])
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_bf16_is_as_close_to_fp32_as_stock(dim: int, group: int) -> None:
    """Run every head dimension and group size, at lengths off block boundaries. Triton runs what FLASH does not support."""
    torch.manual_seed(0)
    kv_heads, length = 2, 333
    duo = per_head([causal, STREAMING])
    with torch.no_grad():
        for policy in (None, STREAMING, duo):
            q = torch.randn(2, kv_heads * group, length, dim, device="cuda", dtype=torch.bfloat16)
            k, v = torch.randn(2, 2, kv_heads, length, dim, device="cuda", dtype=torch.bfloat16).unbind()
            mask = causal if policy is None else policy
            torch._dynamo.reset()
            run: Any = torch.compile(causal_attention, backend=sc.Backend(policy), dynamic=False)
            ours, stock = bf16_errors(run, q, k, v, mask)
            assert ours <= 1.5 * stock
            torch._dynamo.reset()
            step: Any = torch.compile(decode_step, backend=sc.Backend(policy), dynamic=False)
            position = torch.tensor(length - 40, device="cuda")
            ours, stock = bf16_errors(step, q[:, :, :1], k, v, mask, position, start=length - 40)
            assert ours <= 1.5 * stock


@pytest.mark.skipif(not kernel_choice.flash_installed(), reason="needs flash-attn-4")
@pytest.mark.parametrize(("dim", "group"), [(64, 1), (96, 3), (128, 4), (128, 8), (256, 2)])
def test_flash_is_as_close_to_fp32_as_stock(dim: int, group: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 2 * group, 1111, dim, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, 2, 1111, dim, device="cuda", dtype=torch.bfloat16).unbind()
    with torch.no_grad():
        for policy in (None, per_head([causal, STREAMING])):
            torch._dynamo.reset()
            run: Any = torch.compile(causal_attention, backend=sc.Backend(policy, kernel="flash"), dynamic=False)
            ours, stock = bf16_errors(run, q, k, v, causal if policy is None else policy)
            assert ours <= 1.5 * stock


@pytest.mark.parametrize("inner", ["aot_eager", "cudagraphs"])
def test_the_opaque_op_under_other_compilers(inner: str) -> None:
    torch.manual_seed(0)
    model, x = Attention().cuda().bfloat16(), torch.randn(2, 300, 128, device="cuda", dtype=torch.bfloat16)
    backend = sc.Backend(STREAMING, inner=inner)
    fast: Any = torch.compile(model, backend=backend)
    slow: Any = torch.compile(copy.deepcopy(model), backend=sc.Backend(STREAMING, inner="eager"))
    with torch.no_grad():
        for _ in range(3):  # warm up, record, replay
            x = torch.randn_like(x)
            assert relative_error(fast(x), slow(x)) < 2e-2
    assert {site.kernel for site in backend.report.sites} == {"FlexAttention"}


def test_a_decode_graph_is_replayed_without_recompiles_or_syncs() -> None:
    model = long(DECODERS[0]).bfloat16()
    cache = StaticCache(config=model.config, max_cache_len=400)
    backend = sc.Backend(STREAMING)
    fast: Any = torch.compile(model, backend=backend, mode="reduce-overhead", dynamic=False)
    ids = tokens(length=1).cuda()
    with torch.no_grad():
        model(tokens(length=200).cuda(), past_key_values=cache)
        for step in range(100):
            torch.compiler.cudagraph_mark_step_begin()
            torch.cuda.set_sync_debug_mode("error" if step > 4 else "default")
            try:
                fast(ids, past_key_values=cache)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert backend.report.compiles == 1
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


def test_max_autotune_and_autotuned_kernels_run() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 4, 300, 64, device="cuda", dtype=torch.bfloat16).unbind()
    with torch.no_grad():
        for backend, mode in ((sc.Backend(STREAMING), "max-autotune"), (sc.Backend(STREAMING, kernel="autotune"), None)):
            torch._dynamo.reset()
            run: Any = torch.compile(causal_attention, backend=backend, mode=mode, dynamic=False)
            for _ in range(3):
                ours, stock = bf16_errors(run, q, k, v, STREAMING)
                assert ours <= 1.5 * stock


@pytest.mark.parametrize("policy", [None, STREAMING, per_head([causal, STREAMING])], ids=["exact", "sparse", "per head"])
def test_no_dense_mask_and_no_repeated_heads_at_64k(policy: Mask | None) -> None:
    """Mask as transformers does. A bool mask ``[1, 1, 64K, 64K]`` would take 4 GiB, and repeated keys and values 256 MiB."""
    length, heads, kv_heads, dim = 1 << 16, 8, 2, 128

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        at = torch.arange(length, device=q.device)
        seen = (at[None] <= at[:, None])[None, None]
        k, v = (x[:, :, None].expand(-1, -1, heads // kv_heads, -1, -1).reshape(q.shape) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    q = torch.randn(1, heads, length, dim, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, kv_heads, length, dim, device="cuda", dtype=torch.bfloat16).unbind()
    run: Any = torch.compile(attend, backend=sc.Backend(policy), dynamic=False)
    with torch.no_grad():
        run(q, k, v)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(q, k, v)
    own = q.nbytes * (
        1 if policy is None or policy == STREAMING else 3
    )  # the output; head groups also need their own queries and outputs
    assert torch.cuda.max_memory_allocated() - before < own + (24 << 20)

    step: Any = torch.compile(decode_step, backend=sc.Backend(policy), dynamic=False)
    position = torch.tensor(length - 1, device="cuda")
    with torch.no_grad():
        step(q[:, :, :1], k, v, position)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(q[:, :, :1], k, v, position)
    assert torch.cuda.max_memory_allocated() - before < 8 << 20


def test_documents_of_a_policy_reach_the_kernel() -> None:
    torch.manual_seed(0)
    model, x = Attention().cuda(), torch.randn(2, 300, 128, device="cuda")
    policy = document(torch.arange(300).div(70, rounding_mode="floor").expand(2, -1))
    with torch.no_grad():
        got = torch.compile(model, backend=sc.Backend(policy))(x)
        wanted = torch.compile(model, backend=sc.Backend(policy, inner="eager"))(x)
    assert relative_error(got, wanted) < 2e-3


def test_tables_never_wait_for_the_device() -> None:
    mask = causal & (sink(64) | sliding_window(1024))
    from sparse_compile.passes.ops.block_tables import BlockTables, Cut, block_tables_op

    start = torch.tensor(5, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        cut = Cut(1, 4096, 8192, 0, 0, 128, 128, 64, split=True)
        block_tables_op(BlockTables(mask, cut, start, [], torch.device("cuda")))
    finally:
        torch.cuda.set_sync_debug_mode("default")
