"""The loops of Mosaic kernels in machine code: how long they are, and where they wait. Needs no GPU.

    python -m benchmarks.machine_code --head-dim 64 128

ptxas orders a kernel's instructions as it likes. A wait for a copy that it has moved up stands in the way of arithmetic
that it was meant to hide under, and no report but the code itself tells (`benchmarks/LOG.md` has what that costs).
"""

import dataclasses
import itertools
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import jax
import tyro

from . import registers


@dataclasses.dataclass(frozen=True)
class Loop:
    """Instructions of an innermost loop that multiplies matrices."""

    instructions: int
    products: int
    exponentials: int
    waits: tuple[int, ...]
    """Before each wait for a barrier, how many of the exponentials."""


def loops(ptx: str) -> list[Loop]:
    """The innermost loops with products of a kernel, in the order of its code."""
    lines = disassembled(ptx).splitlines()
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"\s*(\.L_\w+):", line))}
    jumps = (
        (labels.get(match[1]), i) for i, line in enumerate(lines) if (match := re.search(r"BRA.*`\((\S+)\)", line))
    )
    spans = [(start, end) for start, end in jumps if start is not None and start < end]
    spans = [span for span in spans if any("HGMMA" in line for line in lines[slice(*span)])]

    def is_innermost(start: int, end: int) -> bool:
        """Contains the end of no other loop. A wait's retry, which ptxas puts behind the loops, jumps back: no loop."""
        return not any(other_end < end and other_end > start for _, other_end in spans)

    return [_loop(lines[start : end + 1]) for start, end in spans if is_innermost(start, end)]


def _loop(lines: list[str]) -> Loop:
    def places(*words: str) -> list[int]:
        return [i for i, line in enumerate(lines) if all(word in line for word in words)]

    exponentials = places("MUFU.EX2")
    waits = tuple(sum(place < wait for place in exponentials) for wait in places("SYNCS", "TRYWAIT"))
    return Loop(len(places(";")), len(places("HGMMA")), len(exponentials), waits)


def disassembled(ptx: str) -> str:
    """What ptxas makes of a Hopper kernel, as text."""
    with tempfile.TemporaryDirectory() as folder:
        source, code = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(ptx)
        _said_by(registers.ptxas(), "--gpu-name=sm_90a", source, "-o", code)
        return _said_by(nvdisasm(), "-c", code)


def _said_by(*command: Path | str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed: {done.stderr}")
    return done.stdout


def nvdisasm() -> Path:
    """The disassembler on PATH, or the one that Triton brings. Raises FileNotFoundError if there is none."""
    of_triton = Path(sysconfig.get_paths()["purelib"]) / "triton/backends/nvidia/bin/nvdisasm"
    found = shutil.which("nvdisasm") or (of_triton if of_triton.exists() else None)
    if found is None:
        raise FileNotFoundError("there is no nvdisasm: pip install 'ring-jax[cuda13]' brings one")
    return Path(found)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile: causal blocks for an H100, in bfloat16."""

    head_dim: tuple[int, ...] = (64, 128)
    documents: tuple[bool, ...] = (False,)
    """Without or with segment ids."""


def main(options: Options) -> None:
    """Prints a line for each loop."""
    print(f"{'variant':44} {'kernel':10} {'instructions':>12} {'products':>8}   exponentials before each wait, of all")
    for head_dim, documents in itertools.product(options.head_dim, options.documents):
        variant = registers.Variant("mosaic_gpu", 90, "bfloat16", head_dim, documents)
        for use in registers.usage(variant):
            for loop in loops(use.ptx):
                cells = f"{variant!s:44} {use.kernel:10} {loop.instructions:12} {loop.products:8}"
                print(f"{cells}   {', '.join(map(str, loop.waits))} of {loop.exponentials}", flush=True)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main(tyro.cli(Options)))
