"""The Triton kernels' GPU tests as programs, compiled here to run on a GPU machine whose Triton jax-triton cannot use.

    python -m tests.gpu.triton_programs FOLDER --compute-capability 90

and there `RING_JAX_TRITON_PROGRAMS=FOLDER JAX_PLATFORMS=cuda python -m pytest -m gpu tests/gpu/test_triton_device.py`.
"""

import argparse
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ring_jax.kernels import triton_gpu
from ring_jax.kernels.contract import AttentionState, BlockMask
from tests.block_cases import Case, blocks, shapes

CASES = [
    Case("float32", batch=2, queries=333, keys=515, heads=4, kv_heads=2, head_dim=64, has_segments=True),
    Case("float32", queries=130, keys=200, head_dim=128),
    Case("float32", queries=130, keys=100, head_dim=256, heads=1, kv_heads=1),
    Case("bfloat16", batch=2, queries=333, keys=515, heads=8, kv_heads=2, head_dim=128),
    Case(
        "bfloat16", batch=2, queries=1024, keys=512, heads=4, kv_heads=1, head_dim=128, has_segments=True, shuffled=True
    ),
    Case("bfloat16", batch=2, queries=1000, keys=777, heads=4, kv_heads=4, head_dim=64, is_causal=False),
    Case("float16", batch=2, queries=333, keys=515, heads=4, kv_heads=2, head_dim=96, shuffled=True),
    Case("bfloat16", queries=300, keys=400, heads=4, kv_heads=2, head_dim=256),
    Case("float16", queries=512, keys=512, heads=2, kv_heads=2, head_dim=128, is_causal=False),
    Case("bfloat16", queries=200, keys=300, heads=2, kv_heads=1, head_dim=40, has_segments=True),
]
# The same attention as one block and as 32.
ONE_BLOCK = Case("bfloat16", queries=256, keys=4096, num_blocks=1, head_dim=128, shuffled=True)
MANY_BLOCKS = Case("bfloat16", queries=256, keys=128, num_blocks=32, head_dim=128, shuffled=True)
# 2^31 elements in the query, the state and dQ.
LONG_SHAPE = (1, 524_288, 32, 128)
LONG_KEYS = 192


def program(case: Case) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """All results of a case, from its arrays."""
    return functools.partial(blocks(case), triton_gpu)


def long_program(query: Any, key: Any, value: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The last 16 tokens' output, logsumexp and dQ of a full block, every query's `d_out` being the query itself."""
    batch, num_queries, num_heads, _ = query.shape
    q_positions, k_positions = jnp.zeros(num_queries, jnp.int32), jnp.zeros(key.shape[1], jnp.int32)
    mask = BlockMask(q_positions, k_positions, None, None, is_causal=False)
    lse = jnp.full((batch, num_heads, num_queries), -jnp.inf)
    state = triton_gpu.forward(query, key, value, AttentionState(jnp.zeros(query.shape), lse), mask, scale=0.1)
    output, lse = state.output[:, -16:], state.lse
    delta = jnp.zeros(lse.shape)
    dq = jnp.zeros(query.shape)
    dq = triton_gpu.backward(query, key, value, query, lse, delta, dq, None, mask, scale=0.1).dq
    return output, lse[:, :, -16:], dq[:, -16:]


def load(name: str, fn: Callable) -> Callable:
    """`fn` compiled for the GPU at hand: from the folder of exported programs if there is one, else by jax-triton."""
    folder = os.environ.get("RING_JAX_TRITON_PROGRAMS")
    if folder is None:
        return jax.jit(fn)
    return jax.jit(jax.export.deserialize(bytearray((Path(folder) / f"{name}.bin").read_bytes())).call)


def main() -> None:
    """Exports every program of the tests for one compute capability."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--compute-capability", type=int, default=90)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    query = jax.ShapeDtypeStruct(LONG_SHAPE, jnp.bfloat16)
    key = jax.ShapeDtypeStruct((1, LONG_KEYS, 8, 128), jnp.bfloat16)
    jobs = [(str(case), program(case), (shapes(case),)) for case in (*CASES, ONE_BLOCK, MANY_BLOCKS)]
    for name, fn, args in (*jobs, ("long", long_program, (query, key, key))):
        unchecked = [jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")]
        with triton_gpu.target(options.compute_capability):
            exported = jax.export.export(jax.jit(fn), platforms=["cuda"], disabled_checks=unchecked)(*args)
        (options.folder / f"{name}.bin").write_bytes(exported.serialize())
        print("exported", name)


if __name__ == "__main__":
    main()
