"""The rooms of the repository import downwards only: masks, then passes, then sparse_compile; tests and bench see all."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "masks": {"sparse_compile.masks", "torch", "matplotlib", *sys.stdlib_module_names},
    "passes": {
        "sparse_compile.masks",
        "sparse_compile.passes",
        "torch",
        "sympy",
        "torch_tensorrt",
        "torchao",
        "triton",
        *sys.stdlib_module_names,
    },
}
PRIVATE = re.compile(r"torch(\.\w+)*\._[a-z]")  # torch._dynamo, torch.cpu._is_avx2_supported; not torch.__version__
PRIVATE_ATTRIBUTES = {"_opoverload", "_schema", "_compiled_call_impl", "_param_name_to_source"}
MAY_TOUCH_PRIVATE = "passes/torch_private.py"
ROOMS = (*MAY_IMPORT, "sparse_compile")
FILES = sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))

each_file = pytest.mark.parametrize("path", FILES, ids=str)


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse((ROOT / path).read_text("utf-8")))


def imports(path: Path) -> Iterator[str]:
    for node in nodes(path):
        match node:
            case ast.Import(aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module, aliases, level):
                yield from (f"{'.' * level}{module or ''}.{alias.name}" for alias in aliases)


def is_within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@each_file
def test_imports_are_absolute(path: Path) -> None:
    assert not [name for name in imports(path) if name.startswith(".")]


@each_file
def test_no_room_imports_upwards(path: Path) -> None:
    if allowed := MAY_IMPORT.get(path.parts[0]):
        assert not [name for name in imports(path) if not is_within(name, allowed)]
    else:
        assert not [name for name in imports(path) if is_within(name, {"bench", "tests", "masks", "passes"})]


@each_file
def test_private_torch_stays_in_one_file(path: Path) -> None:
    attributes = [node for node in nodes(path) if isinstance(node, ast.Attribute)]
    touched = [name for name in {*imports(path), *map(ast.unparse, attributes)} if PRIVATE.match(name)]
    touched += [node.attr for node in attributes if node.attr in PRIVATE_ATTRIBUTES]
    assert not touched or path.as_posix() == MAY_TOUCH_PRIVATE


def folder_of(package: str, mapped: dict[str, str]) -> str:
    """Where setuptools takes a package from: the mapping of its nearest ancestor that has one, and the rest of its name."""
    head, rest = package, ""
    while head and head not in mapped:
        head, _, last = head.rpartition(".")
        rest = f"/{last}{rest}"
    return f"{mapped[head]}{rest}" if head else rest.removeprefix("/")


def test_every_package_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = [folder_of(package, setuptools["package-dir"]) for package in setuptools["packages"]]
    assert sorted(folders) == sorted({path.parent.as_posix() for path in FILES})
