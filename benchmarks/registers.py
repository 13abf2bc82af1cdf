"""Registers, spills and shared memory of every GPU kernel variant, as ptxas reports them. Needs no GPU.

    python -m benchmarks.registers --compute-capability 80 90 --dtype bfloat16 float32

The Triton kernels are compiled with the tiles of the tables, the Mosaic ones (Hopper only) as the implementations call
them: `backward` is that of `mosaic_gpu` up to head dim 128, `dkv` and `dq` that of `mosaic_gpu_deterministic`.
"""

import contextlib
import dataclasses
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro

from ring_jax.cluster import compile_only_devices
from ring_jax.kernels import has_fused_backward, mosaic_gpu, mosaic_gpu_deterministic, triton_gpu
from ring_jax.kernels.contract import AttentionState, BlockMask
from ring_jax.kernels.ptxas import find_ptxas

# Shared memory that one block may use, in bytes, by compute capability (CUDA C++ Programming Guide, table of technical
# specifications).
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
_MOSAIC_SWITCHES = ("MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS", "MOSAIC_GPU_DUMP_RESOURCES")


@dataclasses.dataclass(frozen=True)
class Options:
    """What to compile."""

    compute_capability: tuple[int, ...] = (80, 90)
    dtype: tuple[Literal["bfloat16", "float16", "float32"], ...] = ("bfloat16",)
    head_dim: tuple[int, ...] = (64, 96, 128, 256)
    documents: tuple[bool, ...] = (False, True)
    """Without and with segment ids."""
    implementation: tuple[Literal["mosaic_gpu", "triton"], ...] = ("mosaic_gpu", "triton")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A causal block of 4096 tokens with 8 query and 2 key/value heads, compiled for one kind of GPU."""

    implementation: str
    compute_capability: int
    dtype: str
    head_dim: int
    has_segments: bool

    def __str__(self) -> str:
        documents = " documents" * self.has_segments
        return f"sm_{self.compute_capability} {self.dtype} H={self.head_dim} causal GQA{documents}"

    @property
    def is_possible(self) -> bool:
        """Whether the implementation has kernels for it."""
        if self.implementation == "triton":
            return True
        return mosaic_gpu.unsupported_reason(self.compute_capability, self.head_dim, jnp.dtype(self.dtype)) is None

    def arguments(self, sharding: Any = None) -> tuple[Any, ...]:
        """Query, key, state, logsumexp, sums of gradients and mask, as shapes and dtypes."""

        def array(shape: tuple[int, ...], dtype: Any) -> Any:
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        q, k = (array((1, 4096, heads, self.head_dim), self.dtype) for heads in (8, 2))
        statistics, positions = array((1, 8, 4096), jnp.float32), array((4096,), jnp.int32)
        ids = array((1, 4096), jnp.int32) if self.has_segments else None
        state = AttentionState(array(q.shape, jnp.float32), statistics)
        sums = array((1, 2, *k.shape[1:]), jnp.float32)
        return q, k, state, statistics, sums, BlockMask(positions, positions, ids, ids, is_causal=True)


@dataclasses.dataclass(frozen=True)
class Usage:
    """What ptxas reports of one kernel; spills and shared memory in bytes."""

    kernel: str
    registers: int
    spills: int
    shared: int
    # Whether ptxas found no registers for products in flight, and has each waited for: half the speed, maybe no spills.
    serialized: bool = False
    # A Mosaic kernel's, see `benchmarks.machine_code`.
    ptx: str = dataclasses.field(default="", repr=False, compare=False)


def usage(variant: Variant) -> list[Usage]:
    """Compiles the kernels of a block, forward and backward."""
    return _triton_usage(variant) if variant.implementation == "triton" else _mosaic_usage(variant)


def _triton_usage(variant: Variant) -> list[Usage]:
    """jax-triton writes the PTX into the folder that `JAX_TRITON_DUMP_DIR` named when it was first imported."""
    folder = Path(os.environ["JAX_TRITON_DUMP_DIR"])

    def block(q, k, state, statistics, sums, mask):
        with triton_gpu.target(variant.compute_capability):
            forward = triton_gpu.forward(q, k, k, state, mask, scale=0.1)
            backward = triton_gpu.backward(q, k, k, q, statistics, statistics, state.output, None, mask, scale=0.1)
        return forward, backward

    jax.jit(block).trace(*variant.arguments()).lower(lowering_platforms=("cuda",))
    found = [_assembled(path, variant.compute_capability) for path in sorted(folder.glob("*/*.ptx"))]
    for entry in folder.iterdir():
        shutil.rmtree(entry)
    return found


def _assembled(ptx: Path, compute_capability: int) -> Usage:
    arch = f"sm_{compute_capability}" + "a" * (compute_capability >= 90)
    command = [ptxas(), "-v", f"--gpu-name={arch}", str(ptx), "-o", os.devnull]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    shared = ptx.with_suffix(".compile_info").read_text()
    return Usage(ptx.stem, *_registers_and_spills(log), _number(r"shared_mem_bytes: (\d+)", shared))


def _mosaic_usage(variant: Variant) -> list[Usage]:
    sharding = jax.sharding.SingleDeviceSharding(compile_only_devices("h100")[0])

    def block(q, k, state, statistics, sums, mask):
        output = mosaic_gpu.forward(q, k, k, state, mask, scale=0.1)
        cotangents = (q, statistics, statistics, state.output)
        gradients = [mosaic_gpu_deterministic.backward(q, k, k, *cotangents, None, mask, scale=0.1)]
        if has_fused_backward("mosaic_gpu", variant.head_dim):
            gradients.append(mosaic_gpu.backward(q, k, k, *cotangents, sums, mask, scale=0.1))
        return output, gradients

    return compile_mosaic(jax.jit(block), *variant.arguments(sharding))[1]


def compile_mosaic(function: Any, *args: Any) -> tuple[jax.stages.Compiled, list[Usage]]:
    """Compiles a jitted function for the GPU that its arguments name, and reports on the Mosaic kernels in it.

    Shared memory is what the kernel asks for, without its barriers (8 bytes each).
    """
    with _said_by_mosaic() as said:
        lowered = function.lower(*args)
        compiled = lowered.compile()
    (log,) = said
    # Resources are told in the order of lowering, without names; ptxas runs later, on several kernels at once.
    names = re.findall(r"ring_jax_attention_(\w+)_mosaic_gpu", lowered.as_text())
    sizes = re.findall(r"Resources\(smem_scratch_bytes=(\d+)", log)
    shared = dict(zip(names, map(int, sizes), strict=True))
    assert len(shared) == len(names), f"one kernel twice: {names}"
    serialized = re.findall(r"instructions are serialized.*ring_jax_attention_(\w+)_mosaic_gpu_kernel", log)
    sources = re.findall(r"^//\n// Generated by LLVM.*?^}$", log, re.DOTALL | re.MULTILINE)
    ptx = {
        match[1]: text for text in sources if (match := re.search(r"\.entry ring_jax_attention_(\w+)_mosaic_gpu", text))
    }
    report = re.split(r"Compiling entry function 'ring_jax_attention_(\w+)_mosaic_gpu_kernel'", log)
    usage = [
        Usage(name, *_registers_and_spills(text), shared[name], name in serialized, ptx[name])
        for name, text in zip(report[1::2], report[2::2], strict=True)
    ]
    assert len(usage) == len(names), log
    return compiled, sorted(usage, key=lambda one: names.index(one.kernel))


@contextlib.contextmanager
def _said_by_mosaic() -> Iterator[list[str]]:
    """A list that gets what Mosaic prints of the kernels, from Python, and ptxas' log, which C++ writes to file 1."""
    before = {name: os.environ.get(name) for name in _MOSAIC_SWITCHES}
    os.environ.update(dict.fromkeys(_MOSAIC_SWITCHES, "1"))
    sys.stdout.flush()
    terminal, said = os.dup(1), []
    try:
        with tempfile.TemporaryFile("w+") as file, contextlib.redirect_stdout(file):
            os.dup2(file.fileno(), 1)
            yield said
            file.seek(0)
            said.append(file.read())
    finally:
        os.dup2(terminal, 1)
        os.close(terminal)
        for name in _MOSAIC_SWITCHES:
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _registers_and_spills(log: str) -> tuple[int, int]:
    """What ptxas says of one kernel: registers of a thread at launch, and its bytes spilled, stores and loads."""
    spilled = _number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log)
    return _number(r"Used (\d+) registers", log), spilled


