"""The planner's memory is that of a real GPU, within 1 %: on a GPU, as CONTRIBUTING.md says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.memory import MAX_ERROR

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parent.parent.parent
# No settings made for tests; the command's processes take the GPU's memory as a user's would.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}


def test_planned_memory_is_measured_memory(tmp_path):
    command = [sys.executable, "-m", "benchmarks.memory", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("memory-*.json")
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) >= 3
    for row in rows:
        assert row["planned_bytes"] == pytest.approx(row["measured_bytes"], rel=MAX_ERROR), row["pair"]
