"""The rooms of the repository: who may import whom, where torch's private names may stand, and what gets installed."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
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
# The layers of passes/, from the bottom up. A file imports its own folder and the layers below; neighbours do not meet.
LAYERS = (
    {"torch_private"},
    {"storage"},
    {"kernels"},
    {"ops"},
    {"ir"},
    {"read", "lift", "kv", "choose", "calibration"},
    {"lower"},
    {"pipeline", "inner_compiler"},
)
PRIVATE = re.compile(r"torch(\.\w+)*\._[a-z]")  # torch._dynamo, torch.cpu._is_avx2_supported; not torch.__version__
PRIVATE_ATTRIBUTES = {"_opoverload", "_schema", "_compiled_call_impl", "_param_name_to_source"}
MAY_TOUCH_PRIVATE = "passes/torch_private.py"
MOST_FILES = 17  # in a folder, so that a stranger can survey it
ROOMS = (*MAY_IMPORT, "sparse_compile")
FILES = sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))

each_file = pytest.mark.parametrize("path", FILES, ids=str)


def module_of(path: Path) -> str:
    """The name a file is imported by."""
    parts = path.with_suffix("").parts
    inside = parts if parts[0] == "sparse_compile" else ("sparse_compile", *parts)
    return ".".join(inside).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse((ROOT / path).read_text("utf-8")))


def imports(path: Path) -> Iterator[str]:
    """Everything that a file imports, also inside functions and under TYPE_CHECKING."""
    for node in nodes(path):
        match node:
            case ast.Import(aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module, aliases, level):
                yield from (f"{'.' * level}{module or ''}.{alias.name}" for alias in aliases)


@cache
def modules_used(path: Path) -> frozenset[str]:
    """The modules of ours that a file imports; importing from a package counts as importing its ``__init__``."""
    found = (name if name in MODULES else name.rpartition(".")[0] for name in imports(path))
    return frozenset(name for name in found if name in MODULES) - {module_of(path)}


def layer_of(path: Path) -> int | None:
    """The layer of a file of passes/; None elsewhere and for the file that names the package."""
    name = path.with_suffix("").parts[1]
    if path.parts[0] != "passes" or name == "__init__":
        return None
    return next(number for number, layer in enumerate(LAYERS) if name in layer)


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


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "passes"], ids=str)
def test_no_layer_of_passes_imports_upwards(path: Path) -> None:
    mine = layer_of(path)
    for used in (MODULES[name] for name in modules_used(path)):
        theirs = layer_of(used) if used.parts[0] == "passes" else None
        if mine is not None and theirs is not None:
            assert theirs < mine or used.parts[1] == path.parts[1], f"{path} imports {used}"


def test_no_file_imports_itself_in_a_circle() -> None:
    """Lazy imports and those for types alone count: they hide a circle from Python, not from a reader."""
    graph = {name: modules_used(path) for name, path in MODULES.items() if path.name != "__init__.py"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


@each_file
def test_private_torch_stays_in_one_file(path: Path) -> None:
    attributes = [node for node in nodes(path) if isinstance(node, ast.Attribute)]
    touched = [name for name in {*imports(path), *map(ast.unparse, attributes)} if PRIVATE.match(name)]
    touched += [node.attr for node in attributes if node.attr in PRIVATE_ATTRIBUTES]
    assert not touched or path.as_posix() == MAY_TOUCH_PRIVATE


def test_no_folder_holds_more_than_a_stranger_can_survey() -> None:
    folders = {path.parent for room in (*ROOMS, "tests", "bench") for path in (ROOT / room).rglob("*.py")}
    sizes = {folder.relative_to(ROOT).as_posix(): len(list(folder.glob("*.py"))) for folder in folders}
    assert not {name: size for name, size in sizes.items() if size > MOST_FILES}


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
