"""Measured statistics equal those of loops over the attention weights that transformers returns."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM

from sparse_compile.calibration import Observations, echo_profile, observe
from sparse_compile.calibration.forward import last_hidden
from sparse_compile.passes.ops import attention_stats
from sparse_compile.passes.ops.attention_stats import STATISTICS
from support.models import DECODERS, VOCABULARY, Decoder, tokens
from support.oracles.cache import llama, random_tokens

PERIOD, LENGTH, SINK, RECENT, PAGE, RATE = 7, 26, 2, 5, 64, 64
NAMES = ("llama", "llama mha", "qwen3", "mistral", "gemma3_text", "gemma2 eager", "gpt2", "opt")

pytestmark = pytest.mark.usefixtures("fresh")


def named(name: str) -> Any:
    return next(d for d in DECODERS if d.name == name).sharp()


def repeated(batch: int = 1, length: int = LENGTH) -> Tensor:
    return random_tokens(PERIOD, batch=batch).repeat(1, 99)[:, :length]


def weights_of(model: Any, ids: Tensor) -> list[Tensor]:
    """The attention weights ``[B, Hq, N, N]`` of each layer, as transformers returns them."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found: list[Tensor] = list(model(ids, output_attentions=True, use_cache=False).attentions)
    model.set_attn_implementation(before)
    return found


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else math.nan


def by_loops(rows: list[list[float]], period: int, sink: int, recent: int, start: int) -> dict[str, list[float]]:
    """The values that the rows of weights of one head and text add to each statistic."""
    found: dict[str, list[float]] = {name: [] for name in STATISTICS}
    for i, row in enumerate(rows):
        if i >= sink + recent:
            found["sink"].append(sum(row[:sink]))
            found["recent"].append(sum(row[i - recent + 1 : i + 1]))
        found["entropy"].append(-sum(w * math.log(w) for w in row if w > 0))
        if i < RATE:
            found["rate"].append(row[0])
        if period and i - period >= start:
            copies = range(i - period, start - 1, -period)
            found["echo"].append(sum(row[j] for j in copies))
            found["induction"].append(sum(row[j + 1] for j in copies))
    return found


def assert_seen(
    seen: Observations, weights: list[Tensor], *, period: int, sink: int = SINK, recent: int = RECENT, start: int = 0
) -> None:
    for layer, of_layer in enumerate(weights):
        for head in range(of_layer.shape[1]):
            texts = [by_loops(text[head].double().tolist(), period, sink, recent, start) for text in of_layer]
            for name in STATISTICS:
                wanted = mean([number for text in texts for number in text[name]])
                assert getattr(seen, name)[layer][head] == pytest.approx(wanted, abs=2e-5, nan_ok=True), (name, layer, head)
            per_key = of_layer[:, head].double().mean(dim=(0, 1))
            wanted_pages = [float(per_key[start : start + PAGE].sum()) for start in range(0, len(per_key), PAGE)]
            assert seen.pages[layer][head] == pytest.approx(wanted_pages, abs=2e-5)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("decoder", [d for d in DECODERS if d.name in NAMES], ids=str)
def test_statistics_are_those_of_loops_over_the_weights(decoder: Decoder, batch: int) -> None:
    model, ids = decoder.sharp(), repeated(batch)
    seen = observe(model, ids, period=PERIOD, sink=SINK, recent=RECENT, inner="eager")
    weights = weights_of(model, ids)
    assert_seen(seen, weights, period=PERIOD)
    spread = torch.tensor(seen.echo)
    assert float(spread.max() - spread.min()) > 1e-3, "all heads do the same: the test shows nothing"


def test_what_comes_before_the_first_repetition_is_no_copy() -> None:
    model, start = named("llama"), 3
    ids = torch.cat([random_tokens(start, seed=9), repeated()], dim=1)
    seen = observe(model, ids, period=PERIOD, start=start, sink=SINK, recent=RECENT, inner="eager")
    assert_seen(seen, weights_of(model, ids), period=PERIOD, start=start)


