"""Check the plugin of ``make suites`` on a model of our own: what it counts, and that it notices other tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

import sparse_compile as sc
from sparse_compile.masks import causal, sliding_window
from suites.__main__ import ended
from suites.compile_in_place import Compiled
from suites.exceptions import reason_against
from support.generating import llama, new_tokens, prompt

pytestmark = pytest.mark.usefixtures("fresh")


@pytest.fixture(params=["exact", "sparse"])
def plugin(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Compiled]:
    made = Compiled(request.param, tmp_path / "outcomes")
    made.patch()
    yield made
    made.patches.undo()


def test_a_model_of_a_test_runs_compiled_and_its_tokens_are_compared(plugin: Compiled) -> None:
    new_tokens(llama(), prompt(20), count=4)
    assert [backend.calls > 0 for backend in plugin.backends] == [True]
    assert (plugin.generations, plugin.equal) == (1, 1)
    assert plugin.caches == (plugin.mode == "sparse")


def test_other_tokens_are_noticed(plugin: Compiled, monkeypatch: pytest.MonkeyPatch) -> None:
    lossy = causal & sliding_window(2)
    monkeypatch.setattr(sc, "compile", functools.partial(sc.compile, policy=lossy))
    monkeypatch.setattr(sc, "Backend", functools.partial(sc.Backend, lossy))
    with pytest.raises(AssertionError, match="the compiled model generates other tokens"):
        new_tokens(llama(), prompt(20), count=8)


def test_a_test_fails_if_one_of_its_subtests_fails() -> None:
    assert ended([{"outcome": "passed"}, {"outcome": "failed"}, {"outcome": "skipped"}]) == "failed"
    assert ended([{"outcome": "skipped"}, {"outcome": "passed"}]) == "passed"


def test_a_test_that_cannot_apply_has_a_reason() -> None:
    assert reason_against("test_generate_compile_model_forward_fullgraph", "exact").startswith(
        "it compiles the model by itself"
    )
    assert reason_against("test_greedy_generate", "sparse") == ""
