"""Pretend that another version of an optional package is installed."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from typing import Any

import pytest

from sparse_compile.masks import optional_packages


def pretend(monkeypatch: pytest.MonkeyPatch, package: str, found: str | None) -> None:
    """Let ``package`` have version ``found``, or not be installed at all if that is None. All others stay as they are."""

    def version(name: str) -> str:
        if name == package and found is None:
            raise metadata.PackageNotFoundError(name)
        return found if name == package and found is not None else metadata.version(name)

    def spec(name: str) -> Any:
        return None if name == package.replace("-", "_") and found is None else find_spec(name)

    monkeypatch.setattr(optional_packages, "version", version)
    monkeypatch.setattr(optional_packages, "find_spec", spec)
    optional_packages._warn_of_newer.cache_clear()
