"""Test the scores of the quality bench against a plain forward, its budgets against the cache, and its intervals."""

from __future__ import annotations

import csv
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from bench.lab import quality
from bench.lab.data.tasks import TASKS
from bench.lab.demo import run_demo
from bench.lab.evaluation import findings, methods, plots
from bench.lab.evaluation.budgets import PAGE, SINK, dense_bytes, heads_within, held_bytes, read_bytes
from bench.lab.evaluation.jobs import Asking, Cell, Size, done, made, run
from bench.lab.evaluation.methods import BUDGETS, FULL, Method
from bench.lab.evaluation.plan import GROUPS, NEEDLES, OTHERS, Plan
from bench.lab.evaluation.rows import Table, wilson
from bench.lab.evaluation.score import exact_match
from bench.lab.model import build, config
from bench.lab.session import Session
from sparse_compile import SparseCache
from sparse_compile.head_profile import Profile
from sparse_compile.passes.storage.layer_plan import RingStorage

EXACT = replace(FULL, dtype=torch.float32)
SHAPE = config(layers=2, hidden=64)
SIX_LAYERS = config()
GATES = methods.random_profile(Profile([[0.0] * 4] * 6), 0)


def cache_of(method: Method, length: int) -> SparseCache:
    sizes = {"max_length": length, "max_batch": 1, "page_size": PAGE}
    return SparseCache(SIX_LAYERS, method.policy, **sizes, dtype=method.dtype, mode=method.mode, kv=method.kv)  # type: ignore[arg-type]


def test_decoding_over_a_cache_scores_as_one_forward_does() -> None:
    """Random weights almost never answer right, so the test compares the model's own guesses."""
    items = made(Cell("turns", 160), Size(None, items=2, seeds=2))
    model = build(0, SHAPE).eval()
    with torch.no_grad():
        guesses = model(input_ids=items.tokens()).logits.argmax(-1)
    session = Session(build(0, SHAPE).eval(), EXACT, rows=2, length=160)
    begin = items.context.shape[1]
    with torch.no_grad():
        ours = torch.cat([session._guesses(rows, begin) for rows in items.tokens().split(2)])
    assert torch.equal(ours, guesses[:, begin - 1 : -1])
    for question in ("decoded", "prefilled"):
        assert torch.equal(session.right(items, question=question), exact_match(model, items))


def test_what_is_right_is_counted_turn_by_turn() -> None:
    items = made(Cell("multi", 128), Size(None, items=3, seeds=1))
    session = Session(build(0, SHAPE).eval(), EXACT, rows=3, length=128)
    tokens, begin = items.tokens(), items.context.shape[1]
    wrong = tokens[:, begin:].clone()
    wrong[1, 6 + 2] = 0  # the first value of the second turn of the second item
    session._guesses = lambda tokens, begin: wrong  # type: ignore[method-assign]
    found = session.right(items)
    assert found.tolist() == [[True] * 4, [True, False, True, True], [True] * 4]


def test_losses_are_those_of_one_forward() -> None:
    tokens = torch.randint(256, (2, 48), generator=torch.Generator().manual_seed(0))
    model = build(0, SHAPE).eval()
    with torch.no_grad():
        logits = model(input_ids=tokens).logits[:, 31:-1]
    wanted = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 32:], reduction="none")
    session = Session(build(0, SHAPE).eval(), EXACT, rows=2, length=48)
    assert torch.allclose(session.losses(tokens, 32), wanted, atol=1e-4)


@pytest.mark.parametrize("length", [1024, 2048])
@pytest.mark.parametrize("budget", BUDGETS)
def test_a_budget_is_what_the_cache_holds(budget: float, length: int) -> None:
    made = methods.by_heads("gates", GATES, budget, length), methods.sink_and_recent(budget, length)
    for method in (*made, methods.heads_and_pages(GATES, budget, length), *(one.relaxed() for one in made)):
        cache = cache_of(method, length)
        share = held_bytes(cache) / dense_bytes(cache)
        assert budget - PAGE / length < share < budget + 0.01, method
    full, recent = heads_within(budget, length, 24)
    assert full * length + (24 - full) * (recent + SINK + 1) <= budget * length * 24
    assert cache_of(made[0], length).cached_layers[0].plan.policy("decode") == made[0].policy.mask_for("", 0, "decode")


def test_a_selection_holds_everything_and_reads_its_budget_and_the_digests() -> None:
    for score, summaries in (("minmax", 1 / 16), ("mean", 1 / 32)):
        cache = cache_of(methods.pages(score, 1 / 8, 1024), 1024)
        assert held_bytes(cache) > dense_bytes(cache)
        assert read_bytes(cache) / dense_bytes(cache) == pytest.approx(1 / 8 + summaries)
    everything = cache_of(methods.FULL, 1024)
    assert read_bytes(everything) == dense_bytes(everything) == everything.dense_nbytes


