"""A list of masks is for the heads of a call: all its query heads or all its KV heads, and none that other devices hold."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

import sparse_compile as sc
from sparse_compile.masks import Mask, causal, per_head, sliding_window
from support.models import DECODERS, tokens

NEAR = causal & sliding_window(4)
ATTENTION = {"self_attn.q_proj": 0, "self_attn.k_proj": 0, "self_attn.v_proj": 0, "self_attn.o_proj": 1}
MLP = {"mlp.gate_proj": 0, "mlp.up_proj": 0, "mlp.down_proj": 1}  # 0: outputs are sharded, 1: inputs are sharded

pytestmark = pytest.mark.usefixtures("fresh")


def run(model: Any) -> Any:
    with torch.no_grad():
        return model(tokens(), use_cache=False).logits


@pytest.mark.parametrize("masks", [1, 3, 8])
def test_a_backend_refuses_a_list_for_other_heads(masks: int) -> None:
    """One mask divides the heads, but it is written for no model of theirs."""
    model = torch.compile(DECODERS[0].build(), backend=sc.Backend(causal & per_head([NEAR] * masks), inner="eager"))
    message = (
        f"per_head has {masks} masks, but the attention model.layers.0.self_attn has 4 query heads and 2 KV heads: give one"
    )
    with pytest.raises(ValueError, match=message):
        run(model)


@pytest.mark.parametrize("masks", [2, 4])
def test_a_backend_takes_one_mask_for_each_query_head_or_kv_head(masks: int) -> None:
    backend = sc.Backend(per_head([NEAR] * (masks - 1) + [causal]), inner="eager", strict=True)
    run(torch.compile(DECODERS[0].build(), backend=backend))
    assert [site.action for site in backend.report.sites] == ["sparse", "sparse"]


# -- tensor parallelism -----------------------------------------------------------------------------------------------


@pytest.fixture
def two_devices() -> Iterator[Any]:
    """A mesh of two devices, of which this process is the first; what it receives from the second is arbitrary."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


def sharded(mesh: Any, modules: dict[str, int]) -> Any:
    """A decoder of 4 query heads and 2 KV heads, with half of these modules on each device."""
    styles = (ColwiseParallel, RowwiseParallel)
    plan: Any = {f"model.layers.*.{name}": styles[style]() for name, style in modules.items()}
    return parallelize_module(DECODERS[0].build(), mesh, plan)


@pytest.mark.parametrize("policy", [per_head([NEAR, causal]), per_head([NEAR, NEAR, causal, causal])], ids=["kv", "query"])
@pytest.mark.parametrize("entry", ["compile", "backend"])
def test_a_list_is_refused_where_devices_share_the_heads(policy: Mask, entry: str, two_devices: Any) -> None:
    """Each device has 2 query heads and 1 KV head, so a list for two KV heads would be read as one for its query heads."""
    model = sharded(two_devices, ATTENTION)
    if entry == "compile":
        sc.compile(model, policy, inner="eager")
    else:
        model = torch.compile(model, backend=sc.Backend(policy, inner="eager"))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn is sharded over several devices.*use one mask for all heads"):
        run(model)


@pytest.mark.parametrize("policy", [None, NEAR], ids=["exact", "one mask"])
def test_one_mask_for_all_heads_reaches_the_heads_of_every_device(policy: Mask | None, two_devices: Any) -> None:
    model = sc.compile(sharded(two_devices, ATTENTION | MLP), policy, inner="eager", strict=True)
    run(model)
    assert [(site.heads, site.kv_heads) for site in model.sparse_compile_report.sites] == [(2, 1)] * 2


def test_a_list_reaches_attention_beside_sharded_modules(two_devices: Any) -> None:
    model = sc.compile(sharded(two_devices, MLP), per_head([NEAR, causal]), inner="eager", strict=True)
    run(model)
    assert [site.heads for site in model.sparse_compile_report.sites] == [4, 4]


class Gathered(nn.Module):
    """Attention whose weight is stored in two halves, and gathered where it is used, as data parallelism does."""

    def __init__(self, mesh: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(distribute_tensor(torch.randn(16, 16), mesh, [Shard(0)]))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.redistribute(placements=[Replicate()]).to_local()  # type: ignore[attr-defined]  # of DTensor
        q = F.linear(x, weight).unflatten(-1, (4, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, is_causal=True)


def test_a_list_reaches_attention_whose_weights_are_gathered(two_devices: Any) -> None:
    backend = sc.Backend(per_head([NEAR, NEAR, causal, causal]), inner="eager", strict=True)
    with torch.no_grad():
        torch.compile(Gathered(two_devices), backend=backend)(torch.randn(1, 8, 16))
    assert [site.heads for site in backend.report.sites] == [4]


def test_a_list_is_refused_where_a_call_has_fewer_heads_than_the_model() -> None:
    """Some ways to share heads leave no trace in a graph but their number."""
    model = DECODERS[0].build()
    model.config.num_attention_heads, model.config.num_key_value_heads = 8, 4  # as on the first of two devices
    sc.compile(model, per_head([NEAR] * 3 + [causal]), inner="eager")
    message = (
        "has 4 query heads and 2 KV heads where the model has 8 query heads and 4 KV heads, as under tensor parallelism: use"
    )
    with pytest.raises(ValueError, match=message):
        run(model)
