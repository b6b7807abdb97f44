"""Optional packages that are missing, too old, newer than tested, or broken are named with the versions that work."""

from __future__ import annotations

import re
import sys
import tomllib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sparse_compile as sc
from sparse_compile.calibration.cli import load
from sparse_compile.demo import build_model
from sparse_compile.explain_config import explain_config
from sparse_compile.masks import causal, sink, sliding_window
from sparse_compile.masks.optional_packages import OPTIONAL, check_installed, needed
from sparse_compile.passes.tensorrt import import_tensorrt
from support.installed import pretend
from support.models import tokens
from support.oracles.cache import llama

ROOT = Path(__file__).parents[2]
STREAMING = causal & (sink(2) | sliding_window(8))

pytestmark = pytest.mark.usefixtures("fresh")

USES: list[tuple[str, str, Callable[[], Any]]] = [
    ("SparseCache", "transformers", lambda: sc.SparseCache(llama().config, max_length=64)),
    ("SparseCache", "transformers", lambda: sc.compile(llama(), inner="eager").sparse_cache(max_length=64)),
    ("explain", "transformers", lambda: explain_config(Path("/no/config"), None, 1, 8, "cpu")),
    ("calibrate", "transformers", lambda: load(Path("/no/model"), "cpu", "float32")),
    ("the demo", "transformers", lambda: build_model(8)),
    ("kv='int8'", "torchao", lambda: sc.SparseCache(llama().config, max_length=64, kv="int8")),
    ("plot", "matplotlib", lambda: causal.plot(4, 4)),
    ("plot", "matplotlib", lambda: sc.Profile([[0.5]]).plot()),
    ("inner='tensorrt'", "torch-tensorrt", import_tensorrt),
]
SAID = {
    "matplotlib": "matplotlib 3.6 or newer",
    "torch-tensorrt": "torch-tensorrt or torch-tensorrt-rtx 2.11 or newer",
    "torchao": "torchao 0.13 or newer",
    "transformers": "transformers 5.17 to 5.23",
}
each_use = pytest.mark.parametrize(("what", "package", "use"), USES, ids=[f"{what}-{package}" for what, package, _ in USES])


@each_use
@pytest.mark.parametrize("found", ["0.9.1", None])
def test_a_package_that_is_too_old_or_missing_is_named_with_its_versions(
    what: str, package: str, use: Callable[[], Any], found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, package, found)
    remedy = f"pip install 'sparse-compile[{OPTIONAL[package].extra}]'"
    with pytest.raises(ImportError, match=re.escape(f"{what} needs {SAID[package]}, found {found or 'none'}: {remedy}")):
        use()


def test_generate_runs_on_with_the_caches_of_an_older_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "transformers", "4.57.1")
    model = sc.compile(llama(), STREAMING, inner="eager")
    model.generate(tokens(batch=1), max_new_tokens=2)
    assert "SparseCache needs transformers 5.17 to 5.23, found 4.57.1" in str(model.sparse_compile_report)


@pytest.mark.parametrize("found", ["5.17", "5.17.0.dev0", "5.20.3", "5.23.9"])
def test_versions_of_the_range_pass_without_a_word(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "transformers", found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_installed("SparseCache", "transformers")


@pytest.mark.parametrize("found", ["5.16.9", "4.57.1", "5"])
def test_versions_before_the_range_do_not(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "transformers", found)
    with pytest.raises(ImportError, match=f"found {found}: pip install"):
        check_installed("SparseCache", "transformers")


def test_a_newer_version_works_and_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "transformers", "6.0.1")
    with pytest.warns(
        UserWarning, match=r"tested with transformers 5.17 to 5.23, and found 6.0.1: if something fails, install"
    ):
        cache = sc.SparseCache(llama().config, max_length=64)
    assert cache.nbytes > 0
    assert sc.SparseCache(llama().config, max_length=64).nbytes == cache.nbytes  # and warns no more, or this would raise


def test_a_package_that_was_not_installed_by_pip_is_used_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout in PYTHONPATH has no version to ask for."""
    pretend(monkeypatch, "transformers", None)
    monkeypatch.setattr("sparse_compile.masks.optional_packages.find_spec", lambda name: object())
    check_installed("SparseCache", "transformers")


def test_a_package_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    pretend(monkeypatch, "torch-tensorrt", "2.13.0")
    with pytest.raises(
        ImportError, match=r"needs torch-tensorrt or .* 2.11 or newer, found 2.13.0, which cannot be imported \(.*halted"
    ):
        import_tensorrt()


@pytest.mark.parametrize("error", ["Exception", "OSError", "AssertionError", "AttributeError", "ImportError"])
def test_whatever_torch_tensorrt_raises_names_both_packages(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It raises a bare Exception without its libraries, and other errors without CUDA or with another torch."""
    (tmp_path / "torch_tensorrt.py").write_text(f"raise {error}('no library')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    pretend(monkeypatch, "torch-tensorrt", "2.13.0")
    remedy = "pip install 'sparse-compile[tensorrt]' or pip install torch-tensorrt-rtx, in the version of torch"
    wanted = f"found 2.13.0, which cannot be imported ({error}: no library): {remedy}"
    with pytest.raises(ImportError, match=re.escape(wanted)):
        import_tensorrt()


@pytest.mark.parametrize(("found", "message"), [("0.0.1", "found torch-tensorrt-rtx 0.0.1: pip"), ("2.13.0", "")])
def test_torch_tensorrt_rtx_will_do_as_well(found: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "torch-tensorrt-rtx", found)
    if not message:
        check_installed("inner='tensorrt'", "torch-tensorrt")
        return
    with pytest.raises(ImportError, match=message):
        check_installed("inner='tensorrt'", "torch-tensorrt")


def test_other_errors_pass_through() -> None:
    with pytest.raises(ValueError, match="mine"), needed("plot", "matplotlib"):
        raise ValueError("mine")


def test_the_versions_are_those_that_pip_installs() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    for package, versions in OPTIONAL.items():
        major, _, minor = versions.newest.partition(".")
        end = f",<{major}.{int(minor) + 1}" if versions.newest else ""
        assert extras[versions.extra] == [f"{package}>={versions.oldest}{end}"]
    assert extras.keys() - {versions.extra for versions in OPTIONAL.values()} == {"dev", "flash"}
