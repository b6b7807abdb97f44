"""The kernel choice and the head groups of a call, and the reasons why a forced kernel cannot run it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed as Failed
from torch.fx import Graph, GraphModule
from torch.nn import functional as F
from transformers import StaticCache

import sparse_compile as sc
from sparse_compile.dynamo import Hooks
from sparse_compile.masks import Mask, causal, chunked, document, full, per_head, prefix, sink, sliding_window
from sparse_compile.passes import inner_compiler
from sparse_compile.passes.choose import block_layout, head_groups, kernel_choice, tuning
from sparse_compile.passes.choose.tuning import Tiles
from sparse_compile.passes.graph_options import options_for
from sparse_compile.passes.ir.rewrite import Rewrite
from sparse_compile.passes.lower.nodes import tables
from sparse_compile.passes.ops import block_tables
from support.models import DECODERS, tokens

STREAMING = causal & (sink(4) | sliding_window(64))

pytestmark = pytest.mark.usefixtures("fresh")


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def operands(heads: int = 8, kv_heads: int = 4, length: int = 40, dim: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    k, v = torch.randn(2, 2, kv_heads, length, dim).unbind()
    return torch.randn(2, heads, length, dim), k, v


def graph_of(
    monkeypatch: pytest.MonkeyPatch, model: Any, *args: Any, backend: sc.Backend, run: bool = True, **kwargs: Any
) -> GraphModule:
    """Return the graph that reaches the inner compiler."""
    seen: list[GraphModule] = []

    def keep(gm: GraphModule, *_: Any) -> Any:
        seen.append(gm)
        return gm.forward if run else lambda *_: (args[0],)

    monkeypatch.setattr(inner_compiler, "_compile", keep)
    with torch.no_grad():
        compiled: Any = torch.compile(model, backend=backend)
        compiled(*args, **kwargs)
    (graph,) = seen
    return graph


def explained(policy: Mask | None, *args: Tensor, device: str | None = None, model: Any = None) -> str:
    class Wrapped(torch.nn.Module):
        def forward(self, *args: Tensor) -> Any:
            return attend(*args)

    (site,) = sc.explain(model or Wrapped(), *args, policy=policy, device=device).sites
    return site.kernel


# -- choice -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "device", "dtype", "capability", "flash", "expected"),
    [
        (None, "cpu", torch.float32, None, False, "SDPA"),
        (STREAMING, "cpu", torch.float32, None, False, "FlexAttention"),
        (None, "cuda", torch.float32, (9, 0), True, "FlexAttention"),  # SDPA has no fused grouped kernel for fp32
        (None, "cuda", torch.bfloat16, (9, 0), False, "SDPA"),
        (None, "cuda", torch.bfloat16, (7, 5), False, "FlexAttention"),
        (STREAMING, "cuda", torch.bfloat16, (9, 0), False, "FlexAttention"),
        (STREAMING, "cuda", torch.bfloat16, (9, 0), True, "FlexAttention FLASH"),
        (STREAMING, "cuda", torch.bfloat16, (8, 0), True, "FlexAttention"),
        (per_head([causal, STREAMING] * 2), "cuda", torch.bfloat16, (9, 0), False, "SDPA + FlexAttention"),
        (per_head([causal, STREAMING] * 2), "cuda", torch.bfloat16, (9, 0), True, "SDPA + FlexAttention FLASH"),
        (per_head([causal, STREAMING] * 2), "cpu", torch.float32, None, False, "SDPA + FlexAttention"),
    ],
)
def test_the_choice_by_device_dtype_and_mask(
    monkeypatch: pytest.MonkeyPatch,
    policy: Mask | None,
    device: str,
    dtype: torch.dtype,
    capability: tuple[int, int] | None,
    flash: bool,
    expected: str,
) -> None:
    monkeypatch.setattr(kernel_choice, "capability", lambda: capability)
    monkeypatch.setattr(kernel_choice, "flash_installed", lambda: flash)
    q, k, v = (x.to(dtype) for x in operands(dim=64))
    assert explained(policy, q, k, v, device=device) == expected


def test_long_dense_prompts_go_to_flash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "capability", lambda: (9, 0))
    monkeypatch.setattr(kernel_choice, "flash_installed", lambda: True)
    monkeypatch.setattr(tuning, "FLASH_FROM", 32)
    q, k, v = (x.bfloat16() for x in operands(dim=64))
    assert explained(None, q, k, v, device="cuda") == "FlexAttention FLASH"


class Encoder(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("policy", [full, None], ids=str)
def test_attention_without_a_mask_is_sdpa(policy: Mask | None) -> None:
    q, k, v = operands(4, 4)
    assert explained(policy, q, k, v, model=Encoder()) == "SDPA"


@pytest.mark.parametrize(
    ("kernel", "options", "reason"),
    [
        ("flash", {}, "flash needs CUDA, but the call runs on cpu"),
        ("triton", {}, "triton needs CUDA, but the call runs on cpu"),
        ("sdpa", {"policy": STREAMING}, r"SDPA needs a dense mask for causal & \(sink\(4\) \| sliding_window\(64\)\)"),
        ("flex", {"inner": "eager"}, "inner='eager' has no FlexAttention kernels"),
    ],
)
def test_a_kernel_that_cannot_be_had_is_an_error_with_the_reason(kernel: str, options: dict[str, Any], reason: str) -> None:
    with torch.no_grad(), pytest.raises(Failed, match=rf"kernel='{kernel}' cannot run .*{reason}; use kernel='auto'"):
        torch.compile(attend, backend=sc.Backend(kernel=kernel, **options))(*operands())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"flash": False}, "flash-attn-4 is not installed: pip install --pre flash-attn-4"),
        ({"capability": (8, 0)}, r"FLASH needs a Hopper or Blackwell GPU, not compute capability \(8, 0\)"),
        ({"dtype": torch.float32}, "FLASH needs bfloat16 or float16, not torch.float32"),
        ({"dim": 80}, r"FLASH needs one head_dim of 64, 96, 128, 256, not \[80\]"),
        ({"policy": per_head([prefix(torch.tensor([3, 4]))] * 4)}, "FLASH needs a mask that reads no tensor"),
        ({"inner": "aot_eager"}, "FLASH needs inner='inductor', not inner='aot_eager'"),
    ],
)
def test_flash_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], reason: str) -> None:
    case: dict[str, Any] = {
        "flash": True,
        "capability": (9, 0),
        "dtype": torch.bfloat16,
        "dim": 64,
        "policy": STREAMING,
        "inner": "inductor",
    }
    case.update(change)
    monkeypatch.setattr(kernel_choice, "capability", lambda: case["capability"])
    monkeypatch.setattr(kernel_choice, "flash_installed", lambda: case["flash"])
    q, k, v = (x.to(case["dtype"]) for x in operands(dim=case["dim"]))
    backend = sc.Backend(case["policy"], kernel="flash", inner=case["inner"], hooks=Hooks(device="cuda"))
    with torch.no_grad(), pytest.raises(Failed, match=reason):
        torch.compile(attend, backend=backend)(q, k, v)


def test_tensorrt_names_the_package_and_the_extra() -> None:
    with (
        torch.no_grad(),
        pytest.raises(Failed, match=r"inner='tensorrt' needs torch-tensorrt.*pip install 'sparse-compile\[ten"),
    ):
        torch.compile(attend, backend=sc.Backend(inner="tensorrt"))(*operands())


# -- groups of heads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        [full, causal],
        [causal, full, full, causal],
        [full, causal, causal, causal],
        [causal] * 8,
        [full, full, causal, causal] * 2,
    ],
    ids=str,
)
def test_groups_of_heads_come_back_in_order(pattern: list[Mask]) -> None:
    """SDPA runs every group here without a mask, so nothing is compiled. The oracle uses a dense mask."""
    q, k, v = operands()
    policy = per_head(pattern).for_heads(8)
    backend = sc.Backend(policy, inner="aot_eager")
    with torch.no_grad():
        got = torch.compile(Encoder(), backend=backend)(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
        seen = policy.dense(40, 40, heads=8)
        wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
    torch.testing.assert_close(got, wanted)
    assert [site.kernel for site in backend.report.sites] == ["SDPA"]


def test_the_output_of_groups_lies_in_memory_as_that_of_one_kernel() -> None:
    def viewed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).view(2, 40, -1)  # raises unless all heads of a position lie together in memory

    q, k, v = torch.randn(3, 2, 40, 8, 16).transpose(2, 3).unbind()
    with torch.no_grad():
        wanted = viewed(q, k, v)
        got = torch.compile(viewed, backend=sc.Backend(per_head([full, full & full] * 4), inner="aot_eager"))(q, k, v)
        torch.testing.assert_close(got, wanted)
        run: Any = torch.compile(viewed, backend=sc.Backend(per_head([full, causal] * 4), inner="aot_eager"))
        assert run(q, k, v).shape == wanted.shape


@pytest.mark.parametrize(
    ("pattern", "groups"),
    [
        ([causal, STREAMING, STREAMING, causal], 2),
        ([causal, causal, causal, causal], 1),
        ([causal & sliding_window(n) for n in (1, 2, 3, 4)], 4),
        ([causal if n % 3 == 0 else causal & sliding_window(n) for n in range(8)], 1),  # groups within a KV head: one group
    ],
)
def test_equal_masks_are_one_group(monkeypatch: pytest.MonkeyPatch, pattern: list[Mask], groups: int) -> None:
    gm = graph_of(monkeypatch, attend, *operands(), backend=sc.Backend(per_head(pattern)))
    calls = [n for n in gm.graph.nodes if "sparse_attention" in str(n.target) or "scaled_dot_product" in str(n.target)]
    assert len(calls) == groups


def test_many_sparse_groups_share_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern: list[Mask] = [causal, *(causal & sliding_window(n) for n in range(1, head_groups.MOST_HEAD_GROUPS + 3))]
    q, k, v = operands(len(pattern), len(pattern))
    gm = graph_of(monkeypatch, attend, q, k, v, backend=sc.Backend(per_head(pattern)))
    names = [str(n.target) for n in gm.graph.nodes]
    assert sum("sparse_attention" in name for name in names) == 1
    assert sum("scaled_dot_product" in name for name in names) == 1


# -- tables -----------------------------------------------------------------------------------------------------------


def test_layers_share_their_tables_although_each_writes_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = DECODERS[0].build()
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(tokens(1, 19), past_key_values=cache)
    backend = sc.Backend(causal & sliding_window(8))
    gm = graph_of(monkeypatch, model, tokens(1, 1), backend=backend, past_key_values=cache)
    assert len(backend.report.sites) > 1
    assert sum("block_tables" in str(node.target) for node in gm.graph.nodes) == 1


def test_tables_of_a_static_prompt_are_kept_with_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_choice, "capability", lambda: (9, 0))
    calls: list[Any] = []

    def build(*args: Any) -> list[Tensor]:
        calls.append(args)
        return [torch.zeros(1, dtype=torch.int32)] * 6

    monkeypatch.setattr(tables, "block_tables_op", build)
    backend = sc.Backend(STREAMING, kernel="triton", hooks=Hooks(device="cuda"))
    monkeypatch.setattr(inner_compiler, "_compile", lambda gm, *_: lambda *args: (args[0],))
    with torch.no_grad():
        torch.compile(attend, backend=backend, dynamic=False)(*operands())
    assert len(calls) == 1  # at compile time, when every size is a number


def test_a_folded_step_gives_its_tables_the_tensors_they_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The union over the query heads of a KV head may name its tensors in another order than the mask itself."""
    documents = [document(torch.arange(40).div(n, rounding_mode="floor")[None]) for n in (3, 5, 7, 11)]
    policy = per_head([documents[0], documents[1] & documents[2], documents[3], causal] * 2)
    q, k, v = operands()
    backend = sc.Backend(causal & policy, kernel="triton", hooks=Hooks(device="cuda"))

    def step(q: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:
        seen = torch.arange(40)[None] <= (at + torch.arange(1))[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[None, None], enable_gqa=True)

    gm = graph_of(monkeypatch, step, q[:, :, :1], k, v, torch.tensor(9), backend=backend, run=False)
    (node,) = (n for n in gm.graph.nodes if "block_tables" in str(n.target))
    mask, cut, _, captures, _ = block_tables.block_tables_op.build(node.args)
    assert cut.heads == 4  # one list for each KV head
    assert [n.args[0].target if n.op != "get_attr" else n.target for n in captures] == [
        c.name for c in block_tables.tensor_names(mask)
    ]


masks_of_one_head = st.sampled_from(
    [causal, full, STREAMING, causal & sliding_window(5), chunked(7), causal & chunked(16), ~sliding_window(9), sink(3)]
)


@given(masks_of_one_head, st.integers(1, 90), st.integers(1, 90), st.integers(0, 40), st.sampled_from([8, 16]))
def test_narrow_tables_hold_every_visited_block(mask: Mask, q_len: int, kv_len: int, start: int, block: int) -> None:
    width = block_layout.table_width(mask, q_len, kv_len, start, (block, block))
    dense = mask.dense(q_len, kv_len, q_offset=start)[0, 0]
    padded = F.pad(dense, (0, -kv_len % block, 0, -q_len % block))
    blocks = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block)).any(3).any(1)
    assert width >= int(blocks.sum(1).max())


