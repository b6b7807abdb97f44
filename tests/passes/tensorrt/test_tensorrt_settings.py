"""The settings that torch-tensorrt gets, what is refused, and what the report says, without torch-tensorrt."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed as Failed
from torch.nn import functional as F

import sparse_compile as sc
from sparse_compile.dynamo import Hooks
from sparse_compile.masks import causal, sink, sliding_window
from sparse_compile.passes.tensorrt import prepare_inputs
from support.attention import Attention
from support.tensorrt import DRY, stand_in

STREAMING = causal & (sink(4) | sliding_window(20))

pytestmark = pytest.mark.usefixtures("fresh")


def run(model: Any, *args: Any, mode: str | None = None, options: dict[str, Any] | None = None, **settings: Any) -> Any:
    """Run a model under ``inner="tensorrt"``, and return the result and the report."""
    settings = {"policy": STREAMING, "inductor": {**DRY, **(options or {})}, **settings}
    backend = sc.Backend(inner="tensorrt", **settings)
    compiled: Any = torch.compile(model, backend=backend, mode=mode)
    with torch.no_grad():
        return compiled(*args), backend.report


# -- settings ---------------------------------------------------------------------------------------------------------


def test_it_gets_the_settings_with_which_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = stand_in(monkeypatch)
    run(Attention(), torch.randn(1, 40, 32))
    assert backend.options == {
        "attn_bias_is_causal": False,
        "dryrun": True,
        "pass_through_build_failures": True,
        "torch_executed_ops": {"torch.ops.aten.index_put.default"},
        "use_distributed_mode_trace": True,
        "use_fast_partitioner": False,
    }


def test_options_of_the_user_come_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = stand_in(monkeypatch)
    given = {"min_block_size": 1, "pass_through_build_failures": False, "torch_executed_ops": ["torch.ops.aten.mm.default"]}
    run(Attention(), torch.randn(1, 40, 32), options=given)
    assert backend.options is not None
    assert backend.options["min_block_size"] == 1
    assert backend.options["pass_through_build_failures"] is False
    assert backend.options["torch_executed_ops"] == {"torch.ops.aten.mm.default", "torch.ops.aten.index_put.default"}


def test_options_of_inductor_do_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = stand_in(monkeypatch)
    run(Attention(), torch.randn(1, 40, 32), kernel="autotune")
    assert backend.options is not None
    assert "max_autotune" not in backend.options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_autotune": True},
            r"needs options of torch-tensorrt in inductor=, got 'max_autotune': leave it out, or choose from torch_tensorrt\.",
        ),
        (
            {"use_distributed_mode_trace": False},
            r"needs use_distributed_mode_trace=True, got False: leave it out, because without it, .* the tokens of a cache",
        ),
        (
            {"attn_bias_is_causal": True},
            r"needs attn_bias_is_causal=False, got True: leave it out, because with it, .* without the policy",
        ),
    ],
)
def test_options_that_are_unknown_or_wrong_are_refused(
    options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch)
    with pytest.raises(Failed, match=f"inner='tensorrt' {message}"):
        run(Attention(), torch.randn(1, 40, 32), options=options)


def test_a_version_without_a_setting_that_makes_it_right_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    monkeypatch.setattr("sparse_compile.passes.tensorrt._known_settings", lambda: frozenset({"dryrun", "attn_bias_is_causal"}))
    wanted = (
        "needs a torch-tensorrt with the setting use_distributed_mode_trace, got one without it: install a version from 2.11"
    )
    with pytest.raises(Failed, match=wanted):
        run(Attention(), torch.randn(1, 40, 32))


def test_options_without_effect_on_the_partition_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = stand_in(monkeypatch)
    run(Attention(), torch.randn(1, 40, 32), options={"debug": False, "engine_cache_dir": "/tmp/engines"})
    assert backend.options is not None
    assert backend.options["engine_cache_dir"] == "/tmp/engines"


# -- what is refused --------------------------------------------------------------------------------------------------


def test_a_mode_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    with pytest.raises(
        Failed, match=r"mode needs to be None with inner='tensorrt', .* got 'reduce-overhead': leave it out, and"
    ):
        run(Attention(), torch.randn(1, 40, 32), mode="reduce-overhead")
    run(Attention(), torch.randn(1, 40, 32), mode="default")


def test_gradients_are_refused_and_no_grad_is_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    backend, x = stand_in(monkeypatch), torch.randn(1, 40, 32)
    fast: Any = torch.compile(Attention(), backend=sc.Backend(STREAMING, inner="tensorrt", inductor=DRY))
    with pytest.raises(
        ValueError, match=r"inner='tensorrt' needs a graph without gradients, .* run the model under torch\.no_g"
    ):
        fast(x)
    assert backend.options is None, "the graph does not reach torch-tensorrt"
    with torch.no_grad():
        fast(x)
    assert backend.options is not None


def test_a_report_without_compiling_refuses_no_gradients() -> None:
    model, x = Attention(), torch.randn(1, 40, 32)
    backend = sc.Backend(STREAMING, inner="tensorrt", hooks=Hooks(dry=True))
    torch.compile(model, backend=backend)(x)
    assert len(backend.report.rewritten) == 1


def test_a_model_on_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    with pytest.raises(
        Failed, match=r"inner='tensorrt' needs a model on CUDA, got a graph without CUDA tensors: use inner='ind"
    ):
        run(Attention(), torch.randn(1, 40, 32), options={"dryrun": False})


@pytest.mark.parametrize("error", [AssertionError("no layer"), RuntimeError("no layer"), TypeError("no layer")], ids=repr)
def test_an_engine_that_cannot_be_built_says_what_to_do(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, fails=error)
    wanted = rf"inner='tensorrt' needs engines that can be built, got {type(error).__name__}: no layer\. .*'torch_executed_ops'"
    with pytest.raises(Failed, match=wanted):
        run(Attention(), torch.randn(1, 40, 32))


def test_dynamo_may_trace_a_graph_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """AOTAutograd asks Dynamo for that by an error, when a Python float has to be a constant."""
    backend, model = stand_in(monkeypatch), Scaled()
    fast: Any = torch.compile(model, backend=sc.Backend(inner="tensorrt", inductor=DRY), dynamic=True)
    with torch.no_grad():
        for factor in (1.5, 2.5):
            model.factor = factor
            x = torch.randn(1, 40, 32)
            torch.testing.assert_close(fast(x), F.celu(x, factor))
    assert backend.options is not None


class Scaled(nn.Module):
    factor = 1.5

    def forward(self, x: Tensor) -> Tensor:
        return F.celu(x, self.factor)


def test_a_dynamic_size_may_grow_to_four_times_before_another_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine is built for a range of sizes, and without a bound torch-tensorrt takes millions of tokens."""
    stand_in(monkeypatch)
    model, backend = Attention(), sc.Backend(inner="tensorrt", inductor=DRY)
    fast: Any = torch.compile(model, backend=backend, dynamic=True)
    compiles = []
    with torch.no_grad():
        for length in (250, 1000, 1024, 1025):
            x = torch.randn(1, length, 32)
            torch.testing.assert_close(fast(x), model(x), atol=1e-5, rtol=1e-4)
            compiles.append(backend.report.compiles)
    assert compiles == [1, 1, 1, 2]


