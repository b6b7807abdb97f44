"""Test the lab's tasks against a slow reader of contexts, and its training, scores and checkpoints."""

from __future__ import annotations

import json
import math
import random
import signal
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bench.lab import train as training
from bench.lab.data import words
from bench.lab.data.answers import Brackets, Counting, Sums
from bench.lab.data.haystack import OFFSETS, noise, repository_text
from bench.lab.data.items import Items, Task
from bench.lab.data.mixture import MIXTURES, mixed
from bench.lab.data.tasks import TASKS, Copy, Needles, Recall, Variables
from bench.lab.evaluation.score import exact_match, perplexity_by_position
from bench.lab.model import CHECKPOINT, build, config, load, save
from bench.lab.recipe import SMOKE, Recipe
from support.oracles import lab as lab_oracle

PLACED = [task for task in TASKS.values() if task.remapped]
WIDTH = {"variables": 9, "copy": 33, "recall": 64}  # tokens of what depth places, with what must follow it; a needle has 6

tasks = st.one_of(
    st.sampled_from(list(TASKS.values())),
    st.builds(lambda n, asked: Needles("drawn", n, min(n, asked)), st.integers(1, 20), st.integers(1, 6)),
    st.builds(lambda n, asked: Needles("drawn", n, min(n, asked), together=True), st.integers(1, 20), st.integers(1, 6)),
    st.builds(Variables, hops=st.integers(0, 4), chains=st.integers(1, 4)),
    st.builds(Copy, size=st.integers(1, 60)),
    st.builds(lambda n, asked: Recall(pairs=n, asked=min(n, asked)), st.integers(1, 40), st.integers(1, 8)),
    st.builds(Counting, most=st.integers(1, 15)),
    st.builds(Sums, size=st.integers(1, 50)),
    st.builds(Brackets, size=st.integers(1, 50)),
)
each_task = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class NextToken:
    """A model that predicts every next token, except where ``wrong`` is true."""

    def __init__(self, tokens: Tensor, wrong: Tensor | None = None) -> None:
        self.tokens, self.wrong = tokens, torch.zeros_like(tokens, dtype=torch.bool) if wrong is None else wrong

    def __call__(self, *, input_ids: Tensor, use_cache: bool) -> Any:
        rows = [int((self.tokens == row).all(1).nonzero()[0]) for row in input_ids]
        following = self.tokens[rows].where(~self.wrong[rows], words.START).roll(-1, 1)
        return SimpleNamespace(logits=50.0 * torch.nn.functional.one_hot(following, words.VOCABULARY))


@given(task=tasks, length=st.integers(180, 300), depth=st.none() | st.floats(0, 1), seed=st.integers(0, 99))
def test_answers_are_what_a_slow_reader_finds(task: Task, length: int, depth: float | None, seed: int) -> None:
    items = task.make(3, length, seeded(seed), depth=depth if task.remapped else None)
    assert items.tokens().shape == items.asked().shape == (3, length)
    for row, context in enumerate(items.context.tolist()):
        assert context[0] == words.START and context.count(words.START) == 1
        for question, answer in items.turns:
            assert lab_oracle.answer(context, question[row].tolist())[: answer.shape[1]] == answer[row].tolist()


@each_task
def test_asked_marks_the_answers(task: Task) -> None:
    items = task.make(4, 200, seeded(0))
    answers = torch.cat([answer for _, answer in items.turns], dim=1)
    assert items.tokens()[items.asked()].view(4, -1).equal(answers)


@given(task=st.sampled_from(PLACED), depth=st.floats(0, 1), seed=st.integers(0, 99))
def test_depth_places_what_is_asked_first(task: Task, depth: float, seed: int) -> None:
    items = task.make(3, 300, seeded(seed), depth=depth)
    room = items.context.shape[1] - 1
    for row, context in enumerate(items.context.tolist()):
        begin = lab_oracle.begin(context, items.turns[0][0][row].tolist()) - 1
        wanted = depth * (room - WIDTH.get(task.name, 6))
        assert wanted - 6 <= begin <= wanted + 1
        assert begin == 0 or depth > 0


def test_needles_lie_everywhere_and_stay_whole() -> None:
    items = Needles("sixteen", 16, 1).make(200, 200, seeded(0))
    contexts, questions = items.context.tolist(), items.turns[0][0].tolist()
    assert all(len(lab_oracle.told(context)) == 16 for context in contexts)
    begins = torch.tensor([lab_oracle.begin(*row) for row in zip(contexts, questions, strict=True)])
    assert begins.min() < 5 and begins.max() > 180 and 85 < begins.float().mean() < 110


@each_task
def test_a_seed_gives_the_same_items_again(task: Task) -> None:
    first, again, other = (task.make(4, 200, seeded(seed)).tokens() for seed in (1, 1, 2))
    assert first.equal(again) and not first.equal(other)


@pytest.mark.parametrize("name", ["single", "multi_key", "variables", "recall", "counting"])
def test_no_answer_is_likely_without_the_context(name: str) -> None:
    answer = TASKS[name].make(4000, 200, seeded(0)).turns[0][1][:, 0]
    choices = Counting().most if name == "counting" else len(words.VALUES)
    assert answer.bincount().max() < 4000 / choices * 2 and len(answer.unique()) == choices


def test_a_task_refuses_what_it_cannot_place() -> None:
    with pytest.raises(ValueError, match="counting has no needle"):
        Counting().make(1, 200, seeded(0), depth=0.5)
    with pytest.raises(ValueError, match="0 <= depth <= 1, got 2"):
        TASKS["single"].make(1, 200, seeded(0), depth=2.0)
    with pytest.raises(ValueError, match="room for 96 tokens"):
        TASKS["multi_key"].make(1, 100, seeded(0))