def test_bytes_are_shares_of_sixteen_bits() -> None:
    assert held_bytes(cache_of(EXACT, 512)) / dense_bytes(cache_of(EXACT, 512)) == pytest.approx(2, rel=0.01)
    shares = [
        held_bytes(cache) / dense_bytes(cache)
        for cache in (cache_of(methods.in_fewer_bits(k, k), 2048) for k in ("int8", "int4"))
    ]
    assert 0.5 < shares[0] < 0.7 > 0.45 > shares[1] > 0.25


def test_a_budget_too_small_for_a_page_in_every_head_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs a page of 16 for each KV head"):
        heads_within(1 / 256, 1024, 24)
    assert heads_within(1, 1024, 24) == (24, 1024)


def test_without_takes_the_best_quarter_and_others_are_none_of_it() -> None:
    def streaming(method: Method) -> set[tuple[int, int]]:
        kept = cache_of(method, 256).cached_layers
        return {
            (layer.plan.layer, h) for layer in kept for s in layer.plan.storages if isinstance(s, RingStorage) for h in s.heads
        }

    best = {(layer, head) for layer, row in enumerate(GATES.heads(1 / 4).full) for head, is_full in enumerate(row) if is_full}
    assert streaming(methods.without("", GATES)) == best
    for seed in range(3):
        others = streaming(methods.without("", methods.random_others(GATES, seed)))
        assert len(others) == len(best) and not others & best


def test_intervals_are_wilsons() -> None:
    assert wilson(45, 50) == pytest.approx((0.7864, 0.9565), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(510, 510) == pytest.approx((0.9925, 1.0), abs=1e-4)


def test_items_are_the_same_every_time_and_differ_by_seed() -> None:
    size = Size(None, items=2, seeds=2)
    a, b = made(Cell("single", 96), size).tokens(), made(Cell("single", 96), size).tokens()
    assert torch.equal(a, b) and not torch.equal(a[:2], a[2:])


def test_the_plan_asks_every_method_of_every_task() -> None:
    plan = Plan(GATES, GATES, Size(None))
    jobs = {name: list(group(plan)) for name, group in GROUPS.items()}
    asked = {
        (job.method.name, cell.task)
        for group in jobs.values()
        for job in group
        if isinstance(job, Asking)
        for cell in job.cells
    }
    for name in ("full", "sink + recent", "gates", "pages, minmax", "pages, mean", "gates + pages", "int8", "fp8", "int4"):
        assert {task for method, task in asked if method == name} == set(TASKS), name
    assert {*NEEDLES, *OTHERS} == set(TASKS)
    assert all(job.size.items * job.size.seeds >= 500 for group in jobs.values() for job in group)
    assert all(job.size.items * job.size.seeds % job.size.rows == 0 for job in jobs["static"])


@pytest.mark.slow
def test_what_fails_is_told_and_the_rest_goes_on() -> None:
    """Run two jobs in a worker process: one that fails, and one that does not."""
    size, failed = Size(None, items=1, seeds=1, rows=1), list[str]()
    jobs = [Asking(EXACT, (Cell(task, 96),), 96, size) for task in ("no such task", "single")]
    assert [at for at, _ in done(jobs, 1, failed)] == [1]
    assert len(failed) == 1 and "no such task" in failed[0]


def test_errors_of_torch_can_be_told_by_another_process() -> None:
    class Error(RuntimeError):
        def __init__(self, reason: object) -> None:
            super().__init__(reason)
            self.reason = lambda: reason  # cannot be pickled

    def job(device: str) -> list[Any]:
        raise Error("out of order")

    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*raise Error.*out of order") as raised:
        run(0, cast(Asking, job), "cpu")
    assert "out of order" in str(pickle.loads(pickle.dumps(raised.value)))


def test_a_smoke_run_writes_rows_that_plots_and_findings_read(tmp_path: Path) -> None:
    quality.smoke(tmp_path)
    with (tmp_path / "quality.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["full", "full", "gates", "gates"]
    assert all(row["items"] == "6" and 0 <= float(row["low"]) <= float(row["accuracy"]) <= float(row["high"]) for row in rows)
    again = Table(tmp_path / "quality.csv")
    again.add([])
    assert len(again.rows) == 4
    told = list(findings.found(tmp_path, GATES, GATES, needles=("multi_key",), length=160))
    assert told[0].what.startswith("full attention") and told[0].holds == "no"
    assert not any(math.isnan(line.value) for line in told if "best quarter by gates" in line.what)
    pytest.importorskip("matplotlib").use("Agg")
    plots.plot(tmp_path)
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_demo_finds_its_needle_in_half_of_the_cache_and_not_by_streaming(capsys: pytest.CaptureFixture[str]) -> None:
    whole, heads, streaming = run_demo(items=6, length=512).values()
    assert whole == heads == 1.0 and streaming == 0.0
    assert "KiB a text" in capsys.readouterr().out
