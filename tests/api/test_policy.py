"""Policies choose masks by layer, module and phase, are values, can be saved, and apply their masks in models."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

import sparse_compile as sc
from sparse_compile import Policy
from sparse_compile.masks import Mask, causal, document, explicit, full, per_head, sink, sliding_window
from support.comparison import compare, relative_error
from support.models import DECODERS, tokens
from support.oracles import attention as oracle

NEAR = causal & sliding_window(4)
FAR = causal & sliding_window(16)
STREAMING = causal & (sink(2) | sliding_window(4))
PROMPT, TOTAL = 20, 23
FIRST = "model.layers.0.self_attn"


# -- choosing -------------------------------------------------------------------------------------------------------------


def test_the_default_serves_every_call() -> None:
    assert Policy(NEAR).mask_for(FIRST, 0, "prefill") == NEAR
    assert Policy(NEAR).mask_for("", None, "other") == NEAR
    assert Policy().mask_for(FIRST, 0, "decode") is None


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_an_index_wins_over_a_range_and_a_range_over_a_pattern(order: list[int]) -> None:
    entries: list[tuple[Any, Mask]] = [(3, NEAR), (range(2, 5), FAR), ("model.layers.*", STREAMING)]
    policy = Policy(causal, layers=dict(entries[k] for k in order))
    assert policy.mask_for("model.layers.3.self_attn", 3, "prefill") == NEAR
    assert policy.mask_for("model.layers.4.self_attn", 4, "prefill") == FAR
    assert policy.mask_for("model.layers.5.self_attn", 5, "prefill") == STREAMING
    assert policy.mask_for("encoder.5", 5, "prefill") == causal


def test_of_two_entries_of_a_kind_the_first_written_wins() -> None:
    policy = Policy(layers={range(4): NEAR, range(2, 8): FAR, "*.self_attn": STREAMING, "*": causal})
    assert policy.mask_for(FIRST, 3, "prefill") == NEAR
    assert policy.mask_for(FIRST, 5, "prefill") == FAR
    assert policy.mask_for(FIRST, 9, "prefill") == STREAMING
    assert policy.mask_for("model.layers.9.cross", 9, "prefill") == causal


def test_a_range_may_have_steps() -> None:
    policy = Policy(layers={range(0, 8, 2): NEAR})
    assert [policy.mask_for("", layer, "other") for layer in (0, 1, 6, 8)] == [NEAR, None, NEAR, None]


def test_a_pattern_matches_the_whole_path_and_its_case() -> None:
    policy = Policy(layers={"model.layers.[01].*": NEAR})
    assert policy.mask_for(FIRST, 0, "prefill") == NEAR
    assert policy.mask_for("model.layers.2.self_attn", 2, "prefill") is None
    assert policy.mask_for(f"outer.{FIRST}", 0, "prefill") is None
    assert policy.mask_for("Model.layers.0.self_attn", 0, "prefill") is None


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_pattern_matches_with_and_without_the_wrappers_around_a_model(wrapper: str) -> None:
    """Dynamo traces the model inside of DistributedDataParallel, and its paths begin there."""
    inside, outside = Policy(layers={"model.layers.[01].*": NEAR}), Policy(layers={wrapper + "model.layers.[01].*": NEAR})
    for policy in (inside, outside):
        for path in (FIRST, wrapper + FIRST):
            assert policy.mask_for(path, 0, "prefill") == NEAR
            assert policy.unmatched([path]) == []
        assert policy.mask_for("model.layers.2.self_attn", 2, "prefill") is None


def test_a_phase_replaces_the_whole_choice() -> None:
    policy = Policy(NEAR, layers={0: FAR}, decode=Policy(STREAMING, layers={1: causal}))
    assert policy.mask_for(FIRST, 0, "prefill") == FAR
    assert policy.mask_for(FIRST, 0, "decode") == STREAMING
    assert policy.mask_for("model.layers.1.self_attn", 1, "decode") == causal
    assert policy.mask_for(FIRST, 0, "other") == FAR


def test_a_phase_may_leave_calls_exact() -> None:
    policy = Policy(NEAR, prefill=Policy())
    assert policy.mask_for(FIRST, 0, "prefill") is None
    assert policy.mask_for(FIRST, 0, "decode") == NEAR


def test_phases_do_not_nest() -> None:
    with pytest.raises(ValueError, match="the decode policy has phases of its own: give it masks and layers only"):
        Policy(decode=Policy(prefill=NEAR))


def test_a_policy_of_a_policy_is_a_copy_and_takes_nothing_else() -> None:
    policy = Policy(NEAR, layers={0: FAR}, decode=STREAMING)
    assert Policy(policy) == policy
    with pytest.raises(TypeError, match="takes nothing else"):
        Policy(policy, decode=NEAR)


# -- a value --------------------------------------------------------------------------------------------------------------


POLICIES = {
    "empty": Policy(),
    "mask": Policy(STREAMING),
    "layers": Policy(NEAR, layers={0: FAR, range(1, 9, 2): STREAMING, "model.*": full}),
    "phases": Policy(NEAR, prefill=FAR, decode=Policy(layers={3: causal})),
    "heads": Policy(per_head([causal, STREAMING])),
    "tensors": Policy(causal & document([[0, 0, 1, 1]])),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_survives_text_files_and_pickling(name: str, tmp_path: Path) -> None:
    policy = POLICIES[name]
    policy.save(tmp_path / "policy.json")
    copies = [Policy.from_json(policy.to_json()), Policy.load(tmp_path / "policy.json"), pickle.loads(pickle.dumps(policy))]
    assert copies == [policy] * 3
    assert {hash(copy) for copy in copies} == {hash(policy)}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_prints_as_what_you_would_type(name: str) -> None:
    names = {"Policy": Policy, **{m: getattr(sc.masks, m) for m in sc.masks.__all__}}
    assert eval(repr(POLICIES[name]), names) == POLICIES[name]


def test_policies_that_differ_are_not_equal() -> None:
    assert len(set(POLICIES.values())) == len(POLICIES)
    assert Policy(NEAR) != Policy(FAR) != Policy(layers={0: FAR})
    assert hash(Policy(NEAR)) != hash(Policy(FAR))


def test_a_policy_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Policy(NEAR).default = FAR  # type: ignore[misc]  # the error under test


def test_layers_given_are_copied() -> None:
    layers: dict[int | range | str, Mask] = {0: NEAR}
    policy = Policy(layers=layers)
    layers[1] = FAR
    assert policy.mask_for("", 1, "other") is None


# -- wrong input ----------------------------------------------------------------------------------------------------------


def test_a_policy_is_made_of_masks() -> None:
    with pytest.raises(TypeError, match="a policy is made of masks, got 'causal'"):
        Policy("causal")  # type: ignore[arg-type]  # the error under test
    with pytest.raises(TypeError, match="a policy is made of masks, got None for layer 0"):
        Policy(layers={0: None})  # type: ignore[dict-item]  # the error under test
    with pytest.raises(TypeError, match="policy needs a Policy, a mask or None, got 3"):
        Policy(decode=3)  # type: ignore[arg-type]  # the error under test


@pytest.mark.parametrize("layer", [True, 1.5, None, (0, 1)])
def test_layers_are_named_by_index_range_or_pattern(layer: Any) -> None:
    with pytest.raises(TypeError, match="by index, range or module-path pattern"):
        Policy(layers={layer: NEAR})


@pytest.mark.parametrize("layer", [-1, range(-2, 2), range(3, -3, -1)])
def test_layers_count_from_zero(layer: Any) -> None:
    with pytest.raises(ValueError, match="a policy counts layers from 0, got"):
        Policy(layers={layer: NEAR})


@pytest.mark.parametrize("text", ["", "{", "not json", '{"version": 1'])
def test_a_broken_file_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "policy.json").write_text(text)
    with pytest.raises(ValueError, match="cannot read a policy, because the text is not valid JSON"):
        Policy.load(tmp_path / "policy.json")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_a_file_of_another_version_is_an_error(version: Any) -> None:
    text = json.dumps({"version": version, "policy": {}})
    with pytest.raises(ValueError, match=f"a policy file needs version 1, got version {version!r}: save it again"):
        Policy.from_json(text)


@pytest.mark.parametrize("text", ["[]", "3", '"causal"', "null"])
def test_other_json_is_no_policy(text: str) -> None:
    with pytest.raises(ValueError, match="a policy file needs version 1, got version None"):
        Policy.from_json(text)


MASK: dict[str, Any] = {"causal": {}}
BROKEN: list[Any] = [
    3,
    {"layers": 3},
    {"layers": [3]},
    {"layers": [{"layer": 0}]},
    {"layers": [{"mask": MASK}]},
    {"layers": [{"layer": 0, "mask": {"cauzal": {}}}]},
    {"layers": [{"layer": "0", "mask": MASK}]},
    {"layers": [{"layer": True, "mask": MASK}]},
    {"layers": [{"layer": 0.5, "mask": MASK}]},
    {"layers": [{"module": 3, "mask": MASK}]},
    {"layers": [{"range": 3, "mask": MASK}]},
    {"layers": [{"range": ["a", "b"], "mask": MASK}]},
    {"layers": [{"range": [0, 4, 0], "mask": MASK}]},
    {"layers": [{"layer": -1, "mask": MASK}]},
    {"default": "causal"},
    {"default": MASK, "decode": 5},
    {"decode": {"decode": {"default": MASK}}},
]


@pytest.mark.parametrize("content", BROKEN, ids=str)
def test_a_file_that_says_something_else_is_a_value_error(content: Any) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Policy.from_json(json.dumps({"version": 1, "policy": content}))


# -- checked against a model ----------------------------------------------------------------------------------------------


def test_a_layer_the_model_does_not_have_is_an_error_naming_both() -> None:
    message = r"the policy names layer 5, but the model has 2 layers \(0 to 1\)"
    for policy in (Policy(layers={5: NEAR}), Policy(layers={range(1, 6): NEAR}), Policy(decode=Policy(layers={5: NEAR}))):
        with pytest.raises(ValueError, match=message):
            policy.check(2, 4, 2)
    Policy(layers={1: NEAR, range(2): FAR, "anything": NEAR}).check(2, 4, 2)


def test_a_head_count_the_model_does_not_have_is_an_error_naming_both() -> None:
    message = "a per_head of 3 masks, but the model has 4 query heads and 2 KV heads"
    heads = per_head([NEAR, FAR, causal])
    for policy in (Policy(heads), Policy(layers={0: causal & heads}), Policy(prefill=~heads | sink(1))):
        with pytest.raises(ValueError, match=message):
            policy.check(2, 4, 2)
    Policy(per_head([NEAR, FAR]), decode=per_head([NEAR] * 4)).check(2, 4, 2)


@pytest.mark.parametrize("entry", ["compile", "explain"])
def test_a_policy_for_another_model_is_refused_before_it_compiles(entry: str) -> None:
    model = DECODERS[0].build()
    policy = Policy(layers={7: NEAR})
    with pytest.raises(ValueError, match="the policy names layer 7, but the model has 2 layers"):
        sc.compile(model, policy) if entry == "compile" else sc.explain(model, tokens(), policy=policy)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (Policy(layers={2: NEAR}), "names layer 2, but the model has 2 layers"),
    ],
)
def test_torch_compile_refuses_a_policy_for_another_model(policy: Policy, message: str) -> None:
    model = DECODERS[0].build()
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
        compare(model, tokens(), use_cache=False, policy=policy, output=lambda out: out.logits)


# -- applied to a model ---------------------------------------------------------------------------------------------------


masks_of_layers: dict[int, Mask] = {}


def layered(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """The attention oracle with one mask per layer."""
    previous = oracle.extra["mask"]
    oracle.extra["mask"] = masks_of_layers[module.layer_idx]  # type: ignore[index]  # set by transformers
    try:
        return oracle.attend(module, *args, **kwargs)
    finally:
        oracle.extra["mask"] = previous


AttentionInterface.register("layered", layered)
AttentionMaskInterface.register("layered", eager_mask)


def wanted(masks: list[Mask]) -> Tensor:
    """The oracle's logits of a tiny Llama whose layers see ``masks``."""
    model: Any = DECODERS[0].build()
    model.set_attn_implementation("layered")
    masks_of_layers.update(enumerate(masks))
    with torch.no_grad():
        logits: Tensor = model(tokens(length=TOTAL), use_cache=False).logits
    return logits