def test_noise_has_four_successors() -> None:
    following: dict[int, Counter[int]] = defaultdict(Counter)
    for row in noise(512, 300, seeded(0)).tolist():
        for before, after in pairwise(row):
            following[before][after] += 1
    usual = sum(count for after in following.values() for _, count in after.most_common(len(OFFSETS)))
    assert len(following) == 256 and usual > 0.998 * 512 * 299  # where two chains of the pool meet, anything may follow


def test_text_is_the_repository() -> None:
    text = repository_text()
    assert bytes(text.pool.tolist()).startswith(b'"""') and len(text.sha256) == 64


@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_batch_weighs_every_row_alike(mixture: str) -> None:
    text = repository_text()
    batch = mixed(32, 256, MIXTURES[mixture], text, chance=random.Random(0), rng=seeded(0))
    assert batch.tokens.shape == batch.weights.shape == (32, 256)
    assert (batch.weights[:, 0] == 0).all()
    sums = 32 * batch.weights.sum(1)
    assert all(any(math.isclose(row, total, rel_tol=1e-5) for total in (1.0, 1.3)) for row in sums.tolist())


def test_shares_are_shares() -> None:
    assert all(math.isclose(sum(shares.values()), 1) for shares in MIXTURES.values())


@each_task
def test_a_model_that_knows_what_comes_next_is_right(task: Task) -> None:
    items = task.make(4, 200, seeded(0))
    model = NextToken(items.tokens())
    assert exact_match(model, items).all() and exact_match(model, items).shape == (4, len(items.turns))
    weights = items.asked().float()
    assert training.weighted_loss(model, items.tokens(), weights) < 1e-3
    missing = NextToken(items.tokens(), items.asked())
    assert training.weighted_loss(missing, items.tokens(), weights) == pytest.approx(50 * float(weights.sum()))


def test_one_wrong_token_makes_its_turn_wrong() -> None:
    items = TASKS["turns"].make(4, 200, seeded(0))
    wrong = torch.zeros_like(items.asked())
    wrong[2, -1] = True  # the last value of the last answer
    wrong[3, items.context.shape[1] : items.context.shape[1] + 2] = True  # a question
    found = exact_match(NextToken(items.tokens(), wrong), items)
    assert not found[2, -1] and int(found.sum()) == found.numel() - 1


def test_perplexity_counts_every_position_once() -> None:
    text = repository_text()
    model = build(0, config(layers=2, hidden=64)).eval()
    found = perplexity_by_position(model, text, 64, 16, rows=3)
    assert found.shape == (4,) and ((found > 500) & (found < 1200)).all()  # untrained: about the chance of 832 tokens
    with pytest.raises(ValueError, match="multiple of 7"):
        perplexity_by_position(model, text, 64, 7)


def test_a_small_training_learns_something_and_keeps_it(tmp_path: Path) -> None:
    recipe = replace(SMOKE, steps=40, rate=5e-3, look_every=10, items=2)
    log = training.train(recipe, tmp_path, seed=0, device="cpu", commit="none")
    losses = [seen["loss"] for seen in log["history"]]
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 0.5
    assert json.loads((tmp_path / "log.json").read_text("utf-8"))["steps"] == 40
    assert set(log["scores"]) == set(TASKS) and len(log["perplexity"]) == 2


def test_a_training_that_is_told_to_end_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ending(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return mixed(*arguments, **options)

    monkeypatch.setattr(training, "mixed", ending)
    log = training.train(SMOKE, tmp_path, seed=0, device="cpu", commit="none")
    assert log["steps"] == 1 and load(tmp_path).config.num_hidden_layers == SMOKE.layers


def test_a_seed_gives_the_same_training_again(tmp_path: Path) -> None:
    recipe = replace(SMOKE, steps=3, items=1, scored_items=1)
    for name in ("first", "again"):
        training.train(recipe, tmp_path / name, seed=3, device="cpu", commit="none")
    first, again = (load(tmp_path / name).state_dict() for name in ("first", "again"))
    assert all(tensor.equal(again[name]) for name, tensor in first.items())


def test_a_model_comes_back_as_it_was(tmp_path: Path) -> None:
    model = build(1, config(layers=2, hidden=64)).eval()
    save(model, tmp_path, {})
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path)(ids).logits, model(ids).logits, atol=2e-3, rtol=0.0)
    assert build(1, config(layers=2, hidden=64)).lm_head.weight.equal(model.lm_head.weight)


def test_the_whole_model_fits_ten_megabytes() -> None:
    with torch.device("meta"):
        model = build(0)
    assert 2 * sum(parameter.numel() for parameter in model.parameters()) < 9_500_000


def test_lengths_grow_and_rates_fall() -> None:
    recipe, chance = Recipe(), random.Random(0)
    seen = [{recipe.length(step, chance) for step in range(begin, begin + 500)} for begin in (0, 2000, 7000)]
    assert seen == [{256}, {256, 512, 1024}, {256, 512, 1024, 2048}]
    rates = [recipe.rate_at(step) for step in (0, 299, 4000, 7999)]
    assert rates[0] < rates[1] and rates[1] == max(rates) and rates[3] < 1e-6


@pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="no checkpoint in this checkout")
def test_the_checkpoint_is_small_and_says_where_it_is_from() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 10_000_000
    log = json.loads((CHECKPOINT / "log.json").read_text("utf-8"))
    assert {"seed", "commit", "torch", "device", "steps", "seconds", "history", "scores", "text"} <= log.keys()
    items: Items = TASKS["single"].make(4, 256, seeded(0))
    assert exact_match(load(), items).float().mean() >= 0.75
