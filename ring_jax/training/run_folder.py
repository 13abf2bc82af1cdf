"""The folder of a run: config.json, metrics.jsonl, loss.png and checkpoints/."""

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from ..checkpoint import write_atomically


class RunFolder:
    """Names the files of a run."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @classmethod
    def new(cls, path: Path | None, model: str) -> Self:
        """Makes the folder of a new run, by default runs/MODEL-DATE-TIME; it may be there already if it is empty.

        Raises:
            ValueError: the path is already used, or nothing can be written there.
        """
        if path is None:
            path = Path("runs", f"{model}-{datetime.now():%Y%m%d-%H%M%S}")
        if path.exists() and not path.is_dir():
            raise ValueError(f"--out {str(path)!r} is a file: give a new folder")
        if path.is_dir() and any(path.iterdir()):
            raise ValueError(
                f"--out {str(path)!r} is already used: give a new folder, or go on with that run by --resume {path}"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out {str(path)!r} cannot be made: {error.strerror}") from error
        if not os.access(path, os.W_OK | os.X_OK):
            raise ValueError(f"--out {str(path)!r} cannot be written: give another folder, or change its permissions")
        return cls(path)

    def read_metrics(self, up_to_step: int) -> list[dict[str, Any]]:
        """The metrics of steps 1 to `up_to_step`; those of later steps, and a line cut short, are left out."""
        if not self.metrics.exists():
            return []
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:  # the machine stopped while this line was written
                continue
            if entry["step"] <= up_to_step:
                kept.append(entry)
        return kept

    def write_metrics(self, entries: list[dict[str, Any]]) -> None:
        """Replaces metrics.jsonl."""
        write_atomically(self.metrics, "".join(json.dumps(entry) + "\n" for entry in entries))
