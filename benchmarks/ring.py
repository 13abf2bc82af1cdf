"""A real ring on all GPUs at hand, beside the same ring without its hops: what hiding the hops costs.

    python -m benchmarks.ring --out benchmarks/results

Without hops every rank computes all its steps on its own block: as much work, wrong results; where a step takes several
blocks, all are the own one and are read from the cache more often. Both take turns. Output and dQ of the first and the
last rank of the real ring, and dK and dV of keys of all ranks, are compared with float64 before anything is timed.
Without a GPU it runs on 8 virtual CPU devices, and shows that it works, not how fast a ring is.
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array
from rich.console import Console
from rich.table import Table

from ring_jax import attention, compiler_options, from_layout, kernels, ring_attention
from ring_jax import ring as ring_module
from ring_jax.mesh import make_mesh, quiet_cuda_plugin, request_cpu_devices
from ring_jax.training.config import parse_seq_len

from .cases import Case
from .gate import Gate
from .kernels import Program, of_rank
from .peers import Passes
from .processes import CPU_DEVICES
from .replay import Replay
from .timing import REST_SECONDS, Job, environment, median_seconds


@dataclasses.dataclass(frozen=True)
class Config:
    """Time ring attention on all GPUs at hand beside the same steps without hops."""

    tokens_per_gpu: tuple[str, ...] = ("8K", "32K")
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    layout: str = "zigzag"
    full: bool = False
    """Attention without a causal mask."""
    rest: float = REST_SECONDS
    """Seconds before each sample; with 0 at the clock that the power limit leaves, as in training."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """Where to write ring-COUNTxGPU.json. None: print only."""


@dataclasses.dataclass(frozen=True)
class Ring:
    """One ring's arrays, and its passes with and without hops."""

    case: Case
    layout: str
    mesh: Mesh

    @property
    def num_shards(self) -> int:
        return self.mesh.size

    def program(self, rank: int) -> Program:
        """What a rank computes, by the kernel that the ring chooses for its GPU."""
        target = kernels.Target.of_device(self.mesh.devices.flat[rank])
        chosen = kernels.choose(None, kernels.Need(target, self.case.dtype, self.case.head_dim))
        return of_rank(chosen, self.case, Replay(self.num_shards, rank, self.layout, self.case.is_causal))

    @functools.cached_property
    def arrays(self) -> tuple[Array, Array, Array, Array]:
        """Queries, keys, values and a cotangent, sharded over the ring."""
        case = self.case
        sharding = NamedSharding(self.mesh, PartitionSpec(None, "seq"))
        seeds = jax.random.split(jax.random.key(0), 4)

        def drawn(seed: Array, num_heads: int) -> Array:
            shape = (case.batch, case.seq_len, num_heads, case.head_dim)
            return jax.jit(jax.random.normal, static_argnums=(1, 2), out_shardings=sharding)(seed, shape, case.dtype)

        heads = (case.num_heads, case.num_kv_heads, case.num_kv_heads, case.num_heads)
        query, key, value, d_out = (drawn(seed, n) for seed, n in zip(seeds, heads, strict=True))
        return query, key, value, d_out

    def passes(self, *, with_hops: bool = True) -> Passes:
        """Forward and backward as their users compile them."""
        *inputs, d_out = self.arrays
        attend = functools.partial(
            ring_attention, is_causal=self.case.is_causal, layout=self.layout, mesh=self.mesh, seq_axis="seq"
        )
        jit = functools.partial(jax.jit, compiler_options=compiler_options())
        forward, backward = jit(attend), jit(lambda vjp, d_out: vjp(d_out))
        with contextlib.nullcontext() if with_hops else without_hops():
            forward(*inputs)
            _, vjp = jit(lambda *args: jax.vjp(attend, *args))(*inputs)
            backward(vjp, d_out)
        return Passes(lambda: forward(*inputs), lambda: backward(vjp, d_out))

    def of_rank(self, x: Array, rank: int) -> Array:
        """A rank's shard, alone on its GPU."""
        device = self.mesh.devices.flat[rank]
        (shard,) = (shard.data for shard in x.addressable_shards if shard.device == device)
        return shard

    def rank_arrays(self, rank: int) -> tuple[Array, Array, Array, Array]:
        """What `Program.forward` and `Gate` take: a rank's queries, all shards' keys and values, and its cotangent."""
        query, key, value, d_out = self.arrays
        device = self.mesh.devices.flat[rank]

        def everyones(x: Array) -> Array:
            return jnp.stack([jax.device_put(self.of_rank(x, r), device) for r in range(self.num_shards)])

        return self.of_rank(query, rank), everyones(key), everyones(value), self.of_rank(d_out, rank)

    def check(self, passes: Passes) -> None:
        """Compares output and dQ of the first and the last rank, and dK and dV of all ranks, with float64.

        Raises:
            ValueError: one of them is wrong.
        """
        assert passes.backward is not None
        output, gradients = passes.forward(), passes.backward()
        for rank in (0, self.num_shards - 1):
            own_output, own_dq = self.of_rank(output, rank), self.of_rank(gradients[0], rank)
            passes = Passes(lambda own=own_output: own, lambda own=own_dq: own)
            errors = Gate(self.case, self.program(rank).replay, self.rank_arrays(rank)).row_errors(passes)
            if not errors.is_allowed:
                raise ValueError(f"wrong result on rank {rank}: {errors}")
        query, key, value, d_out = map(self.in_natural_order, self.arrays)
        one_block = Replay(layout="contiguous", is_causal=self.case.is_causal)
        gate = Gate(self.case, one_block, (query, key[None], value[None], d_out))
        errors = gate.key_errors(tuple(map(self.in_natural_order, gradients)))
        if not errors.is_allowed:
            raise ValueError(f"wrong gradient: {errors}")

    def in_natural_order(self, x: Array) -> Array:
        """All of an array on the first GPU, its tokens in natural order."""
        return from_layout(jax.device_put(x, self.mesh.devices.flat[0]), self.layout, self.num_shards)


