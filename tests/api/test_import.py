"""Importing sparse_compile adds little to the import of torch, and imports no optional dependency."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sparse_compile

ROOT = Path(__file__).parents[2]

OPTIONAL = {"flash_attn", "huggingface_hub", "matplotlib", "scipy", "tokenizers", "torch_tensorrt", "torchao", "transformers"}
SCRIPT = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()  # processor time: the tests beside this one do not count
import sparse_compile
seconds = time.process_time() - start
print(json.dumps([seconds, sorted(set(sys.modules) - before)]))
"""


def import_once() -> tuple[float, set[str]]:
    """Return the seconds and modules that ``import sparse_compile`` adds to ``import torch``, in a new process."""
    out = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], check=True, capture_output=True, text=True).stdout
    seconds, modules = json.loads(out)
    return seconds, {module.split(".")[0] for module in modules}


@pytest.fixture(scope="module")
def runs() -> list[tuple[float, set[str]]]:
    return [import_once() for _ in range(3)]


def test_import_takes_under_a_second(runs: list[tuple[float, set[str]]]) -> None:
    assert min(seconds for seconds, _ in runs) < 1


def test_import_brings_torch_alone(runs: list[tuple[float, set[str]]]) -> None:
    assert not OPTIONAL & runs[0][1]


def test_dir_lists_what_users_call_and_nothing_else() -> None:
    public = [name for name in dir(sparse_compile) if not name.startswith("_")]
    assert public == sorted(sparse_compile.__all__)
    assert {"SparseCache", "SparseCacheError"} <= set(public)
    assert all(hasattr(sparse_compile, name) for name in dir(sparse_compile))


def test_the_version_stands_in_one_place() -> None:
    """The wheel's test compares it with that of the installed package."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert settings["project"]["dynamic"] == ["version"]
    assert settings["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "sparse_compile.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", sparse_compile.__version__)
