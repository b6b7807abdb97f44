"""In a model with known retrieval heads, both calibration methods rank exactly those heads first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sparse_compile.calibration import Passkeys, echo_profile, observe, train_gates
from sparse_compile.head_profile import Profile
from support.planted import BOS, INDUCTION, KV_HEADS, LAYERS, VOCABULARY, planted

pytestmark = pytest.mark.usefixtures("fresh")


def passkeys() -> Passkeys:
    data = Passkeys.of_tokens(VOCABULARY, longest=240, shortest=160, count=2, size=8)
    return replace(data, opening=torch.tensor([BOS]))


def first(profile: Profile, count: int) -> set[tuple[int, int]]:
    full = profile.heads(count / (LAYERS * KV_HEADS)).full
    return {(layer, head) for layer, row in enumerate(full) for head, sees_all in enumerate(row) if sees_all}


def margin(profile: Profile, heads: set[tuple[int, int]]) -> float:
    """The lowest score of these heads minus the highest score of all others."""
    scores = {(layer, head): score for layer, row in enumerate(profile.scores) for head, score in enumerate(row)}
    return min(scores[at] for at in heads) - max(score for at, score in scores.items() if at not in heads)


def test_the_planted_model_answers_by_its_planted_heads_alone() -> None:
    tokens, asked = passkeys()(0)
    lost = {(0, 2): "previous"}
    right = []
    for model in (planted(), planted(lost)):
        with torch.no_grad():
            guessed = model(tokens).logits[0, :-1].argmax(-1)
        right.append(float((guessed == tokens[0, 1:])[asked[0, 1:]].float().mean()))
    assert right[0] > 0.6  # markers of passkeys, and the word after a repeated word, cannot be predicted
    assert right[1] < 0.1


@pytest.mark.parametrize("seed", [0, 1])
def test_echo_ranks_the_induction_heads_first(seed: int) -> None:
    profile = echo_profile(planted(), period=64, seed=seed, inner="eager")
    assert first(profile, 3) == INDUCTION
    assert margin(profile, INDUCTION) > 0.7
    assert profile.scores == tuple(tuple(row) for row in profile.numbers["induction"]), "there are no echo heads"


def test_gates_rank_the_induction_heads_first_and_not_the_local_head_they_need() -> None:
    profile = train_gates(planted(), passkeys(), steps=60, sink=4, recent=16, inner="eager", progress=False)
    assert first(profile, 3) == INDUCTION
    assert margin(profile, INDUCTION) > 0.6
    assert profile.scores[0][2] < 0.1, "the head that finds the token before needs a window and no more"


@pytest.mark.slow
def test_both_ways_follow_the_heads_to_other_places() -> None:
    places = {(1, 0), (2, 2), (2, 3)}
    model = planted({(0, 3): "previous"} | dict.fromkeys(places, "induction"))
    assert first(echo_profile(model, period=48, inner="eager"), 3) == places
    torch._dynamo.reset()
    profile = train_gates(model, passkeys(), steps=60, sink=4, recent=16, inner="eager", progress=False)
    assert first(profile, 3) == places
    assert margin(profile, places) > 0.6


@pytest.mark.slow
def test_a_window_over_the_whole_text_needs_no_head() -> None:
    profile = train_gates(planted(), passkeys(), steps=60, sink=4, recent=240, inner="eager", progress=False)
    assert max(max(row) for row in profile.scores) < 0.1


def test_echo_heads_and_induction_heads_are_told_apart() -> None:
    model = planted({(0, 1): "echo", (0, 2): "previous", (1, 3): "induction"})
    profile = echo_profile(model, period=64, repeats=4, inner="eager")
    assert first(profile, 2) == {(0, 1), (1, 3)}
    echo, induction = (torch.tensor(profile.numbers[name]) for name in ("echo", "induction"))
    assert (int(echo.argmax()), int(induction.argmax())) == (1, KV_HEADS + 3)
    # In the 2nd, 3rd and 4th repeat, 1/2, 2/3 and 3/4 of the visible copies of a token are earlier ones.
    assert float(echo.max()) == pytest.approx((1 / 2 + 2 / 3 + 3 / 4) / 3, abs=0.1)
    assert float(echo[1, 3]) < 0.05
    assert float(induction[0, 1]) < 0.05


def test_other_heads_are_seen_to_do_what_they_were_planted_to_do() -> None:
    tokens, _ = passkeys()(1)
    seen = observe(planted(), tokens, sink=1, recent=2, inner="eager")
    sink, recent, entropy = (torch.tensor(rows) for rows in (seen.sink, seen.recent, seen.entropy))
    assert float(sink[0, 3]) > 0.99, "the second query head of (0, 1) looks at the first token"
    assert float(recent[0, 5]) > 0.99, "that of (0, 2) looks one back"
    assert float(recent[0, 4]) > 0.99, "and the first one at itself"
    assert float(entropy[0, :6].max()) < 0.3
    anywhere = torch.arange(1, tokens.shape[1] + 1).log().mean()
    assert float(entropy[2, 7]) == pytest.approx(float(anywhere), abs=0.01), "that of (2, 3) looks nowhere"
