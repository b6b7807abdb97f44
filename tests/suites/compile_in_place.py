"""A pytest plugin for the tests of transformers: their models run compiled, and what they generate equals the plain model's.

``PreTrainedModel.eval`` compiles the model in place, because the tests call it on every model before they run it. With
``--compiled exact``, the caches are those of transformers. With ``--compiled sparse``, ``generate`` makes a ``SparseCache``
wherever it would make a ``DynamicCache``. Every ``generate`` runs twice from the same random state, plain and compiled, and
the tokens have to be equal. The plugin writes what happened in each test to the file of ``--outcomes``, one JSON line each,
and runs only the tests that generate in the file of ``--generating``, if there is one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationMixin, PreTrainedModel

import sparse_compile as sc
from sparse_compile.generation import REPLACED, Generation
from suites.exceptions import reason_against

MODES = ("plain", "exact", "sparse")
# Arguments that a first run of ``generate`` would use up.
USED_UP = ("past_key_values", "streamer", "assistant_model", "custom_generate", "tokenizer")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sparse_compile")
    group.addoption("--compiled", choices=MODES, default="plain", help="how models run")
    group.addoption("--outcomes", type=Path, required=True, help="the file for the outcome of each test")
    group.addoption("--generating", type=Path, help="the outcomes of another run, of which the tests that generate run")


def pytest_configure(config: pytest.Config) -> None:
    mode = config.getoption("--compiled")
    plugin = Compiled(mode, config.getoption("--outcomes"))
    config.pluginmanager.register(plugin, "sparse_compile_in_place")
    if mode != "plain":
        plugin.patch()
    config.add_cleanup(plugin.patches.undo)


class Compiled:
    """Compile models in place in ``mode``, and record per test how many graphs and generations ran."""

    def __init__(self, mode: str, outcomes: Path) -> None:
        self.mode, self.outcomes = mode, outcomes
        self.patches = pytest.MonkeyPatch()
        self.is_comparing = False
        self.forget()

    def forget(self) -> None:
        """Start counting for the next test."""
        self.backends: list[sc.Backend] = []
        self.generations = self.caches = self.equal = 0

    def patch(self) -> None:
        """Replace ``eval`` and ``generate`` of all models, and count the caches that ``generate`` is lent."""
        plain_eval: Any = PreTrainedModel.eval
        plain_generate, supply = GenerationMixin.generate, Generation._supply

        def compiled_eval(model: Any) -> Any:
            plain_eval(model)
            if model._compiled_call_impl is None and not torch.compiler.is_compiling():
                self.compile(model)
            return model

        def compared(model: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(model, "_compiled_call_impl", None) is None or self.is_comparing:
                return plain_generate(model, *args, **kwargs)
            self.generations += 1
            if kwargs.keys() & set(USED_UP):
                return plain_generate(model, *args, **kwargs)
            return self.compare(plain_generate, model, *args, **kwargs)

        def counted(generation: Generation, *args: Any) -> Any:
            cache = supply(generation, *args)
            self.caches += cache is not None
            return cache

        self.patches.setattr(PreTrainedModel, "eval", compiled_eval)
        self.patches.setattr(GenerationMixin, "generate", compared)
        self.patches.setattr(Generation, "_supply", counted)

    def compile(self, model: Any) -> None:
        """Compile a model without a policy, so that its results stay as they are."""
        if self.mode == "exact":
            backend = sc.Backend(inner="eager")
            model.compile(backend=backend)
        else:
            sc.compile(model, inner="eager")
            backend = model._compiled_call_impl.backend
        self.backends.append(backend)

    def compare(self, generate: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Generate with the plain and with the compiled model, and assert that the tokens are equal."""
        state = torch.get_rng_state()
        self.is_comparing = True
        try:
            with uncompiled(model):
                wanted = generate(model, *args, **kwargs)
        finally:
            self.is_comparing = False
        torch.set_rng_state(state)
        got = generate(model, *args, **kwargs)
        assert torch.equal(tokens_of(got), tokens_of(wanted)), "the compiled model generates other tokens"
        self.equal += 1
        return got

    @pytest.hookimpl
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        other = config.getoption("--generating")
        if other is not None:
            lines = map(json.loads, other.read_text("utf-8").splitlines())
            generating = {line["test"] for line in lines if line["generations"]}
            items[:] = [item for item in items if item.nodeid in generating]
        for item in items:
            if self.mode != "plain" and (reason := reason_against(item.name, self.mode)):
                item.add_marker(pytest.mark.skip(reason=f"cannot apply: {reason}"))

    @pytest.hookimpl
    def pytest_runtest_setup(self) -> None:
        torch.compiler.reset()
        self.forget()

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return  # set-up and clean-up
        why = report.longrepr if isinstance(report.longrepr, tuple) else (str(report.longrepr or "")[-600:],)
        graphs = sum(backend.calls for backend in self.backends)
        line = {"test": report.nodeid, "outcome": report.outcome, "graphs": graphs}
        line |= {"generations": self.generations, "caches": self.caches, "equal": self.equal}
        with self.outcomes.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "why": str(why[-1])}) + "\n")


@contextmanager
def uncompiled(model: Any) -> Iterator[None]:
    """Run ``model`` as it was before it was compiled."""
    held = {name: vars(model).pop(name) for name in REPLACED if name in vars(model)}
    run, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        yield
    finally:
        model._compiled_call_impl = run
        vars(model).update(held)


def tokens_of(generated: Any) -> torch.Tensor:
    """The tokens that ``generate`` returned, alone or among other results."""
    tokens: torch.Tensor = generated if isinstance(generated, torch.Tensor) else generated.sequences
    return tokens
