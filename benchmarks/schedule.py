"""What XLA makes of the ring on a cluster that is not there: hops hidden or exposed, copies, memory.

    python -m benchmarks.schedule --gpu h100 --mesh seq=8 --heads 32/8 --tokens-per-gpu 8192

Compiles the forward ring and the whole gradient for the described GPUs (needs the extra cuda12 or cuda13, no GPU) and
reads both schedules. Every figure is exact for the compiled program; nothing is run.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import ring_jax
from ring_jax import kernels
from ring_jax.cluster import Schedule, compile_only_devices, read_schedule
from ring_jax.mesh import parse_mesh
from ring_jax.ring_steps import RingSteps, Steps

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class RingCase:
    """One ring on a described cluster. `heads` is query heads / key-value heads."""

    gpu: str = "h100"
    """A GPU of ring_jax.cluster.GPUS, or the path of a .pbtxt description."""
    mesh: str = "seq=8"
    """Mesh axes and sizes, such as data=2,seq=8."""
    tokens_per_gpu: int = 8192
    heads: str = "32/8"
    head_dim: int = 128
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    layout: str = "zigzag"
    is_causal: bool = True
    segments: bool = False
    """Whether packed documents' segment ids travel along."""
    implementation: str | None = None
    gpus_per_host: int = 8

    def __post_init__(self):
        parts = self.heads.split("/")
        if len(parts) != 2 or not all(p.isdecimal() and int(p) > 0 for p in parts):
            raise ValueError(f"heads {self.heads!r} must be query heads/key-value heads, such as 32/8")
        if self.tokens_per_gpu < 1:
            raise ValueError(f"tokens_per_gpu must be at least 1, got {self.tokens_per_gpu}")

    @property
    def num_heads(self) -> tuple[int, int]:
        query, key = self.heads.split("/")
        return int(query), int(key)

    @property
    def shape(self) -> dict[str, int]:
        return parse_mesh(self.mesh)

    def chosen(self, device: Any) -> str:
        """The implementation for such devices."""
        need = kernels.Need(kernels.Target.of_device(device), self.dtype, self.head_dim)
        return kernels.choose(self.implementation, need)


@dataclasses.dataclass(frozen=True)
class CompiledRing:
    """One compiled pass: its schedule, its temporary bytes on each device and the bytes it cannot do without."""

    name: str
    schedule: Schedule
    temp_bytes: int
    necessary_bytes: int
    expected_bytes_sent: int

    @property
    def ratio(self) -> float:
        return self.temp_bytes / self.necessary_bytes


