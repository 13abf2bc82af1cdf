"""Registers, spills and shared memory of every Triton kernel variant in the tile tables, from ptxas. Needs no GPU.

python -m benchmarks.registers --compute-capability 80 90 --dtype bfloat16 float32
"""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import tyro

from ring_jax.kernels import triton_gpu
from ring_jax.kernels.contract import AttentionState, BlockMask

# Shared memory that one block may use, in bytes, by compute capability (CUDA C++ Programming Guide, table of technical
# specifications).
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
_HEAD_DIMS = (64, 96, 128, 256)


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile."""

    compute_capability: tuple[int, ...] = (80, 90)
    dtype: tuple[Literal["bfloat16", "float16", "float32"], ...] = ("bfloat16",)
    head_dim: tuple[int, ...] = _HEAD_DIMS
    documents: tuple[bool, ...] = (False, True)
    """Without and with segment ids."""


@dataclasses.dataclass(frozen=True)
class Usage:
    """What ptxas reports of one kernel; spills and shared memory in bytes."""

    kernel: str
    registers: int
    spills: int
    shared: int


def kernel_usage(compute_capability: int, dtype: str, head_dim: int, has_segments: bool) -> list[Usage]:
    """Compiles the three kernels of a causal GQA block with the tiles of the table.

    jax-triton writes the kernels' PTX into the folder that `JAX_TRITON_DUMP_DIR` named when it was first imported.
    """
    folder = Path(os.environ["JAX_TRITON_DUMP_DIR"])
    q = jax.ShapeDtypeStruct((2, 1024, 4, head_dim), dtype)
    k = jax.ShapeDtypeStruct((2, 1024, 2, head_dim), dtype)
    output, statistics = jax.ShapeDtypeStruct(q.shape, jnp.float32), jax.ShapeDtypeStruct((2, 4, 1024), jnp.float32)
    positions = jax.ShapeDtypeStruct((1024,), jnp.int32)
    segment_ids = jax.ShapeDtypeStruct((2, 1024), jnp.int32) if has_segments else None
    mask = BlockMask(positions, positions, segment_ids, segment_ids, is_causal=True)  # pyright: ignore[reportArgumentType]

    def block(q, k, state, statistics, mask):
        with triton_gpu.target(compute_capability):
            forward = triton_gpu.forward(q, k, k, state, mask, scale=0.1)
            backward = triton_gpu.backward(q, k, k, q, statistics, statistics, state.output, mask, scale=0.1)
        return forward, backward

    state = AttentionState(output, statistics)  # pyright: ignore[reportArgumentType]
    jax.jit(block).trace(q, k, state, statistics, mask).lower(lowering_platforms=("cuda",))
    usage = [_usage(path, compute_capability) for path in sorted(folder.glob("*/*.ptx"))]
    for entry in folder.iterdir():
        shutil.rmtree(entry)
    return usage


def _usage(ptx: Path, compute_capability: int) -> Usage:
    arch = f"sm_{compute_capability}" + "a" * (compute_capability >= 90)
    command = [ptxas(), "-v", f"--gpu-name={arch}", str(ptx), "-o", os.devnull]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    shared = ptx.with_suffix(".compile_info").read_text()
    return Usage(
        ptx.stem,
        _number(r"Used (\d+) registers", log),
        _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
        _number(r"shared_mem_bytes: (\d+)", shared),
    )


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match, f"no {pattern!r} in:\n{text}"
    return int(match[1])


def ptxas() -> str:
    """The ptxas to ask: one on PATH, which XLA prefers too, else the one of the CUDA wheels.

    Raises FileNotFoundError if there is none.
    """
    found = shutil.which("ptxas")
    wheels = [path for entry in sys.path for path in Path(entry).glob("nvidia/*/bin/ptxas")]
    if found is None and not wheels:
        raise FileNotFoundError("there is no ptxas: pip install 'ring-jax[cuda13]' brings one")
    return found or str(wheels[0])


def main(options: Options) -> int:
    """Prints the table; the exit status is the number of variants that spill or need too much shared memory."""
    bad = 0
    print(f"{'variant':44} {'kernel':16} {'registers':>9} {'spills':>7} {'shared':>8}   bytes; {ptxas()}")
    for capability in options.compute_capability:
        for dtype in options.dtype:
            for head_dim in options.head_dim:
                for has_segments in options.documents:
                    variant = f"sm_{capability} {dtype} H={head_dim} causal GQA" + " documents" * has_segments
                    for use in kernel_usage(capability, dtype, head_dim, has_segments):
                        fits = not use.spills and use.shared <= SHARED_MEMORY[capability]
                        bad += not fits
                        print(
                            f"{variant:44} {use.kernel:16} {use.registers:9} {use.spills:7} {use.shared:8}"
                            + ("" if fits else "   !"),
                            flush=True,
                        )
    return bad


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as dump:
        os.environ["JAX_TRITON_DUMP_DIR"] = dump
        sys.exit(main(tyro.cli(Options)))