def rows(before: Mask, after: Mask) -> Mask:
    """A mask that applies ``before`` to the queries of the prompt and ``after`` to those of decode steps."""
    row = torch.arange(TOTAL).view(-1, 1)
    return explicit(torch.where(row < PROMPT, before.dense(TOTAL, TOTAL), after.dense(TOTAL, TOTAL)))


def decoded(policy: Policy) -> tuple[Tensor, sc.Report]:
    """The logits of a prompt and a few decode steps through the backend, and its report."""
    torch._dynamo.reset()
    model: Any = DECODERS[0].build()
    backend = sc.Backend(policy, inner="eager")
    fast: Any = torch.compile(model, backend=backend)
    cache, logits = DynamicCache(config=model.config), []
    ids = tokens(length=TOTAL)
    with torch.no_grad():
        for start, stop in [(0, PROMPT)] + [(k, k + 1) for k in range(PROMPT, TOTAL)]:
            logits.append(fast(ids[:, start:stop], past_key_values=cache).logits)
    return torch.cat(logits, dim=1), backend.report


CHOICES: dict[str, tuple[Policy, list[Mask]]] = {
    "one layer": (Policy(layers={1: NEAR}), [full, NEAR]),
    "two layers": (Policy(NEAR, layers={0: FAR}), [FAR, NEAR]),
    "by path": (Policy(layers={"model.layers.0.*": STREAMING}), [STREAMING, full]),
    "by range": (Policy(layers={range(1, 2): STREAMING}), [full, STREAMING]),
    "decode alone": (Policy(decode=NEAR), [rows(full, NEAR)] * 2),
    "prefill alone": (Policy(prefill=STREAMING), [rows(STREAMING, full)] * 2),
    "both phases": (
        Policy(causal, prefill=FAR, decode=Policy(NEAR, layers={1: STREAMING})),
        [rows(FAR, NEAR), rows(FAR, STREAMING)],
    ),
}


@pytest.mark.parametrize("name", CHOICES)
def test_every_layer_and_phase_gets_its_mask(name: str) -> None:
    policy, masks = CHOICES[name]
    logits, report = decoded(policy)
    assert relative_error(logits, wanted(masks)) < 1e-5
    assert report.left == []
    for site in report.sites:
        chosen = policy.mask_for(site.module, site.layer, site.phase)
        assert site.policy_mask == ("" if chosen is None else str(chosen))
        assert site.action == ("exact" if chosen is None else "sparse")
    assert {site.module for site in report.sites} == {f"model.layers.{k}.self_attn" for k in (0, 1)}
    assert {site.phase for site in report.sites} == {"prefill", "decode"}


def test_a_policy_of_everything_is_no_policy() -> None:
    report = compare(DECODERS[0].build(), tokens(), use_cache=False, policy=full, output=lambda out: out.logits).report
    assert {(site.action, site.policy_mask) for site in report.sites} == {("exact", "")}