def compile_ring(case: RingCase) -> tuple[CompiledRing, CompiledRing]:
    """The forward ring and the whole gradient (forward and backward ring) of `case`, compiled for its GPUs."""
    shape = case.shape
    size = math.prod(shape.values())
    gpus = min(size, case.gpus_per_host)
    if size % gpus:
        raise ValueError(f"mesh {case.mesh!r} has {size} GPUs, which do not fill hosts of {gpus}: set --gpus-per-host")
    devices = compile_only_devices(case.gpu, hosts=size // gpus, gpus_per_host=gpus)
    mesh = Mesh(np.array(devices).reshape(*shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))
    q, k, ids = _arguments(case, mesh)
    attend = functools.partial(
        ring_jax.ring_attention,
        is_causal=case.is_causal,
        layout=case.layout,
        mesh=mesh,
        head_axis=None,
        implementation=case.implementation,
    )

    def forward(q, k, v, ids):
        return attend(q, k, v, segment_ids=ids)

    def gradient(q, k, v, ids, d_out):
        return jax.vjp(lambda q, k, v: forward(q, k, v, ids), q, k, v)[1](d_out)

    options = ring_jax.compiler_options("gpu")
    jit = functools.partial(jax.jit, compiler_options=options)
    hops, chosen = shape["seq"] - 1, case.chosen(devices[0])
    steps = RingSteps.of(
        *(chosen, *((1, case.tokens_per_gpu, heads, case.head_dim) for heads in case.num_heads)),
        size=shape["seq"],
        layout=case.layout,
        is_causal=case.is_causal,
        has_segments=case.segments,
        is_in_one_process=size == gpus,
    )
    key_bytes, id_bytes = _device_bytes(k), 0 if ids is None else _device_bytes(ids)
    block_sent = hops * (2 * key_bytes + id_bytes)
    # dK and dV travel in float32, and make one hop more than K and V: home to their owner, rounded if complete.
    is_complete = not kernels.has_fused_backward(chosen, case.head_dim)
    gradients_sent = 2 * (_device_bytes(k, 4) * hops + (key_bytes if is_complete else _device_bytes(k, 4)))

    def compiled(name: str, fn: Callable, arguments: tuple, necessary_bytes: int, sent: int) -> CompiledRing:
        program = jit(fn).lower(*arguments).compile()
        text, memory = program.as_text(), program.memory_analysis()
        assert text is not None
        assert memory is not None
        schedule = read_schedule(text, block_bytes=key_bytes)
        return CompiledRing(name, schedule, memory.temp_size_in_bytes, necessary_bytes, sent)

    return (
        compiled("forward", forward, (q, k, k, ids), _necessary_forward(q, k, steps.forward), block_sent),
        compiled(
            "gradient",
            gradient,
            (q, k, k, ids, q),
            max(_necessary_forward(q, k, steps.forward), _necessary_backward(q, k, steps.backward)),
            2 * block_sent + (gradients_sent if hops else 0),
        ),
    )


def _arguments(
    case: RingCase, mesh: Mesh
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, jax.ShapeDtypeStruct | None]:
    """Queries, keys (values are alike) and segment ids; one row of the batch on each shard of the data axis."""
    batch = case.shape.get("data", 1)
    tokens = case.tokens_per_gpu * case.shape["seq"]
    sharding = NamedSharding(mesh, PartitionSpec("data" if "data" in case.shape else None, "seq"))
    q, k = (
        jax.ShapeDtypeStruct((batch, tokens, heads, case.head_dim), jnp.dtype(case.dtype), sharding=sharding)
        for heads in case.num_heads
    )
    ids = jax.ShapeDtypeStruct((batch, tokens), jnp.int32, sharding=sharding) if case.segments else None
    return q, k, ids


def _device_bytes(x: jax.ShapeDtypeStruct, itemsize: int | None = None) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * (itemsize or x.dtype.itemsize)


def _necessary_forward(q: jax.ShapeDtypeStruct, k: jax.ShapeDtypeStruct, steps: Steps) -> int:
    """Float32 output, K and V of the blocks that came for a step and of those that arrive meanwhile, logsumexp."""
    came = [0, *map(len, steps[1:])]
    held = max((here + arriving for here, arriving in itertools.pairwise(came)), default=0)
    return _device_bytes(q, 4) + held * 2 * _device_bytes(k) + _row_bytes(q)


def _necessary_backward(q: jax.ShapeDtypeStruct, k: jax.ShapeDtypeStruct, steps: Steps) -> int:
    """Float32 dQ, the saved output, logsumexp and delta, and two K/V and dK/dV buffers for each block of a step."""
    of_blocks = max(map(len, steps)) * 2 * 2 * (_device_bytes(k) + _device_bytes(k, 4))
    return _device_bytes(q, 4) + _device_bytes(q) + of_blocks + 2 * _row_bytes(q)


def _row_bytes(q: jax.ShapeDtypeStruct) -> int:
    return _device_bytes(q, 4) // q.shape[3]


@dataclasses.dataclass(frozen=True)
class Options(RingCase):
    """Compile a ring for GPUs that are not there and print its schedule."""

    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Print JSON instead of a table."""


def report(case: RingCase) -> dict:
    """The schedules of `case` as plain data."""
    rows = []
    for ring in compile_ring(case):
        schedule = ring.schedule
        rows.append(
            {
                "pass": ring.name,
                "permutes": schedule.num_permutes,
                "exposed": schedule.num_exposed,
                "bytes_sent": schedule.bytes_sent,
                "expected_bytes_sent": ring.expected_bytes_sent,
                "kernels": schedule.num_kernels,
                "other_kernels": schedule.num_others,
                "block_copies": len(schedule.block_copies),
                "other_moves": len(schedule.moves) - len(schedule.block_copies),
                "temp_bytes": ring.temp_bytes,
                "temp_over_necessary": ring.ratio,
            }
        )
    fields = [f.name for f in dataclasses.fields(RingCase)]
    return {"case": {name: getattr(case, name) for name in fields}, "jax": jax.__version__, "passes": rows}


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    options = tyro.cli(Options)
    result = report(options)
    if options.as_json:
        print(json.dumps(result, indent=2))
        return
    print(f"{options.gpu}, mesh {options.mesh}, {options.tokens_per_gpu} tokens and heads {options.heads} on each GPU")
    titles = ("permutes", "exposed", "GiB sent", "kernels", "K/V copies", "temp GiB", "of needed")
    print(f"{'pass':9}", *(title.rjust(10) for title in titles))
    for row in result["passes"]:
        gib = {name: f"{row[name] / GIB:.3f}" for name in ("bytes_sent", "temp_bytes")}
        cells = (row["permutes"], row["exposed"], gib["bytes_sent"], row["kernels"], row["block_copies"])
        cells += (gib["temp_bytes"], f"{row['temp_over_necessary']:.2f}")
        print(f"{row['pass']:9}", *(str(cell).rjust(10) for cell in cells))


if __name__ == "__main__":
    main()
