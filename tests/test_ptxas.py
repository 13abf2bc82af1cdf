"""Which ptxas is judged, and how: those that miscompile Mosaic kernels are refused, with the cure, before they run."""

import logging
from pathlib import Path

import pytest

from ring_jax.kernels import Need, Target, choose, ptxas, registry

REPORT = "ptxas: NVIDIA (R) Ptx optimizing assembler\\nCuda compilation tools, release {0}.{1}, V{0}.{1}.{2}"


@pytest.fixture(autouse=True)
def fresh_judgement():
    """Versions are asked for, and defaults chosen, once in a process."""
    for cached in (ptxas.ptxas_version, registry._default):
        cached.cache_clear()
    yield
    registry._default.cache_clear()


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    """Puts a program named ptxas first on PATH, and nothing else there."""

    def install(script: str) -> Path:
        path = tmp_path / "ptxas"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path))
        return path

    return install


def _says(version: tuple[int, int, int]) -> str:
    return f"printf '{REPORT.format(*version)}\\n'"


# 12.8.0 is ptxas 12.8.61; 12.9.0 is 12.9.41; 12.9.1, the first that is right again, is 12.9.86.
@pytest.mark.parametrize("version", [(12, 8, 0), (12, 8, 61), (12, 8, 93), (12, 9, 41), (12, 9, 85)])
def test_one_that_miscompiles_is_refused_with_the_cure(on_path, version):
    path = on_path(_says(version))
    words = ptxas.miscompiling_reason() or ""
    for part in (str(path), ".".join(map(str, version)), "miscompile", "12.9.1 or newer", "pip install", "PATH"):
        assert part in words


@pytest.mark.parametrize("version", [(12, 6, 85), (12, 7, 99), (12, 9, 86), (13, 0, 88), (14, 1, 0)])
def test_older_and_newer_ones_are_not(on_path, version):
    path = on_path(_says(version))
    assert ptxas.ptxas_version(path) == version
    assert ptxas.miscompiling_reason() is None


@pytest.mark.parametrize("script", ["exit 1", "echo no version here", "printf ''"])
def test_one_that_says_no_version_is_not_judged(on_path, script):
    path = on_path(script)
    assert ptxas.ptxas_version(path) is None
    assert ptxas.miscompiling_reason() is None


def test_without_any_there_is_nothing_to_judge(tmp_path, monkeypatch):
    """XLA's own message then names the missing program."""
    monkeypatch.setattr(ptxas, "find_ptxas", lambda: None)
    assert ptxas.miscompiling_reason() is None


def test_the_one_on_path_wins_over_the_wheels(on_path, tmp_path, monkeypatch):
    path = on_path("exit 0")
    assert ptxas.find_ptxas() == path
    path.unlink()
    wheel = tmp_path / "nvidia/cu13/bin/ptxas"
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    monkeypatch.setattr(ptxas.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    system_wide = Path("/usr/local/cuda/bin/ptxas")
    assert ptxas.find_ptxas() == (system_wide if system_wide.exists() else wheel)


def test_the_choice_avoids_one_that_miscompiles(on_path, caplog):
    path = on_path(_says((12, 9, 41)))
    here = Target("gpu", "NVIDIA H100 80GB HBM3", 90)
    with caplog.at_level(logging.WARNING, logger="ring_jax"):
        assert choose(None, Need(here, "bfloat16", 128)) == "triton"
    (warning,) = (r.getMessage() for r in caplog.records)
    assert f"not by implementation 'mosaic_gpu': {path} is ptxas 12.9.41" in warning
    for name in ("mosaic_gpu", "mosaic_gpu_deterministic"):
        with pytest.raises(NotImplementedError, match=rf"{name}' .*12\.9\.41.*pip install.*can: triton, xla"):
            choose(name, Need(here, "bfloat16", 128))


def test_compiling_for_gpus_that_are_not_there_is_not_judged(on_path):
    on_path(_says((12, 9, 41)))
    described = Target("gpu", "NVIDIA H100 80GB HBM3", 90, is_compile_only=True)
    assert choose(None, Need(described, "bfloat16", 128)) == "mosaic_gpu"
