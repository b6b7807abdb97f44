"""The backend: its entry points and options, and its warnings when a model runs un-compiled."""

from __future__ import annotations

import inspect
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_compile as sc
from sparse_compile.masks import causal, document, sink, sliding_window
from sparse_compile.passes import inner_compiler as inner_compilers
from sparse_compile.passes import torch_private
from support.models import DECODERS, tokens

STREAMING = causal & (sink(2) | sliding_window(6))
Failed = torch._dynamo.exc.BackendCompilerFailed

pytestmark = pytest.mark.usefixtures("fresh")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def model_and_input() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Attention().eval(), torch.randn(1, 20, 16)


def under(policy: sc.masks.Mask, model: nn.Module, x: Tensor) -> Tensor:
    """The attention of ``model`` under a policy, computed with a dense mask."""
    qkv = model.get_submodule("qkv")(x).chunk(3, -1)
    q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in qkv)
    n = x.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal.dense(n, n) & policy.dense(n, n))


def test_the_function_takes_a_policy_by_options() -> None:
    model, x = model_and_input()
    with torch.no_grad():
        exact = torch.compile(model, backend=sc.backend, options={"inner": "eager"})(x)
        sparse = torch.compile(model, backend=sc.backend, options={"inner": "eager", "policy": STREAMING})(x)
        torch.testing.assert_close(exact, model(x))
        torch.testing.assert_close(sparse, under(STREAMING, model, x))


def test_options_of_torch_compile_override_those_of_the_object() -> None:
    model, x = model_and_input()
    backend = sc.Backend(inner="eager")
    with torch.no_grad():
        got = torch.compile(model, backend=backend, options={"policy": STREAMING})(x)
        torch.testing.assert_close(got, under(STREAMING, model, x))
    assert [site.action for site in backend.report.sites] == ["sparse"]


def test_eager_runs_the_dense_reference() -> None:
    model, x = model_and_input()
    backend = sc.Backend(STREAMING, inner="eager")
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), under(STREAMING, model, x))
    (site,) = backend.report.sites
    assert (site.kernel, site.reason) == ("dense reference", "inner='eager' has no FlexAttention kernels")


def test_two_models_with_two_policies_do_not_influence_each_other() -> None:
    (one, x), (other, _) = model_and_input(), model_and_input()
    narrow = causal & sliding_window(2)
    first, second = sc.Backend(STREAMING, inner="eager"), sc.Backend(narrow, inner="eager")
    fast_one, fast_other = torch.compile(one, backend=first), torch.compile(other, backend=second)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fast_one(x), under(STREAMING, one, x))
            torch.testing.assert_close(fast_other(x), under(narrow, other, x))
    assert len(first.report.sites) == len(second.report.sites) == 1


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_policy_may_hold_tensors(inner: str) -> None:
    model, x = model_and_input()
    policy = document(torch.arange(20).div(7, rounding_mode="floor")[None])
    with torch.no_grad():
        got = torch.compile(model, backend=sc.Backend(policy, inner=inner))(x)
        torch.testing.assert_close(got, under(policy, model, x))


def test_compile_works_in_place_and_generate_runs_compiled() -> None:
    eager, model = DECODERS[0].build(), DECODERS[0].build()
    assert sc.compile(model, inner="eager") is model
    wanted, got = (m.generate(tokens(1, 9), max_new_tokens=6, do_sample=False) for m in (eager, model))
    assert got.tolist() == wanted.tolist()
    report = model.sparse_compile_report
    assert {site.phase for site in report.sites} == {"prefill", "decode"}
    assert report.left == []
    assert report.compiles <= 3
    assert model.generation_config.disable_compile is None  # it would be written to the files of the model
    assert model.get_compiled_call(None) == model.__call__


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters, reason="models share a limit before torch 2.13"
)
def test_many_compiled_models_of_one_class_do_not_use_up_each_others_compiles() -> None:
    for size in range(1, torch._dynamo.config.recompile_limit + 3):
        model, x = model_and_input()
        policy = causal & sliding_window(size)
        with torch.no_grad():
            torch.testing.assert_close(sc.compile(model, policy, inner="eager")(x), under(policy, model, x))


def test_explain_reports_the_kernels_without_compiling_any() -> None:
    model = DECODERS[0].build()
    report = sc.explain(model, tokens(), policy=STREAMING)
    assert {(site.action, site.kernel) for site in report.sites} == {("sparse", "FlexAttention")}
    assert report.compiles == 1


def test_explaining_many_times_uses_up_no_recompiles() -> None:
    model = DECODERS[0].build()
    for size in range(1, torch._dynamo.config.recompile_limit + 3):
        report = sc.explain(model, tokens(1, 8), policy=causal & sliding_window(size))
        assert (len(report.sites), report.compiles, report.recompiles, report.notes) == (2, 1, 0, [])


class Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_explaining_what_does_not_compile_says_so() -> None:
    with pytest.warns(sc.SparseCompileWarning, match="the model ran un-compiled"):
        assert sc.explain(Nothing(), torch.ones(2)).compiles == 0


def test_strict_forbids_to_run_uncompiled() -> None:
    model = sc.compile(Nothing(), inner="eager", strict=True)
    with pytest.raises(sc.SparseCompileError, match="the model ran un-compiled"):
        model(torch.ones(2))


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_generate_gives_the_tokens_of_the_eager_model_with_every_cache(cache: str) -> None:
    eager, model = DECODERS[0].build(), sc.compile(DECODERS[0].build(), inner="eager")
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache}
    wanted, got = (m.generate(tokens(2, 9), **options) for m in (eager, model))
    assert got.tolist() == wanted.tolist()
    assert model.sparse_compile_report.left == []


def test_a_policy_changes_what_is_generated() -> None:
    eager = DECODERS[0].build()
    model = sc.compile(DECODERS[0].build(), causal & sliding_window(1), inner="eager")
    wanted, got = (m.generate(tokens(2, 9), max_new_tokens=8, do_sample=False) for m in (eager, model))
    assert got.tolist() != wanted.tolist()


@pytest.mark.skipif(not list(metadata.distributions(name="sparse_compile")), reason="the package is only on the path")
def test_the_name_works_where_the_package_is_installed() -> None:
    """The entry point works. tests/wheel/check_wheel.py tests the same for the wheel."""
    model, x = model_and_input()
    with torch.no_grad():
        got = torch.compile(model, backend="sparse_compile", options={"inner": "eager", "policy": STREAMING})(x)
        torch.testing.assert_close(got, under(STREAMING, model, x))


def test_strict_turns_a_call_that_is_left_into_an_error() -> None:
    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.3)

    with pytest.raises(Failed, match=r"strict=True, but 1 attention calls stay as they are.*dropout_p=0.3"):
        torch.compile(attend, backend=sc.Backend(inner="eager", strict=True))(torch.randn(1, 2, 8, 8))


def test_the_last_compile_before_the_limit_warns() -> None:
    model, _ = model_and_input()
    backend = sc.Backend(STREAMING, inner="eager")
    fast = torch.compile(model, backend=backend, dynamic=False)
    limit = torch._dynamo.config.recompile_limit
    with torch.no_grad():
        for length in range(8, 8 + limit - 1):
            fast(torch.randn(1, length, 16))
        with pytest.warns(sc.SparseCompileWarning, match=f"compiled {limit} times.*the next new shape runs un-compiled"):
            fast(torch.randn(1, 40, 16))
    assert backend.report.notes


def test_a_model_that_runs_uncompiled_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_private, "MOST_COMPILES", 8)
    model, _ = model_and_input()
    sc.compile(model, STREAMING, inner="eager", dynamic=False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", sc.SparseCompileWarning)
        for length in range(8, 8 + 8):
            model(torch.randn(1, length, 16))
    with torch.no_grad(), pytest.warns(sc.SparseCompileWarning, match="the model ran un-compiled"):
        model(torch.randn(1, 60, 16))
    assert "the model ran un-compiled" in str(model.sparse_compile_report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strict": "yes"}, "strict needs True or False, got 'yes'"),
        ({"inductor": 3}, "inductor needs a mapping of Inductor options, got 3"),
        ({"policy": 3}, "policy needs a Policy, a mask or None, got 3"),
    ],
)
def test_settings_of_the_wrong_type_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        sc.Backend(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "xla"}, "inner needs to be one of inductor, aot_eager, cudagraphs, tensorrt, eager, got 'xla'"),
        ({"kernel": "cuda"}, "kernel needs to be one of auto, autotune, flash, triton, flex, sdpa, reference, got 'cuda'"),
    ],
)
def test_unknown_settings_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sc.Backend(**options)


def test_unknown_options_are_refused() -> None:
    model, x = model_and_input()
    with pytest.raises(Failed, match="unknown option 'polycy': sparse_compile takes policy, inner, kernel"):
        torch.compile(model, backend=sc.backend, options={"polycy": STREAMING})(x)


def test_a_policy_that_is_none_is_refused() -> None:
    with pytest.raises(TypeError, match=r"policy needs a Policy, a mask or None, got 'causal': build one with sparse_"):
        sc.Backend("causal")  # type: ignore[arg-type]  # on purpose


def test_an_unknown_mode_is_refused() -> None:
    model, x = model_and_input()
    with pytest.raises(Failed, match=r"mode needs to be one of default, .* got 'fastest'"):
        torch.compile(model, backend=sc.Backend(inner="eager"), mode="fastest")(x)


def test_flex_where_it_cannot_run_is_an_error_with_the_reason() -> None:
    model, x = model_and_input()
    with pytest.raises(Failed, match=r"kernel='flex' cannot run .*inner='eager' has no FlexAttention kernels"):
        torch.compile(model, backend=sc.Backend(inner="eager", kernel="flex"))(x)