@given(masks_of_one_head, st.integers(1, 90), st.sampled_from([8, 16]))
def test_the_width_of_a_step_serves_every_position(mask: Mask, kv_len: int, block: int) -> None:
    dense = mask.dense(kv_len, kv_len)[0, 0]
    blocks = F.pad(dense, (0, -kv_len % block)).unflatten(1, (-1, block)).any(2)
    assert block_layout.step_width(mask, kv_len, block) >= int(blocks.sum(1).max())


@pytest.mark.parametrize("heads", [4, 8])
def test_a_kv_head_lists_what_any_of_its_query_heads_sees(heads: int) -> None:
    pattern = [causal & sliding_window(n + 1) for n in range(heads)]
    listed = block_layout.per_kv_head(per_head(pattern), heads, 4).for_heads(4).dense(9, 9, heads=4)
    seen = per_head(pattern).dense(9, 9, heads=heads).unflatten(1, (4, -1)).any(2)
    assert (listed >= seen).all()
    assert block_layout.per_kv_head(causal, heads, 4) == causal


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [None, (8, 0), (9, 0), (12, 0)])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_half_precision_tiles_are_always_pinned(capability: Any, head_dim: int, phase: Any) -> None:
    tiles = tuning.tiles_for(capability, phase, head_dim, torch.bfloat16)
    assert isinstance(tiles, Tiles)
    assert block_tables.BLOCK % tiles.block_n == 0
    assert block_tables.BLOCK % tiles.block_m == 0


@pytest.mark.parametrize(
    ("sequences", "blocks", "expected"), [(8, 2048, 33), (8, 5, 5), (64, 2048, 4), (1, 1, 1), (4096, 9, 1)]
)
def test_splits_follow_the_gpu_and_the_live_blocks(
    monkeypatch: pytest.MonkeyPatch, sequences: int, blocks: int, expected: int
) -> None:
    monkeypatch.setattr(tuning, "multiprocessors", lambda: 132)
    assert tuning.splits_for(sequences, blocks) == expected


def test_autotune_leaves_the_tiles_to_inductor() -> None:
    graph = Rewrite(GraphModule({}, Graph()), lambda call, by_path: None)
    tune = {"max_autotune": True, "max_autotune_gemm_backends": "ATEN"}
    assert options_for(graph, "autotune", None) == tune
    assert options_for(graph, "auto", None) == {}