def test_pages_cover_a_text_of_any_length() -> None:
    for length in (63, 64, 65, 130):
        torch._dynamo.reset()
        model, ids = named("llama"), random_tokens(length, batch=2)
        seen = observe(model, ids, sink=SINK, recent=RECENT, inner="eager")
        assert_seen(seen, weights_of(model, ids), period=0)
        pages = torch.tensor(seen.pages)
        assert pages.shape == (2, 4, -(-length // PAGE))
        assert torch.allclose(pages.sum(2), torch.ones(2, 4))


def test_inductor_sees_the_same() -> None:
    model, ids = named("llama"), repeated(2)
    seen = observe(model, ids, period=PERIOD, sink=SINK, recent=RECENT)
    assert_seen(seen, weights_of(model, ids), period=PERIOD)


@pytest.mark.parametrize("rows", [0, 1, 5, 25])
def test_the_size_of_blocks_does_not_matter(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = named("gemma2 eager"), repeated(2)
    monkeypatch.setattr(attention_stats, "BLOCK_BYTES", 4 * 4 * LENGTH * rows)
    seen = observe(model, ids, period=PERIOD, sink=SINK, recent=RECENT, inner="eager")
    assert_seen(seen, weights_of(model, ids), period=PERIOD)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotations there
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("length", [512, 2048])
def test_no_matrix_of_all_weights_is_held(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    largest, add, blocks = Largest(), attention_stats._add, []

    def watched(*args: Any) -> None:
        blocks.append(args[4])
        with largest:
            add(*args)

    monkeypatch.setattr(attention_stats, "BLOCK_BYTES", 4 << 16)
    monkeypatch.setattr(attention_stats, "_add", watched)
    observe(llama(max_position_embeddings=length), random_tokens(length), period=64, inner="eager")
    assert largest.elements == 1 << 16, "of float32: the block that was asked for, and heads * length ** 2 is more"
    assert len(blocks) == 2 * (4 * length**2 >> 16)


# -- statistics not measured ----------------------------------------------------------------------------------------


def test_what_was_not_looked_for_is_no_number() -> None:
    seen = observe(llama(), random_tokens(20), sink=4, recent=16, inner="eager")
    for name in ("sink", "recent", "echo", "induction"):
        assert all(math.isnan(number) for row in getattr(seen, name) for number in row), name
    for name in ("entropy", "rate"):
        assert all(math.isfinite(number) for row in getattr(seen, name) for number in row), name
    seen = observe(llama(), repeated(length=PERIOD), period=PERIOD, inner="eager")
    assert all(math.isnan(number) for row in seen.echo for number in row), "nothing was repeated yet"


def observations(**changes: Any) -> Observations:
    table = [[0.1, 0.5, 0.3, 0.2], [0.6, 0.0, 0.3, 0.31]]
    names = ("sink", "recent", "entropy", "rate", "echo", "induction")
    return Observations(**(dict.fromkeys(names, table) | {"pages": []} | changes))


def test_the_sink_rate_is_the_share_of_heads_above_the_threshold() -> None:
    assert observations().sink_rate() == 3 / 8
    assert observations().sink_rate(threshold=0.55) == 1 / 8
    assert observations().sink_rate(threshold=1.0) == 0


def test_a_kv_head_does_what_the_most_eager_of_its_query_heads_does() -> None:
    assert observations().by_kv_head("echo", 2) == [[0.5, 0.3], [0.6, 0.31]]
    assert observations().by_kv_head("echo", 1) == [[0.5], [0.6]]
    assert observations().by_kv_head("echo", 4) == observations().echo


# -- the profile ----------------------------------------------------------------------------------------------------


def test_a_profile_of_echoes_is_made_of_the_observations() -> None:
    model = named("llama")
    profile = echo_profile(model, period=9, repeats=3, batch=2, seed=4, inner="eager")
    ids = torch.randint(VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(4)).repeat(1, 3)
    ids = torch.cat([torch.full((2, 1), model.config.bos_token_id), ids], dim=1)
    torch._dynamo.reset()
    seen = observe(model, ids, period=9, start=1, inner="eager")
    echo, induction = torch.tensor(seen.echo), torch.tensor(seen.induction)
    wanted = torch.maximum(echo, induction).unflatten(1, (2, 2)).amax(2)
    assert torch.equal(torch.tensor(profile.scores), wanted)
    profile.check(model.config)
    assert {key: profile.numbers[key] for key in ("period", "repeats", "seed")} == {"period": 9, "repeats": 3, "seed": 4}
    assert profile.numbers["sink_rate"] == seen.sink_rate()


def test_the_period_fits_the_positions_of_the_model() -> None:
    assert echo_profile(llama(), inner="eager").numbers["period"] == 256 // 8


def test_a_profile_of_echoes_is_the_same_for_a_seed() -> None:
    first, again, other = (echo_profile(llama(), period=8, seed=seed, inner="eager") for seed in (1, 1, 2))
    assert first == again
    assert first.scores != other.scores


@pytest.mark.parametrize("options", [{"period": 0}, {"period": -3}, {"period": 1}, {"repeats": 1}])
def test_texts_that_repeat_nothing_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"echo_profile needs period >= 2 and repeats >= 2, got"):
        echo_profile(llama(), inner="eager", **options)


@pytest.mark.parametrize("period", [-1, 1])
def test_a_period_of_one_token_is_refused(period: int) -> None:
    """With such a period every token would follow its own copy."""
    with pytest.raises(ValueError, match=f"a text that does not repeat, and start >= 0, got {period} and 0"):
        observe(llama(), random_tokens(8), period=period, inner="eager")


def test_a_text_repeats_itself_from_one_of_its_tokens_on() -> None:
    with pytest.raises(ValueError, match=r"observe needs period >= 2, .* and start >= 0, got 4 and -1"):
        observe(llama(), random_tokens(8), period=4, start=-1, inner="eager")


# -- unchanged state and errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True], ids=["", "after an error"])
def test_the_model_is_as_it_was(fails: bool) -> None:
    def hidden(model: nn.Module, ids: Tensor) -> Tensor:
        out = last_hidden(model, ids)
        assert not fails, "no room"
        return out

    model = llama().train()
    model.model.layers[1].eval()
    model.lm_head.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    trained = [weight.requires_grad for weight in model.parameters()]
    if fails:
        with pytest.raises(AssertionError, match="no room"):
            observe(model, random_tokens(12), inner="eager", hidden=hidden)
    else:
        observe(model, random_tokens(12), inner="eager", hidden=hidden)
        assert torch.is_grad_enabled()
    assert modes == [module.training for module in model.modules()]
    assert trained == [weight.requires_grad for weight in model.parameters()]


@pytest.mark.parametrize(("name", "reads"), [("falcon alibi", "truediv"), ("mpt", "position_bias"), ("gpt_oss", "reshape_2")])
def test_weights_that_depend_on_more_than_queries_and_keys_are_refused(name: str, reads: str) -> None:
    with pytest.raises(
        ValueError, match=rf"reads {reads}.* beside queries and keys: observe texts without padding, and models"
    ):
        observe(named(name), tokens(length=12), inner="eager")


def test_padding_is_refused() -> None:
    def padded(model: Any, ids: Tensor) -> Tensor:
        hidden: Tensor = model.model(input_ids=ids, attention_mask=(ids != 0).long(), use_cache=False).last_hidden_state
        return hidden

    ids = random_tokens(12)
    ids[0, :3] = 0
    with pytest.raises(ValueError, match="beside queries and keys: observe texts without padding, and models without"):
        observe(llama(), ids, inner="eager", hidden=padded)


def test_an_encoder_is_refused() -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForMaskedLM(BertConfig(**sizes, vocab_size=VOCABULARY))
    with pytest.raises(ValueError, match=r"layers \[0, 1\] have no causal attention that was recognized: call explain"):
        observe(model, tokens(length=12), inner="eager")


def test_a_model_without_config_is_refused() -> None:
    with pytest.raises(ValueError, match=r"calibration needs model.config, from which layers and KV heads are read"):
        observe(nn.Linear(4, 4), tokens(length=12), inner="eager")
    with pytest.raises(ValueError, match=r"calibration needs model.config"):
        echo_profile(nn.Linear(4, 4), inner="eager")


def test_a_layer_that_attends_twice_is_refused() -> None:
    def twice(model: Any, ids: Tensor) -> Tensor:
        return last_hidden(model, ids) + last_hidden(model, ids + 1)

    with pytest.raises(
        ValueError, match=r"layer 0 attends twice, or is not one of the 2 layers: each layer needs one attention call"
    ):
        observe(llama(), tokens(length=12), inner="eager", hidden=twice)
