"""The ring as XLA schedules it for eight GPUs that are not there: every hop hidden, nothing copied, memory bounded."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

import ring_jax
from benchmarks.schedule import RingCase, compile_ring
from ring_jax.cluster import GPUS, compile_only_devices, gpu_description, read_schedule
from ring_jax.ring_steps import MAX_UNROLLED_STEPS

MEMORY_SLACK = 1.15

# Two tests look at the ring of Mosaic kernels on eight H100s, and such a ring takes half a minute.
compile_ring_once = functools.cache(compile_ring)


@pytest.mark.parametrize(
    ("gpu", "implementation", "segments", "kernels"),
    [
        ("h100", "mosaic_gpu", False, 3),
        ("h100", "mosaic_gpu", True, 8),
        ("h100", "triton", False, 8),
        ("a100-80gb", "triton", True, 8),
    ],
)
def test_every_hop_is_hidden_and_nothing_is_copied(gpu, implementation, segments, kernels):
    """On Hopper, without documents, it is the own block and then all others in two steps."""
    hops = 7
    case = RingCase(gpu=gpu, mesh="seq=8", heads="32/8", segments=segments, implementation=implementation)
    forward, gradient = compile_ring_once(case)
    assert forward.schedule.num_permutes == 2 * hops
    # What the Hopper kernel adds to holds dK and dV.
    assert gradient.schedule.num_permutes == 2 * 2 * hops + (1 if implementation == "mosaic_gpu" else 2) * (hops + 1)
    assert forward.schedule.num_kernels == kernels
    for ring in (forward, gradient):
        assert ring.schedule.num_exposed == 0, [hop for hop in ring.schedule.hops if hop.is_exposed]
        assert ring.schedule.block_copies == ()
        assert ring.schedule.bytes_sent == ring.expected_bytes_sent
        assert ring.temp_bytes <= MEMORY_SLACK * ring.necessary_bytes
    # What else may move inside the rings is the cast of the forward ring's output, once.
    assert [set(move.opcodes) for move in gradient.schedule.moves] in ([], [{"convert"}])


@pytest.mark.parametrize(
    ("is_causal", "tokens", "kernels"),
    [
        (True, 8192, {8: (3, 5), 16: (5, 9)}),
        (True, 16384, {3: (3, 3), 5: (5, 5)}),
        (False, 16384, {3: (3, 3), 5: (5, 5)}),
    ],
)
def test_positions_and_tiles_are_computed_once_for_all_steps(is_causal, tokens, kernels):
    """What a step launches is its block kernel and nothing else, backward too; there the own block takes two.

    In rings of short shards these kernels take several blocks: with twice as many ranks three steps take four, not one.
    """
    others = []
    for size, (forward_kernels, backward_kernels) in kernels.items():
        case = RingCase(is_causal=is_causal, tokens_per_gpu=tokens, implementation="mosaic_gpu")
        case = dataclasses.replace(case, mesh=f"seq={size}", gpus_per_host=size)
        forward, gradient = (ring.schedule for ring in compile_ring_once(case))
        assert forward.num_kernels == forward_kernels
        assert gradient.num_kernels == forward_kernels + backward_kernels + 1
        assert forward.num_exposed == gradient.num_exposed == 0
        assert forward.block_copies == gradient.block_copies == ()
        # The sums of the own block's dK and dV are added up and rounded at the end.
        assert len([m for m in gradient.others if "add" in m.opcodes and m.num_bytes >= gradient.block_bytes]) == 1
        others.append((forward.num_others, gradient.num_others))
    assert others[0] == others[1]
    assert min(others[0]) > 0


def test_copy_engines_make_the_hops():
    """NCCL's kernels would take multiprocessors from ours (`benchmarks/LOG.md`)."""
    mesh = jax.sharding.Mesh(compile_only_devices("h200", gpus_per_host=4), ("seq",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "seq"))
    array = jax.ShapeDtypeStruct((1, 512, 2, 64), jnp.bfloat16, sharding=sharding)
    attend = functools.partial(ring_jax.ring_attention, mesh=mesh, implementation="xla")
    compiled = jax.jit(attend, compiler_options=ring_jax.compiler_options("gpu")).lower(array, array, array).compile()
    hops = [line for line in (compiled.as_text() or "").splitlines() if " collective-permute" in line and "(%" in line]
    starts = [line for line in hops if "collective_backend_config" in line]
    assert len(starts) == 2 * 3
    assert all('"collectives_mode":"COLLECTIVES_PEER_MEMORY"' in line for line in starts)


def test_large_rings_compile_to_a_loop_with_the_same_guarantees():
    forward, gradient = compile_ring(RingCase(mesh="seq=32"))
    for ring in (forward, gradient):
        assert ring.schedule.num_exposed == 0
        assert ring.schedule.block_copies == ()
        assert ring.schedule.bytes_sent == ring.expected_bytes_sent
        assert ring.temp_bytes <= MEMORY_SLACK * ring.necessary_bytes
    # No larger than twice the largest ring that is written out, however many shards there are.
    hops = MAX_UNROLLED_STEPS - 1
    assert len(forward.schedule.hops) <= 2 * (2 * hops)
    assert len(gradient.schedule.hops) <= 2 * (2 * 2 * hops + (hops + 1))


def test_the_reader_sees_exposed_hops_and_copies():
    """A ring without barriers, options or kernels is what the reader must not pass."""
    devices = compile_only_devices("h100")
    mesh = jax.make_mesh((8,), ("seq",), axis_types=(jax.sharding.AxisType.Auto,), devices=devices)
    spec = jax.sharding.PartitionSpec("seq")

    def send_and_transpose(x):
        ring = [(i, (i + 1) % 8) for i in range(8)]
        sent = jax.lax.ppermute(x, "seq", ring)
        return jax.lax.ppermute(sent.T.copy().T * 2, "seq", ring)

    x = jax.ShapeDtypeStruct((8 * 512, 512), "float32", sharding=jax.sharding.NamedSharding(mesh, spec))
    hlo = jax.jit(jax.shard_map(send_and_transpose, mesh=mesh, in_specs=spec, out_specs=spec)).lower(x).compile()
    text = hlo.as_text()
    assert text is not None
    schedule = read_schedule(text, block_bytes=math.prod((512, 512)) * 4)
    assert schedule.num_permutes == schedule.num_exposed == 2
    assert schedule.num_others > 0
    assert schedule.num_kernels == 0
    assert schedule.bytes_sent == 2 * 512 * 512 * 4


def test_gpus_are_described_and_unknown_ones_refused(tmp_path):
    for gpu in GPUS:
        assert "gpu_device_info" in gpu_description(gpu)
    own = tmp_path / "mine.pbtxt"
    own.write_text(gpu_description("h100"))
    assert gpu_description(str(own)) == gpu_description("h100")
    with pytest.raises(ValueError, match=r"unknown GPU 'h1000'.*a100-80gb, h100"):
        gpu_description("h1000")
    with pytest.raises(ValueError, match="at least one host"):
        compile_only_devices("h100", hosts=0)