def test_a_range_of_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    model, backend = Attention(), sc.Backend(inner="tensorrt", inductor=DRY)
    fast: Any = torch.compile(model, backend=backend)
    with torch.no_grad():
        for length in (250, 2000):
            x = torch.randn(1, length, 32)
            torch._dynamo.mark_dynamic(x, 1, min=200, max=4000)
            fast(x)
    assert backend.report.compiles == 1


# -- engines ----------------------------------------------------------------------------------------------------------


def test_the_report_counts_engines_and_says_what_stays_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    model, x = Attention(), torch.randn(1, 150, 32)
    got, report = run(model, x)
    with torch.no_grad():
        wanted: Any = torch.compile(model, backend=sc.Backend(STREAMING, inner="eager"))(x)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    ops = "2 sparse_compile.materialize.default, 1 sparse_compile.attention.default"
    assert f"  graph 1: 2 TensorRT engines; in torch: {ops}" in str(report)
    (row,) = json.loads(report.to_json())["engines"]
    assert row == {
        "graph": 1,
        "count": 2,
        "in_torch": {"sparse_compile.materialize.default": 2, "sparse_compile.attention.default": 1},
    }


def test_the_report_says_which_graph_has_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, in_torch=("",))
    _, report = run(Attention(), torch.randn(1, 40, 32))
    assert "  graph 1: no TensorRT engine, so the whole graph runs in torch" in str(report)


def test_a_graph_that_is_one_engine_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, in_torch=())
    _, report = run(Attention(), torch.randn(1, 40, 32))
    assert "  graph 1: 1 TensorRT engine; in torch: nothing" in str(report)


def test_an_op_that_writes_in_place_goes_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    @torch.library.custom_op("tensorrt_test::bump", mutates_args={"x"})
    def bump(x: Tensor, y: Tensor) -> None:
        x += y

    stand_in(monkeypatch, in_torch=("auto_functionalized",))

    def step(x: Tensor, y: Tensor) -> Tensor:
        bump(x, y + 1)
        return x * 2

    x = torch.zeros(3)
    got, report = run(step, x, torch.ones(3))
    assert "in torch: 1 tensorrt_test.bump.default" in str(report)
    assert x.tolist() == [2, 2, 2], "the input itself is written"
    assert got.tolist() == [4, 4, 4]


def test_engines_get_contiguous_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in engine loses other inputs, as those of torch-tensorrt 2.11 do."""
    stand_in(monkeypatch, in_torch=("aten.t.",))
    x = torch.randn(3, 5)
    got, report = run(lambda x: (x + 1).t() * 2, x, policy=None)
    torch.testing.assert_close(got, (x + 1).t() * 2)
    assert report.engines[0].in_torch == (("aten.t.default", 1),)


def test_engines_would_lose_inputs_without_that(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, in_torch=("aten.t.",))
    monkeypatch.setattr("sparse_compile.passes.tensorrt.prepare_inputs", lambda engine, inputs: None)
    got, _ = run(lambda x: (x + 1).t() * 2, torch.randn(3, 5), policy=None)
    assert got.isnan().all()


def test_inputs_of_engines_that_are_no_tensors_pass() -> None:
    x = torch.randn(2, 3)
    assert prepare_inputs(nn.Identity(), (x, 7)) == (x, 7)


def test_nothing_watches_modules_after_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(torch.nn.modules.module._global_module_registration_hooks)
    stand_in(monkeypatch, fails=RuntimeError("no layer"))
    with pytest.raises(Failed):
        run(Attention(), torch.randn(1, 40, 32))
    assert torch.nn.modules.module._global_module_registration_hooks == before
