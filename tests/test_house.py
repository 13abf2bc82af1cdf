"""The rules of the house that a machine can check: lint, types, docstrings, lengths, and which way imports go."""

import ast
import graphlib
import importlib.util
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import ring_jax

ROOT = Path(__file__).parent.parent
FOLDERS = ("ring_jax", "kernels", "tests", "examples", "benchmarks", "docs")
MAX_LINES = 500

SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PACKAGE = sorted(path for folder in ("ring_jax", "kernels") for path in (ROOT / folder).rglob("*.py"))
TEXTS = sorted({*SOURCES, *ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / "Makefile", ROOT / ".ci" / "run"})
PUBLIC = sorted(
    name for name in vars(ring_jax) if not name.startswith("_") and not inspect.ismodule(vars(ring_jax)[name])
)


def _must_pass(*command: str) -> None:
    environment = os.environ | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_finds_nothing():
    _must_pass("ruff", "check")


def test_the_code_is_formatted():
    _must_pass("ruff", "format", "--check")


def test_pyright_finds_nothing():
    _must_pass("pyright")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_can_be_read_in_one_go(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MAX_LINES, f"{path.name} has {lines} lines: split it by what it does"


def test_no_path_of_somebodys_home():
    home = re.compile(r"(?<![\w.])/(?:home|root|Users)/\w")
    found = [f"{path.relative_to(ROOT)}: {match}" for path in TEXTS for match in home.findall(path.read_text())]
    assert not found


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_is_documented(name):
    thing = vars(ring_jax)[name]
    if isinstance(thing, tuple):
        return  # a list of names, explained where it is chosen from
    doc = inspect.getdoc(thing) or ""
    assert doc, f"ring_jax.{name} has no docstring"
    assert not doc.startswith(f"{name}("), f"ring_jax.{name} has only the signature that dataclasses write"
    if inspect.isfunction(thing):
        _assert_parameters_named(thing, doc)


def _assert_parameters_named(function, doc: str) -> None:
    missing = [name for name in inspect.signature(function).parameters if not re.search(rf"\b{name}\b", doc)]
    assert not missing, f"the docstring of {function.__name__} does not say what these are: {missing}"


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path.name} has no docstring"


def _imports(path: Path, module: str, modules: set[str]) -> set[str]:
    """The modules of ring_jax that the file of `module` imports when it is imported itself."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    imported: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            submodules = {f"{base}.{alias.name}" for alias in node.names} & modules
            imported |= submodules or {base}
    return (imported & modules) - {module}


def _import_graph() -> dict[str, set[str]]:
    found = pkgutil.walk_packages(ring_jax.__path__, "ring_jax.", onerror=lambda name: None)
    paths = {}
    for info in found:
        path = ROOT.joinpath(*info.name.split("."))
        paths[info.name] = path / "__init__.py" if info.ispkg else path.with_suffix(".py")
    return {name: _imports(path, name, set(paths)) for name, path in paths.items()}


def test_imports_go_one_way():
    graph = _import_graph()
    assert "ring_jax.kernels.contract" in graph["ring_jax.kernels.tiles"]
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules of the cycle


def test_the_lowest_rooms_import_nothing_above_them():
    graph = _import_graph()
    for name, imported in graph.items():
        if name.startswith("ring_jax.kernels"):
            assert all(other.startswith("ring_jax.kernels") for other in imported), f"{name} imports {imported}"
    assert not graph["ring_jax.layouts"]
