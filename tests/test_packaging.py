"""The package is found whole however it is used: from a wheel, installed editable, from a bare checkout, by pyright."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What the make that runs these tests was given is not meant for the makes that they run.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in {"ARGS", "CUDA_EXTRA", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "PYTHON"}
}


def _run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """The standard output of a command that must succeed."""
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, cwd=cwd, env=ENVIRONMENT | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _write_command(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources, so that building leaves nothing behind in the real ones."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, copy / name)
    ignored = shutil.ignore_patterns("__pycache__")
    for name in ("ring_jax", "kernels", ".ci"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    """The wheel that `python -m build` makes from the source distribution that it makes from a checkout."""
    out = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=checkout)
    assert len(list(out.glob("*.tar.gz"))) == 1
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def from_wheel(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


@pytest.fixture(scope="module")
def from_editable(checkout, tmp_path_factory) -> Path:
    """The path entry that an editable install adds. An import hook in its place would be invisible to pyright."""
    out = tmp_path_factory.mktemp("editable")
    build = "import sys, setuptools.build_meta as backend; backend.build_editable(sys.argv[1])"
    _run(sys.executable, "-c", build, out, cwd=checkout)
    (path,) = out.glob("*.whl")
    archive = zipfile.ZipFile(path)
    (name,) = (name for name in archive.namelist() if name.endswith(".pth"))
    entry = Path(archive.read(name).decode().strip())
    assert entry == checkout
    return entry


@pytest.fixture(params=["wheel", "editable", "checkout"])
def path_entry(request) -> Path:
    """A folder that, put on the import path, is ring_jax as a wheel, as an editable install, or as bare sources."""
    fixtures = {"wheel": "from_wheel", "editable": "from_editable", "checkout": "checkout"}
    return request.getfixturevalue(fixtures[request.param])


@pytest.fixture
def fresh(checkout, tmp_path) -> Path:
    """A checkout nobody has run anything in yet."""
    return shutil.copytree(checkout, tmp_path / "fresh", symlinks=True)


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel, checkout):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"ring_jax", "ring_jax-0.1.0.dist-info"}
    walk = os.walk(checkout / "ring_jax", followlinks=True)
    expected = {str(Path(folder, file).relative_to(checkout)) for folder, _, files in walk for file in files}
    assert {"ring_jax/kernels/contract.py", "ring_jax/layouts.py", "ring_jax/py.typed"} <= expected
    assert {name for name in names if name.startswith("ring_jax/")} == expected
    assert "ring_jax-0.1.0.dist-info/licenses/LICENSE" in names


def test_the_kernels_are_one_relative_symlink_away():
    link = ROOT / "ring_jax" / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")


def test_python_imports_the_kernels(path_entry, tmp_path):
    program = (
        "import sys, ring_jax, ring_jax.kernels.xla as xla, ring_jax.kernels.contract\n"
        "print(ring_jax.__file__, xla.__file__, 'kernels' in sys.modules, sep='\\n')\n"
    )
    out = _run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=str(path_entry), JAX_PLATFORMS="cpu")
    package, module, is_top_level = out.splitlines()
    assert Path(package) == path_entry / "ring_jax" / "__init__.py"
    assert Path(module) == path_entry / "ring_jax" / "kernels" / "xla.py"
    assert is_top_level == "False"


def test_pyright_resolves_the_kernels(path_entry, tmp_path):
    (tmp_path / "user.py").write_text(
        "import ring_jax.no_such_module\nfrom ring_jax.kernels.contract import BlockMask\nBlockMask.no_such_attribute\n"
    )
    config = {"include": ["user.py"], "extraPaths": [str(path_entry)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable]
    environment = ENVIRONMENT | {"PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = {
        (item["range"]["start"]["line"], item["rule"])
        for item in json.loads(done.stdout)["generalDiagnostics"]
        if item["severity"] == "error"
    }
    # A missing module is an error, so none for line 1 means found; the error for line 2 proves that the class is known.
    assert found == {(0, "reportMissingImports"), (2, "reportAttributeAccessIssue")}


def test_an_installed_distribution_named_kernels_wins(from_editable, tmp_path):
    """Another project owns that import name: an editable install must not take its place."""
    other = tmp_path / "site" / "kernels"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("owner = 'somebody else'\n")
    # Path entries of .pth files come after the folder of the installed packages.
    path = os.pathsep.join([str(other.parent), str(from_editable)])
    program = "import kernels, ring_jax.kernels; print(kernels.owner)"
    out = _run(sys.executable, "-c", program, cwd=tmp_path, PYTHONPATH=path, JAX_PLATFORMS="cpu")
    assert out == "somebody else\n"


def test_one_command_sets_up_and_tests_another_sets_up_and_trains(fresh):
    test = _run("make", "--dry-run", "test", cwd=fresh)
    assert test.index("-m venv") < test.index("pip install --editable") < test.index("-m pytest")
    train = _run("make", "--dry-run", "train", cwd=fresh)
    assert train.index("-m venv") < train.index("pip install --editable") < train.index("-m ring_jax.train")
    assert "[dev," in test
    assert "[dev," not in train


def test_installs_again_only_when_the_project_file_changes(fresh):
    (fresh / ".venv" / "bin").mkdir(parents=True)
    (fresh / ".venv" / "bin" / "pip").touch()
    assert "pip install" in _run("make", "--dry-run", "test", cwd=fresh)
    stamp = fresh / ".venv" / "test.stamp"
    stamp.touch()
    assert "pip install" not in _run("make", "--dry-run", "test", cwd=fresh)
    later = stamp.stat().st_mtime + 1
    os.utime(fresh / "pyproject.toml", (later, later))
    assert "pip install" in _run("make", "--dry-run", "test", cwd=fresh)


@pytest.mark.parametrize(("driver", "extra"), [("580.65.06", "cuda13"), ("570.172.08", "cuda12")])
def test_training_takes_the_gpu_wheels_that_the_driver_can_run(fresh, driver, extra):
    _write_command(fresh / "tools" / "nvidia-smi", f"echo {driver}; echo {driver}")
    path = f"{fresh / 'tools'}{os.pathsep}{os.environ['PATH']}"
    assert f'pip install --editable ".[{extra}]"' in _run("make", "--dry-run", "train", cwd=fresh, PATH=path)


def test_ci_runs_the_test_command_and_nothing_else(fresh, tmp_path):
    _write_command(fresh / "tools" / "make", 'echo "$PWD: make $*"')
    path = f"{fresh / 'tools'}{os.pathsep}{os.environ['PATH']}"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert _run("bash", fresh / ".ci" / "run", cwd=tmp_path, PATH=path) == f"{fresh}: make test\n"


def test_without_a_new_enough_python_the_message_says_what_to_do(fresh):
    _write_command(fresh / "tools" / "python3", "exit 1")
    environment = ENVIRONMENT | {"PATH": f"{fresh / 'tools'}{os.pathsep}{os.environ['PATH']}"}
    command = ["make", "train", "PYTHON=python3"]
    done = subprocess.run(command, cwd=fresh, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "make PYTHON=/path/to/python3.12" in done.stderr
    assert not (fresh / ".venv").exists()
