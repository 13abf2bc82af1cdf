"""The XLA options that a ring needs to hide its hops, and those of a training step."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def compiler_options(platform: str | None = None) -> dict[str, bool | int | str]:
    """XLA options for `jax.jit(compiler_options=...)` of a program with `ring_attention` in it.

    On GPUs they let all the permutes of a step (K, V and in the backward ring sums of dK and dV, of several blocks
    where steps take several) run at once beside the kernel; by default only one collective is asynchronous at a time,
    and before Hopper none is. Between GPUs of one process the copy engines make the hops: NCCL's kernels would take
    multiprocessors from ours (`benchmarks/LOG.md`). By XLA's source, hops between processes go by NCCL all the same;
    that has not been tried. Elsewhere there is nothing to set.

    Args:
        platform: "gpu" (or "cuda"), "cpu", ...; the default backend's if None.
    """
    platform = jax.default_backend() if platform is None else platform
    if platform not in ("gpu", "cuda"):
        return {}
    return {
        "xla_gpu_enable_latency_hiding_scheduler": True,
        "xla_gpu_experimental_parallel_collective_overlap_limit": 8,
        "xla_gpu_collective_permute_mode": "COLLECTIVES_PEER_MEMORY",
    }


def step_compiler_options(platform: str, dtype: DTypeLike) -> dict[str, bool | int | str]:
    """XLA options for a training step that multiplies in `dtype`: those of its ring, and all products by cuBLAS.

    Else XLA compiles a Triton kernel for each product and times it against cuBLAS on the GPU: a step's memory is then
    not the planned one, as cuBLAS has a workspace and adds in place, and not the same every time. In bfloat16 the steps
    so found were 0 to 3 % slower, and compiled 5 times as long; in float32 they were 15 % faster
    (`benchmarks/LOG.md`).
    """
    options = compiler_options(platform)
    if options and jnp.dtype(dtype).itemsize == 2:
        options["xla_gpu_enable_triton_gemm"] = False
    return options
