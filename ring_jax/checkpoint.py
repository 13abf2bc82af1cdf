"""Checkpoints: a pytree of (sharded) arrays written by orbax, with digests, so that a damaged one is refused.

A folder of checkpoints holds for each step N the orbax folder `N/` and the note `N.json`. The note is written last and
atomically: a step without one was never finished and does not count.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

JsonDict = dict[str, Any]


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of all finished checkpoints in `folder`, in ascending order; none if there is no such folder."""
    return sorted(int(note.stem) for note in folder.glob("*.json") if note.stem.isdecimal())


def save_checkpoint(folder: Path, step: int, state: Any, info: Mapping[str, Any], *, keep: int) -> None:
    """Writes `state` as the checkpoint of `step`, and then removes all but the latest `keep`.

    Args:
        folder: holds the checkpoints of one run; made if need be.
        step: its number; a finished checkpoint that this folder already has of it is left as it is.
        state: a pytree of jax arrays, sharded in any way.
        info: what `restore_checkpoint` compares: whatever must be the same for the state to mean the same. JSON values.
        keep: how many checkpoints stay, at least 1.

    Returns once everything is on disk.
    """
    assert keep >= 1, keep
    if step in checkpoint_steps(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    _remove(folder, step)
    target = folder / str(step)
    with _quiet(), ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(target.absolute(), state)
    note = {"step": step, "info": dict(info), "arrays": _describe(state), "sha256": _digests(target)}
    write_atomically(folder / f"{step}.json", json.dumps(note, indent=1))
    for old in checkpoint_steps(folder)[:-keep]:
        _remove(folder, old)


def read_info(folder: Path, step: int) -> JsonDict:
    """The `info` that the checkpoint of `step` was saved with. Raises ValueError if it is damaged."""
    return _read_note(folder, step)["info"]


def restore_checkpoint(folder: Path, step: int, like: Any, info: Mapping[str, Any]) -> Any:
    """The state of the checkpoint of `step`, placed on devices as `like` says; nothing on disk changes.

    Args:
        folder: as for `save_checkpoint`.
        step: one of `checkpoint_steps(folder)`.
        like: a pytree of `jax.ShapeDtypeStruct` with shardings; the mesh need not be the one it was saved from.
        info: must equal what it was saved with.

    Raises:
        ValueError: the checkpoint is damaged (says which file), or differs from `info` or `like` (says in what).
    """
    note = _read_note(folder, step)
    target = folder / str(step)
    # Another model has other arrays: those are named only where the info does not tell already.
    differences = _differences(note["info"], info) or _differences(note["arrays"], _describe(like))
    if differences:
        shown = "; ".join(differences[:8]) + (f"; and {len(differences) - 8} more" if len(differences) > 8 else "")
        raise ValueError(f"checkpoint {target} does not match: {shown}. Use the options it was made with")
    found = _digests(target) if target.is_dir() else {}
    damaged = sorted(name for name, digest in note["sha256"].items() if found.get(name) != digest)
    if damaged:
        raise ValueError(
            _damaged(folder, step, f"{target / damaged[0]} has changed since it was written or is missing")
        )
    with _quiet(), ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(target.absolute(), like)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file that is either the old one or the new one at any time, whatever interrupts."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _read_note(folder: Path, step: int) -> JsonDict:
    path = folder / f"{step}.json"
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        intact = note["step"] == step and all(isinstance(note[key], dict) for key in ("info", "arrays", "sha256"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(_damaged(folder, step, f"{path} cannot be read")) from error
    if not intact:
        raise ValueError(_damaged(folder, step, f"{path} is not the note of step {step}"))
    return note


def _damaged(folder: Path, step: int, why: str) -> str:
    others = [other for other in checkpoint_steps(folder) if other != step]
    cure = (
        f"to go on from step {others[-1]} instead, move {folder / str(step)}.json away"
        if others
        else "there is no other checkpoint in this folder"
    )
    return f"checkpoint {folder / str(step)} is damaged: {why}; {cure}"


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} is {saved.get(name)!r} in the checkpoint and {wanted.get(name)!r} here"
        for name in sorted(saved.keys() | wanted.keys())
        if saved.get(name) != wanted.get(name)
    ]


def _remove(folder: Path, step: int) -> None:
    (folder / f"{step}.json").unlink(missing_ok=True)
    if (folder / str(step)).exists():
        shutil.rmtree(folder / str(step))


def _describe(state: Any) -> dict[str, str]:
    leaves, _ = jax.tree.flatten_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    }


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax's own log lines, meant for its developers, out of the user's terminal."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
