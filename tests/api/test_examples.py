"""The examples in README.md and in every docstring run, and print what they show."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import sparse_compile as sc
from sparse_compile import masks

ROOT = Path(__file__).parents[2]


# The CPU build of torch has no Triton, which all files but two in this package import.
IN_TRITON = re.compile(r"sparse_compile\.passes\.kernels\.(?!launch|limits)")
IN_VLLM = re.compile(r"sparse_compile\.vllm\.(loader|masked|selected|split|streaming)$")


def modules() -> list[ModuleType]:
    names = [m.name for m in pkgutil.walk_packages(sc.__path__, "sparse_compile.") if not m.name.endswith("__main__")]
    if find_spec("triton") is None:
        names = [name for name in names if not IN_TRITON.match(name)]
    if find_spec("vllm") is None:
        names = [name for name in names if not IN_VLLM.match(name)]
    return [sc, *(importlib.import_module(name) for name in names)]


def names_of_examples() -> dict[str, Any]:
    """The names that docstring examples may use without an import: the mask language, a tiny model, and tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, pad_token_id=0
    )
    model: Any = LlamaForCausalLM(config)
    model.eval()
    return {
        **{name: getattr(masks, name) for name in masks.__all__},
        "torch": torch,
        "sc": sc,
        "model": model,
        "tokens": torch.arange(1, 9)[None],
    }


@pytest.mark.parametrize("module", modules(), ids=lambda m: m.__name__)
def test_examples_of_docstrings_run(module: ModuleType) -> None:
    torch._dynamo.reset()
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for test in finder.find(module, extraglobs=names_of_examples()):
        with torch.no_grad():
            runner.run(test)
    assert runner.failures == 0


def test_public_names_have_examples() -> None:
    """Every public name of the mask language has an example in its docstring."""
    for name in sc.__all__:
        thing = getattr(sc, name)
        if isinstance(thing, ModuleType):
            continue
        assert thing.__doc__, name
    for name in ("Backend", "Policy", "compile", "explain"):
        assert ">>>" in getattr(sc, name).__doc__, name
    for name in masks.__all__:
        assert getattr(masks, name).__doc__, name


def test_the_readme_runs() -> None:
    torch._dynamo.reset()
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 3
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert names["model"].sparse_compile_report.left == []
    assert names["tokens"].shape == (1, 103)
    assert len(names["backend"].report.sites) == 2
    assert {site.kernel for site in names["backend"].report.sites} == {"FlexAttention"}


def test_the_readme_is_short_and_starts_with_an_example() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 250
    assert "backend=sparse_compile.backend" in "\n".join(lines[:10])


def test_the_readme_draws_what_the_mask_draws() -> None:
    drawing = (masks.causal & (masks.sink(1) | masks.sliding_window(2))).draw(4, 4)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\n".join(f"# {line}" for line in drawing.splitlines()) in text
