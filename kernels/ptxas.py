"""The ptxas that XLA will run: some of its versions miscompile Mosaic GPU kernels."""

import functools
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

# CUDA 12.8.0 to 12.9.0 miscompile a causal Mosaic kernel; jax guards its own attention kernels against them.
FIRST_MISCOMPILING = (12, 8, 0)
FIRST_REPAIRED = (12, 9, 86)


def miscompiling_reason() -> str | None:
    """Why this machine's ptxas must not compile Mosaic GPU kernels, with the cure; None if it may."""
    path = find_ptxas()
    version = None if path is None else ptxas_version(path)
    if version is None or not FIRST_MISCOMPILING <= version < FIRST_REPAIRED:
        return None
    text = ".".join(map(str, version))
    return (
        f"{path} is ptxas {text}, and those from CUDA 12.8.0 to 12.9.0 miscompile it: install CUDA 12.9.1 or newer "
        "(pip install -U 'ring-jax[cuda13]'), or take it off PATH"
    )


def find_ptxas() -> Path | None:
    """The ptxas that XLA finds first: on PATH, in /usr/local/cuda, or in the installed CUDA wheels."""
    on_path = shutil.which("ptxas")
    if on_path:
        return Path(on_path)
    wheels = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    candidates = (Path("/usr/local/cuda/bin/ptxas"), wheels / "cu13/bin/ptxas", wheels / "cuda_nvcc/bin/ptxas")
    return next((path for path in candidates if path.exists()), None)


@functools.cache
def ptxas_version(path: Path) -> tuple[int, int, int] | None:
    """Its version, such as (12, 9, 86); None if it does not say one."""
    try:
        output = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"V(\d+)\.(\d+)\.(\d+)", output)
    return (int(match[1]), int(match[2]), int(match[3])) if match else None
