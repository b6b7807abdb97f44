"""A gated model computes and trains the same as loops over heads, and calibration changes nothing else."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import sparse_compile as sc
from sparse_compile.calibration import Passkeys, train_gates
from sparse_compile.calibration.forward import compiled_hidden, frozen, last_hidden
from sparse_compile.calibration.gate_training import rate_at
from sparse_compile.head_profile import signature
from support.gated_models import (
    LENGTH,
    MIXED,
    RECENT,
    SETTINGS,
    SINK,
    STREAMING,
    Toy,
    last,
    mixed,
    random_gates,
    sdpa,
    toy,
    trained_toy,
)
from support.models import DECODERS, VOCABULARY, Decoder, tokens
from support.oracles.cache import error, llama, random_tokens
from support.oracles.gates import factor, gated_hidden, trained

pytestmark = pytest.mark.usefixtures("fresh")


# -- the mixture ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoder", [d for d in DECODERS if d.name in MIXED], ids=str)
def test_outputs_and_gradients_of_gates_are_those_of_loops_over_heads(decoder: Decoder) -> None:
    model, ids = decoder.sharp(), tokens(length=LENGTH)
    leaves = random_gates(model)
    direction = torch.randn(2, LENGTH, 64, generator=torch.Generator().manual_seed(4))
    got = mixed(model, leaves)(ids)
    slopes = torch.autograd.grad((got * direction).sum(), leaves)
    wanted = gated_hidden(model, ids, leaves, SINK, RECENT)
    wanted_slopes = torch.autograd.grad((wanted * direction).sum(), leaves)
    assert error(got.detach(), wanted.detach()) < 1e-5
    assert error(last_hidden(model, ids), wanted.detach()) > 1e-3, "gates change nothing: the test shows nothing"
    for slope, wanted_slope in zip(slopes, wanted_slopes, strict=True):
        assert float((slope - wanted_slope).abs().max()) < 2e-4 * max(1.0, float(torch.stack(wanted_slopes).abs().max()))


@pytest.mark.parametrize("decoder", [d for d in DECODERS if d.name in ("llama", "falcon alibi", "mpt", "gemma3_text")], ids=str)
def test_open_gates_are_the_model_and_closed_ones_the_streaming_policy(decoder: Decoder) -> None:
    model, ids = decoder.sharp(), tokens(length=LENGTH)
    leaves = random_gates(model)
    run = mixed(model, leaves)
    with torch.no_grad():
        for value, wanted in (
            (1.0, compiled_hidden(model, last_hidden, sc.Backend(inner="eager"))(ids)),
            (0.0, compiled_hidden(model, last_hidden, sc.Backend(STREAMING, inner="eager"))(ids)),
        ):
            for leaf in leaves:
                leaf.fill_(value)
            assert torch.equal(run(ids), wanted)
        assert error(compiled_hidden(model, last_hidden, sc.Backend(inner="eager"))(ids), last_hidden(model, ids)) < 1e-5


def test_one_gate_moves_its_query_heads_and_no_other() -> None:
    """The test compares the attention output of the first layer by head, before the output projection mixes the heads."""
    model, ids, seen = llama().requires_grad_(False), random_tokens(LENGTH), []
    leaves = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    run = mixed(model, leaves)
    run(ids)
    with torch.no_grad():
        leaves[0][1] = 0.0
    run(ids)
    changed = (seen[0] - seen[1]).unflatten(-1, (4, -1)).abs().amax(dim=(0, 1, 3)) > 1e-6
    assert changed.tolist() == [False, False, True, True]


@pytest.mark.slow
def test_inductor_computes_and_trains_the_same() -> None:
    model, ids = llama().requires_grad_(False), random_tokens(LENGTH, batch=2)
    leaves = random_gates(model)
    got, wanted = mixed(model, leaves, inner="inductor")(ids), gated_hidden(model, ids, leaves, SINK, RECENT)
    assert error(got.detach(), wanted.detach()) < 1e-5
    direction = torch.randn_like(wanted)
    slopes, wanted_slopes = (torch.stack(torch.autograd.grad((out * direction).sum(), leaves)) for out in (got, wanted))
    assert error(slopes, wanted_slopes) < 1e-3
    scores, wanted_scores = (torch.tensor(trained_toy(last, inner=inner, steps=4).scores) for inner in ("inductor", "eager"))
    assert float((scores - wanted_scores).abs().max()) < 1e-4


# -- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_training_is_the_published_loop(name: str, batch: int) -> None:
    model = next(d for d in DECODERS if d.name == name).sharp()
    kv_heads = signature(model.config)["kv_heads"]
    batches = partial(last, batch=batch)
    sizes = {"steps": 7, "sink": SINK, "recent": RECENT, "rate": 0.08, "penalty": 0.4}
    wanted = trained(model, batches, kv_heads, layers=2, **sizes)  # type: ignore[arg-type]  # mypy rejects unpacked dicts
    profile = train_gates(model, batches, **(SETTINGS | sizes))
    assert float((torch.tensor(profile.scores) - wanted).abs().max()) < 2e-3
    assert float(wanted.max() - wanted.min()) > 0.02, "all gates go the same way: the test shows nothing"


def test_the_loss_is_the_error_of_asked_tokens_and_the_mean_gate() -> None:
    model, (ids, asked) = llama(), last(0)
    profile = train_gates(model, lambda step: (ids, asked), steps=2, penalty=0.3, rate=0.5, **SETTINGS)
    # Adam's first step moves every gate by the rate, 0.5 * factor(0, 2). The error is still 0, so only the penalty counts.
    moved = torch.full((2, 2), 1 - 0.5 * factor(0, 2))
    with torch.no_grad():
        squares = (gated_hidden(model, ids, moved, SINK, RECENT) - last_hidden(model, ids)).square()
    wanted = float(squares[asked].mean()) + 0.3 * float(moved[0, 0])
    assert profile.numbers["loss"] == pytest.approx(wanted, rel=1e-5)
    assert float(squares[asked].mean()) > 1e-3


@pytest.mark.parametrize("steps", [1, 3, 5, 20, 2000])
def test_the_rate_is_as_published(steps: int) -> None:
    assert [rate_at(step, steps=steps) for step in range(steps)] == [factor(step, steps) for step in range(steps)]
    if steps == 2000:
        assert [rate_at(step, steps=steps) for step in (0, 199, 399, 400, 1600, 1800, 1999)] == [0.1, 0.5, 1, 1, 1, 0.5, 0.1]


@pytest.mark.parametrize(("rate", "penalty"), [(0.7, 500.0), (0.7, -5.0), (3.0, 0.05)])
def test_gates_stay_between_nothing_and_everything(rate: float, penalty: float) -> None:
    profile = trained_toy(last, steps=4, rate=rate, penalty=penalty)
    assert all(0 <= gate <= 1 for row in profile.scores for gate in row)
    if penalty == 500.0:
        assert profile.scores == ((0.0, 0.0), (0.0, 0.0))


def test_without_a_penalty_nothing_is_given_up() -> None:
    assert trained_toy(last, steps=3, penalty=0.0).scores == ((1.0, 1.0), (1.0, 1.0))


def test_heads_whose_own_window_is_smaller_than_ours_lose_their_gates_first() -> None:
    """The first layer of Gemma sees only 8 keys, so full and streaming attention with a window of 8 are equal there."""
    model = next(d for d in DECODERS if d.name == "gemma3_text").sharp()
    profile = train_gates(model, last, steps=12, **(SETTINGS | {"recent": 8, "rate": 0.08}))
    assert max(profile.scores[0]) < min(profile.scores[1]) - 0.1


def test_a_profile_of_gates_says_whose_they_are_and_how_they_were_found() -> None:
    profile = trained_toy(last, steps=2)
    profile.check(toy().config)
    assert profile.method == "gates"
    numbers = {key: profile.numbers[key] for key in ("steps", "sink", "recent", "rate", "penalty")}
    assert numbers == {"steps": 2, "sink": SINK, "recent": RECENT, "rate": 0.02, "penalty": 0.05}


# -- unchanged state ------------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> Any:
    weights = {name: (weight.requires_grad, weight.grad is None, weight.clone()) for name, weight in model.named_parameters()}
    return weights, [module.training for module in model.modules()], list(model.state_dict())


def assert_same_state(found: Any, wanted: Any) -> None:
    assert found[1:] == wanted[1:]
    assert found[0].keys() == wanted[0].keys()
    for name, (trained_, ungraded, weight) in wanted[0].items():
        assert found[0][name][:2] == (trained_, ungraded), name
        assert torch.equal(found[0][name][2], weight), name


@pytest.mark.parametrize("fails", [False, True], ids=["", "after an error"])
def test_the_model_is_as_it_was(fails: bool) -> None:
    model = toy().train()
    model.layers[1].eval()
    model.layers[0].qkv.requires_grad_(False)
    before = state_of(model)

    def batches(step: int) -> tuple[Tensor, Tensor]:
        if fails and step == 2:
            raise OSError("the disk is gone")
        return last(step)

    if fails:
        with pytest.raises(OSError, match="the disk is gone"):
            trained_toy(batches, model, steps=3)
    else:
        trained_toy(batches, model, steps=3)
    assert_same_state(state_of(model), before)


def test_random_numbers_and_the_grad_mode_are_as_they_were() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with torch.no_grad():
        trained_toy(last, steps=2)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_it_trains_under_no_grad() -> None:
    wanted = trained_toy(last, steps=3)
    with torch.no_grad():
        assert trained_toy(last, steps=3) == wanted


def test_dropout_of_a_model_in_training_mode_is_off() -> None:
    assert trained_toy(last, toy().train(), steps=3) == trained_toy(last, toy().eval(), steps=3)


def test_a_frozen_model_is_thawed_only_where_it_was_thawed() -> None:
    model = llama()
    model.lm_head.requires_grad_(False)
    with frozen(model):
        assert not any(weight.requires_grad for weight in model.parameters())
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == ["lm_head.weight"]


def test_many_calibrations_and_lengths_do_not_run_out_of_compiles() -> None:
    """Dynamo compiles one code object at most eight times. Then it runs the object un-compiled, and gates would not train."""
    model = toy()
    for _ in range(10):
        trained_toy(last, model, steps=1)
    lengths = list(range(12, 36))

    def batches(step: int) -> tuple[Tensor, Tensor]:
        ids = random_tokens(lengths[step], seed=step)
        return ids, torch.ones_like(ids).bool()

    trained_toy(batches, model, steps=len(lengths))


def test_texts_of_all_lengths_train_a_model_with_windows_of_its_own() -> None:
    model = next(d for d in DECODERS if d.name == "gemma3_text").sharp()
    data = Passkeys.of_tokens(VOCABULARY, longest=90, shortest=30, count=1, size=4)
    lengths = {data(step)[0].shape[1] for step in range(12)}
    assert len(lengths) > 9
    train_gates(model, data, steps=12, **SETTINGS)


# -- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "asked"),
    [
        (torch.ones(24, dtype=torch.int64), torch.ones(24, dtype=torch.bool)),
        (torch.ones(1, 24, dtype=torch.int64), torch.ones(1, 23, dtype=torch.bool)),
        (torch.ones(1, 24, dtype=torch.int64), torch.ones(24, dtype=torch.bool)),
        (torch.ones(1, 24, dtype=torch.int64), torch.ones(1, 24)),
        (torch.ones(1, 24, dtype=torch.int64), torch.zeros(1, 24, dtype=torch.bool)),
    ],
    ids=["one row", "other length", "asked of one row", "no bool", "nothing asked"],
)
def test_batches_of_another_shape_are_refused(ids: Tensor, asked: Tensor) -> None:
    with pytest.raises(
        ValueError, match=r"a batch needs tokens \[B, N\], and asked tokens as bool \[B, N\] with at least one true"
    ):
        trained_toy(lambda step: (ids, asked), steps=1)


@pytest.mark.parametrize("steps", [0, -3])
def test_no_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"train_gates needs steps >= 1, got {steps}"):
        trained_toy(last, steps=steps)


def test_a_model_without_config_is_refused() -> None:
    with pytest.raises(ValueError, match=r"calibration needs model.config, from which layers and KV heads are read"):
        train_gates(nn.Linear(4, 4), last, steps=1, **SETTINGS)


def bert() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertModel(BertConfig(**sizes, vocab_size=VOCABULARY), add_pooling_layer=False)


def test_an_encoder_is_refused() -> None:
    model = bert()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"layers \[0, 1\] have no causal attention that was recognized: call explain"):
        train_gates(model, last, steps=1, **SETTINGS)
    assert_same_state(state_of(model), before)


def test_a_layer_without_attention_is_refused() -> None:
    model = toy()
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"layers \[2\] have no causal attention that was recognized"):
        trained_toy(last, model, steps=1)


def test_a_model_of_your_own_is_trained() -> None:
    profile = trained_toy(last, steps=3)
    assert (len(profile.scores), len(profile.scores[0]), profile.model["type"]) == (2, 2, "toy")
    assert min(min(row) for row in profile.scores) < 1


def test_an_attention_call_that_was_not_understood_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"2 attention calls were not recognized, so their heads have no scores: .*dropout_p=0.1"
    ):
        trained_toy(last, Toy(sdpa(is_causal=True, dropout_p=0.1)), steps=1)


@pytest.mark.parametrize("options", [{"times": 2}, {"kv_heads": 1}], ids=["twice", "heads"])
def test_layers_that_attend_twice_or_have_other_heads_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"has 2 KV heads, and gates are \[.*\] by layer, one causal attention each"):
        trained_toy(last, toy(**options), steps=1)