def _number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    assert match, f"no {pattern!r} in:\n{text}"
    return int(match[1])


def ptxas() -> Path:
    """The ptxas to ask, the one that XLA will run. Raises FileNotFoundError if there is none."""
    found = find_ptxas()
    if found is None:
        raise FileNotFoundError("there is no ptxas: pip install 'ring-jax[cuda13]' brings one")
    return found


def main(options: Options) -> int:
    """Prints the table; the exit status is the number of kernels that spill or need too much shared memory."""
    bad = 0
    print(f"{'variant':44} {'kernel':16} {'registers':>9} {'spills':>7} {'shared':>8}   bytes; {ptxas()}")
    choices = (options.implementation, options.compute_capability, options.dtype, options.head_dim, options.documents)
    for variant in itertools.starmap(Variant, itertools.product(*choices)):
        for use in usage(variant) if variant.is_possible else ():
            fits = not use.spills and not use.serialized and use.shared <= SHARED_MEMORY[variant.compute_capability]
            bad += not fits
            cells = f"{variant!s:44} {use.kernel:16} {use.registers:9} {use.spills:7} {use.shared:8}"
            print(cells + ("" if fits else "   !"), flush=True)
    return bad


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as dump:
        os.environ["JAX_TRITON_DUMP_DIR"] = dump
        sys.exit(main(tyro.cli(Options)))
