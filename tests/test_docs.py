"""What the README and its companions say is so: code runs, links and pictures exist, commands and names are real."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import ring_jax

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
README = (ROOT / "README.md").read_text()
EVERY_PAGE = {page: (ROOT / page).read_text() for page in PAGES}


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def _run(*arguments: str, cwd: Path) -> str:
    """What a newcomer's Python prints: no test settings in the environment, and warnings are errors."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "error", *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_quickstart_has_ten_lines_and_is_exact(tmp_path):
    quickstart = _blocks(README, "python")[0]
    assert len(quickstart.strip().splitlines()) <= 10
    assert float(_run("-c", quickstart, cwd=tmp_path)) < 1e-5


@pytest.mark.parametrize("block", _blocks(README, "python")[1:], ids=lambda block: block.strip().splitlines()[-1][:40])
def test_the_other_code_of_the_readme_runs(block, tmp_path):
    assert _run("-c", block, cwd=tmp_path)


@pytest.mark.parametrize("example", ["quickstart.py", "flax_attention_fn.py"])
def test_the_examples_agree_with_dense_attention(example, tmp_path):
    differences = re.findall(r"at most (\S+)", _run(str(ROOT / "examples" / example), cwd=tmp_path))
    assert differences
    assert all(float(difference) < 1e-4 for difference in differences)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page):
    text = EVERY_PAGE[page]
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    anchors = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors, f"{page} has no section {target}"
        elif not target.startswith("https://"):
            assert (ROOT / target).is_file(), f"{page} points to {target}, which does not exist"


def test_the_pictures_are_those_that_the_script_draws(tmp_path):
    _run(str(ROOT / "docs" / "draw.py"), str(tmp_path), cwd=tmp_path)
    drawn = {path.name for path in tmp_path.glob("*.svg")}
    assert drawn == {path.name for path in (ROOT / "docs").glob("*.svg")}
    assert {f"docs/{name}" for name in drawn} == set(re.findall(r'(?:src|srcset)="([^"]+)"', README))


def _commands(text: str) -> list[str]:
    in_blocks = [line for block in _blocks(text, "bash") for line in block.splitlines()]
    inline = re.findall(r"`((?:[A-Z_]+=\S+ )*(?:make|python -m) [^`]+)`", text)
    return [command.split("#")[0].strip() for command in in_blocks + inline]


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    used = {match[1] for command in _commands(EVERY_PAGE[page]) if (match := re.search(r"\bmake ([a-z]+)", command))}
    assert used <= targets
    if page != "CHANGELOG.md":
        assert {"train", "test"} & used


@pytest.mark.parametrize("page", PAGES)
def test_the_trainer_knows_every_flag(page, tmp_path):
    flags = {
        flag
        for command in _commands(EVERY_PAGE[page])
        if command.startswith("make train") or "-m ring_jax.train" in command
        for flag in re.findall(r"--[a-z-]+", command)
    }
    if flags:
        known = set(re.findall(r"--[a-z-]+", _run("-m", "ring_jax.train", "--help", cwd=tmp_path)))
        assert flags <= known


@pytest.mark.parametrize("names", [ring_jax.LAYOUTS, ring_jax.STRATEGIES, ring_jax.IMPLEMENTATIONS])
def test_every_choice_is_in_the_readme(names):
    missing = [name for name in names if f"`{name}`" not in README]
    assert not missing


def _mesh(num_devices: int = 4, axis: str = "seq") -> jax.sharding.Mesh:
    return jax.make_mesh((num_devices,), (axis,), devices=jax.devices()[:num_devices])


MISTAKES = {
    "no mesh": lambda x: ring_jax.ring_attention(x, x, x),
    "no sequence axis": lambda x: ring_jax.ring_attention(x, x, x, mesh=_mesh(axis="context")),
    "length": lambda x: ring_jax.ring_attention(x, x, x, mesh=_mesh(), layout="zigzag"),
    "ids": lambda x: ring_jax.ring_attention(x, x, x, mesh=_mesh(), segment_ids=jnp.ones(x.shape[:2], jnp.uint8)),
    "devices": lambda x: jax.make_mesh((4,), ("seq",), devices=jax.devices()[:1]),
}


EXPLAINED = re.findall(r"^\| `([^`]+)` \|", README.split("## When something goes wrong")[1], flags=re.MULTILINE)


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_the_readme_explains_the_message_of(mistake):
    with pytest.raises(ValueError, match="|".join(map(re.escape, EXPLAINED))):
        mistake(jnp.ones((1, 12, 4, 8)))