def test_the_mode_reaches_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def inductor(gm: Any, inputs: Any, *, config_patches: dict[str, Any]) -> Any:
        seen.update(config_patches)
        return gm.forward

    monkeypatch.setattr("torch._dynamo.backends.registry.lookup_backend", lambda name: inductor)
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    inner_compilers.compile_inner(
        gm, [torch.zeros(1)], inner="inductor", mode="reduce-overhead", config={"fallback_random": True}
    )
    assert seen["triton.cudagraphs"] is True
    assert seen["epilogue_fusion"] is False, "the C++ template cannot fuse what follows it"
    assert seen["fallback_random"] is True


def test_caches_know_a_graph_by_our_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    settings: Any = torch.compiler.config

    def inductor(gm: Any, inputs: Any, **_: Any) -> Any:
        seen.append(settings.cache_key_tag)
        return gm.forward

    monkeypatch.setattr("torch._dynamo.backends.registry.lookup_backend", lambda name: inductor)
    gm = torch.fx.symbolic_trace(lambda x: x + 1)
    inner_compilers.compile_inner(gm, [torch.zeros(1)], inner="inductor", mode=None, config=None)
    assert seen[0].startswith("sparse_compile-")
    assert settings.cache_key_tag == "", "and nothing stays behind"


def test_the_digest_of_sources_reads_every_sub_folder(tmp_path: Path) -> None:
    """A graph in Inductor's cache is reused only if no source file changed in any sub-folder."""
    deep = tmp_path / "lower" / "kernels"
    deep.mkdir(parents=True)
    (tmp_path / "pipeline.py").write_text("a = 1\n")
    (deep / "paged.py").write_text("b = 1\n")
    seen = [inner_compilers.source_digest(tmp_path)]
    (deep / "paged.py").write_text("b = 2\n")
    seen.append(inner_compilers.source_digest(tmp_path))
    (deep / "paged.py").rename(tmp_path / "paged.py")
    seen.append(inner_compilers.source_digest(tmp_path))
    (tmp_path / "lower" / "new.py").write_text("")
    seen.append(inner_compilers.source_digest(tmp_path))
    assert len(set(seen)) == len(seen)
    assert inner_compilers.source_digest(tmp_path) == seen[-1]


class Layers(nn.Module):
    """Four layers in a loop, with a graph break after the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for n in range(4):
            x = x + self.layers[n](x).transpose(1, 2).flatten(2)
            if n == 1:
                torch._dynamo.graph_break()
        return x


def test_a_policy_by_layer_that_a_graph_break_makes_unknowable_says_so() -> None:
    """After the break, Dynamo compiles the code of a layer once for all layers, so no call has a module path."""
    backend = sc.Backend(sc.Policy(layers={3: STREAMING}), inner="eager")
    with torch.no_grad(), pytest.warns(sc.SparseCompileWarning, match="Dynamo recorded no module.*behind a graph break"):
        torch.compile(Layers(), backend=backend)(torch.randn(1, 12, 16))
    assert {site.module for site in backend.report.sites} == {""}
    assert any("graph break" in note for note in backend.report.notes)


def test_a_policy_for_a_later_layer_is_no_error_in_the_graph_before_a_break() -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Attention() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.layers[0](x).transpose(1, 2).flatten(2)
            x = x + self.layers[1](x).transpose(1, 2).flatten(2)
            torch._dynamo.graph_break()
            x = x + self.layers[2](x).transpose(1, 2).flatten(2)
            out: Tensor = x + self.layers[3](x).transpose(1, 2).flatten(2)
            return out

    backend = sc.Backend(sc.Policy(layers={3: STREAMING}), inner="eager")
    with torch.no_grad():
        torch.compile(Halves(), backend=backend)(torch.randn(1, 12, 16))
    assert [(site.layer, site.action) for site in backend.report.sites] == [
        (0, "exact"),
        (1, "exact"),
        (2, "exact"),
        (3, "sparse"),
    ]


def test_layers_may_have_tensors_of_their_own_that_are_equal() -> None:
    """A graph names such tensors by their content. Equal tensors arise if a CPU policy is copied to the GPU layer by layer."""
    texts = (torch.arange(24) >= 9).int()[None]
    policy = sc.Policy(causal & document(texts), layers={1: causal & document(texts.clone())})
    plain, ids = next(d for d in DECODERS if d.name == "llama").build(), tokens(length=24)
    model = sc.compile(next(d for d in DECODERS if d.name == "llama").build(), policy, inner="eager")
    with torch.no_grad():
        got = model(ids, use_cache=False).logits
        parts = [plain(ids[:, part], position_ids=torch.arange(24)[None, part]).logits for part in (slice(9), slice(9, 24))]
    torch.testing.assert_close(got, torch.cat(parts, dim=1))