@contextlib.contextmanager
def without_hops() -> Iterator[None]:
    """What is traced inside keeps its own blocks instead of passing them on."""
    traced = attention._attend_sharded
    traced.cache_clear()
    try:
        with mock.patch.object(ring_module, "rotate", lambda tree, axis_name, by=1: tree):
            yield
    finally:
        traced.cache_clear()


def measure(ring: Ring, rest: float) -> list[dict[str, Any]]:
    """A row for each pass: milliseconds with hops and without them, and TFLOP/s of the slowest GPU."""
    passes, without = ring.passes(), ring.passes(with_hops=False)
    ring.check(passes)
    assert passes.backward is not None
    assert without.backward is not None
    runs = passes.forward, without.forward, passes.backward, without.backward
    seconds = iter(median_seconds([Job(run) for run in runs], rest))
    flops = max(ring.program(rank).rank_flops for rank in range(ring.num_shards))
    rows = []
    for kind, factor in (("forward", 1.0), ("backward", 2.5)):
        ring_seconds, without_seconds = next(seconds), next(seconds)
        rows.append(
            {
                "case": ring.case.label,
                "layout": ring.layout,
                "shards": ring.num_shards,
                "implementation": ring.program(0).implementation,
                "pass": kind,
                "ring_ms": 1e3 * ring_seconds,
                "without_hops_ms": 1e3 * without_seconds,
                "of_without_hops": without_seconds / ring_seconds,
                "tflops_per_gpu": factor * flops / ring_seconds / 1e12,
            }
        )
    return rows


def rings(config: Config) -> Iterator[Ring]:
    """The rings to measure, over all devices."""
    mesh = make_mesh()
    for tokens in config.tokens_per_gpu:
        seq_len = parse_seq_len(tokens) * mesh.size
        dtype = "bfloat16" if jax.devices()[0].platform == "gpu" else "float32"
        case = Case(1, seq_len, config.heads, config.kv_heads, config.head_dim, dtype, not config.full)
        yield Ring(case, config.layout, mesh)


def main(args: Sequence[str] | None = None) -> None:
    """Prints the table and writes the file."""
    quiet_cuda_plugin()
    request_cpu_devices(CPU_DEVICES)
    config = tyro.cli(Config, args=args)
    about, rows = environment(), []
    console = Console(highlight=False)
    if jax.devices()[0].platform == "cpu":
        console.print(f"{len(jax.devices())} virtual CPU devices of one machine: speeds say nothing about a cluster")
    for ring in rings(config):
        rows += measure(ring, config.rest)
        if config.out is not None:
            config.out.mkdir(parents=True, exist_ok=True)
            path = config.out / f"ring-{len(jax.devices())}x{about['device'].lower().replace(' ', '-')}.json"
            path.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
    table = Table(title=f"ring of {len(jax.devices())} x {about['device']}")
    for column in ("case", "pass", "ring, ms", "without hops, ms", "of it", "TFLOP/s per GPU"):
        table.add_column(column, overflow="fold")
    for row in rows:
        times = (f"{row['ring_ms']:.2f}", f"{row['without_hops_ms']:.2f}", f"{row['of_without_hops']:.3f}")
        table.add_row(row["case"], row["pass"], *times, f"{row['tflops_per_gpu']:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
