"""The rooms (top-level folders) of the repository: allowed imports, uses of torch's private names, and installed packages."""

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
# The layers of passes/, from the bottom up. A file imports from its own folder and from lower layers only. Folders of one layer
# do not import each other.
LAYERS = (
    {"torch_private"},
    {"storage"},
    {"kernels"},
    {"ops"},
    {"ir"},
    {"read", "lift", "kv", "choose", "calibration"},
    {"lower"},
    {"pieces", "tensorrt"},
    {"inner_compiler"},
    {"pipeline", "graph_options"},
    {"compile_graph"},
)
PRIVATE = re.compile(r"torch(\.\w+)*\._[a-z]")  # torch._dynamo, torch.cpu._is_avx2_supported; not torch.__version__
PRIVATE_ATTRIBUTES = {"_opoverload", "_schema", "_compiled_call_impl", "_param_name_to_source"}
MAY_TOUCH_PRIVATE = "passes/torch_private.py"
MOST_FILES = 16  # in a folder, so that a new reader can survey it
ROOMS = (*MAY_IMPORT, "sparse_compile")
FILES = sorted(path.relative_to(ROOT) for room in ROOMS for path in (ROOT / room).rglob("*.py"))

each_file = pytest.mark.parametrize("path", FILES, ids=str)


def module_of(path: Path) -> str:
    """The name under which a file is imported."""
    parts = path.with_suffix("").parts
    inside = parts if parts[0] == "sparse_compile" else ("sparse_compile", *parts)
    return ".".join(inside).removesuffix(".__init__")


MODULES = {module_of(path): path for path in FILES}


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse((ROOT / path).read_text("utf-8")))


def imports(path: Path) -> Iterator[str]:
    """All names that a file imports, including imports inside functions and under TYPE_CHECKING."""
    for node in nodes(path):
        match node:
            case ast.Import(aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module, aliases, level):
                yield from (f"{'.' * level}{module or ''}.{alias.name}" for alias in aliases)


@cache
def modules_used(path: Path) -> frozenset[str]:
    """The modules of this repository that a file imports. An import from a package counts as importing its ``__init__``."""
    modules = (name if name in MODULES else name.rpartition(".")[0] for name in imports(path))
    return frozenset(name for name in modules if name in MODULES) - {module_of(path)}


def layer_of(path: Path) -> int | None:
    """The layer of a file in passes/; None for its ``__init__.py`` and for files elsewhere."""
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
    layer = layer_of(path)
    for used in (MODULES[name] for name in modules_used(path)):
        used_layer = layer_of(used) if used.parts[0] == "passes" else None
        if layer is not None and used_layer is not None:
            assert used_layer < layer or used.parts[1] == path.parts[1], f"{path} imports {used}"


def test_no_file_imports_itself_in_a_circle() -> None:
    """Lazy imports and imports for types count as well: they hide a circle from Python, but not from a reader."""
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
    """The folder from which setuptools takes a package: that of its nearest mapped ancestor, plus the rest of its name."""
    head, rest = package, ""
    while head and head not in mapped:
        head, _, last = head.rpartition(".")
        rest = f"/{last}{rest}"
    return f"{mapped[head]}{rest}" if head else rest.removeprefix("/")


def test_every_package_is_installed() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    folders = [folder_of(package, setuptools["package-dir"]) for package in setuptools["packages"]]
    assert sorted(folders) == sorted({path.parent.as_posix() for path in FILES})
