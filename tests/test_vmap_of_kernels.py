"""`jax.vmap` of block kernels: folded into the batch, every entry is as if computed alone."""

import functools
import re
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ring_jax import ring_attention, ring_attention_shard
from ring_jax.cluster import compile_only_devices
from ring_jax.kernels import Target, load, mosaic_gpu, xla
from ring_jax.kernels.batching import Mappable
from ring_jax.kernels.contract import AttentionState, BlockMask
from ring_jax.kernels.tracing import TracedOnce
from tests.stablehlo import lines_as_run

SIZE = 3
# Named as they go into `_block`; those that a case does not map are the same for all entries.
NAMES = ("query", "key", "value", "d_out", "q_positions", "k_positions", "segment_ids")
MAPPED = {
    "queries": ("query", "d_out"),
    "all but queries and positions": ("key", "value", "segment_ids"),
    "positions of queries": ("q_positions",),
    "all": NAMES,
}


def _entries() -> dict[str, Any]:
    """Arrays of `SIZE` blocks."""
    rng = np.random.default_rng(0)
    shape = (SIZE, 2, 24)
    result: dict[str, Any] = {
        name: rng.standard_normal((*shape, heads, 8), np.float32)
        for name, heads in (("query", 4), ("key", 2), ("value", 2), ("d_out", 4))
    }
    for name in ("q_positions", "k_positions"):
        result[name] = np.stack([rng.permutation(24) for _ in range(SIZE)]).astype(np.int32)
    return result | {"segment_ids": rng.integers(0, 3, shape).astype(np.int32)}


def _block(kernel: Any, *arrays: Any) -> dict[str, jax.Array]:
    """Two forward steps, the second on the first one's state, and a backward step."""
    query, key, value, d_out, q_positions, k_positions, segment_ids = arrays
    mask = BlockMask(q_positions, k_positions, segment_ids, segment_ids, is_causal=True)
    statistics = jnp.zeros((query.shape[0], query.shape[2], query.shape[1]), jnp.float32)
    state = AttentionState(jnp.zeros(query.shape, jnp.float32), jnp.full_like(statistics, -jnp.inf))
    for _ in range(2):
        state = kernel.forward(query, key, value, state, mask, scale=0.3)
    dq = jnp.ones(query.shape, jnp.float32)
    sums = jnp.ones((key.shape[0], 2, *key.shape[1:]), jnp.float32)
    gradients = kernel.backward(query, key, value, d_out, statistics + 2, statistics + 1, dq, sums, mask, scale=0.3)
    return state._asdict() | gradients._asdict()


_alone = jax.jit(functools.partial(_block, xla))


def _assert_as_if_alone(found: dict[str, Any], entries: dict[str, Any], mapped: tuple[str, ...] = NAMES) -> None:
    results = [_alone(*(entries[name][i if name in mapped else 0] for name in NAMES)) for i in range(SIZE)]
    expected = jax.tree.map(lambda *x: np.stack(x), *results)
    assert np.ptp(expected["output"], axis=0).max() > 0.01
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("mapped", MAPPED.values(), ids=MAPPED)
def test_every_entry_is_as_if_computed_alone(mapped):
    entries = _entries()
    axes = tuple(0 if name in mapped else None for name in NAMES)
    arguments = [entries[name] if name in mapped else entries[name][0] for name in NAMES]
    found = jax.jit(jax.vmap(functools.partial(_block, Mappable(xla)), axes))(*arguments)
    _assert_as_if_alone(found, entries, mapped)


def test_vmap_of_vmap():
    """Keys and values are mapped in the inner one only, positions in the outer one only."""
    entries = _entries()
    inner = jax.vmap(functools.partial(_block, Mappable(xla)), (0, 0, 0, 0, None, None, 0))
    outer = jax.vmap(inner, (0, None, None, 0, 0, 0, None))
    twice = {name: np.stack([entries[name], 2 * entries[name]]) for name in ("query", "d_out")}
    positions = [entries[name][:2] for name in ("q_positions", "k_positions")]
    keys = [entries[name] for name in ("key", "value")]
    found = jax.jit(outer)(twice["query"], *keys, twice["d_out"], *positions, entries["segment_ids"])
    for i in range(2):
        one = entries | {name: x[i] for name, x in twice.items()}
        one |= {name: np.broadcast_to(entries[name][i], (SIZE, 24)) for name in ("q_positions", "k_positions")}
        _assert_as_if_alone({name: x[i] for name, x in found.items()}, one)


@pytest.mark.parametrize("mapped", [(), ("k_positions",), ("block",), ("k_positions", "block")], ids=str)
def test_masks_of_several_blocks_are_mapped(mapped):
    """Queries are mapped too; a kernel is given the mask with all blocks unless it is computed in a loop."""
    entries, seen = _entries(), []

    class Spy:
        def forward(self, query, key, value, state, mask, **options):
            seen.append(mask.block is not None)
            return xla.forward(query, key, value, state, mask.alone(), **options)

        def backward(self, *args, **options):
            raise AssertionError("not called")

        finished_d_query = staticmethod(xla.finished_d_query)

    positions = np.stack([np.roll(entries["k_positions"], shift, axis=0) for shift in range(SIZE)])
    blocks = {"k_positions": positions, "block": np.arange(SIZE, dtype=np.int32)}

    def attend(kernel, query, k_positions, block):
        key, value, q_positions = (entries[name][0] for name in ("key", "value", "q_positions"))
        mask = BlockMask(q_positions, k_positions, None, None, is_causal=True, block=block)
        return kernel.forward(query, key, value, None, mask, scale=0.3)

    given = [blocks[name] if name in mapped else blocks[name][1] for name in blocks]
    axes = [0 if name in mapped else None for name in blocks]
    found = jax.jit(jax.vmap(functools.partial(attend, Mappable(Spy())), (0, *axes)))(entries["query"], *given)
    assert seen[-1] == (not mapped)
    for i in range(SIZE):
        of_one = [blocks[name][i if name in mapped else 1] for name in blocks]
        for x, want in zip(found, attend(Spy(), entries["query"][i], *of_one), strict=True):
            np.testing.assert_allclose(x[i], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrapped", [Mappable, TracedOnce, lambda kernel: TracedOnce(Mappable(kernel))])
def test_a_kernel_still_sees_that_both_sides_are_the_same_tokens(wrapped):
    class Spy:
        def forward(self, query, key, value, state, mask, **options):
            seen.append((mask.q_positions is mask.k_positions, options))
            return state

    seen: list[tuple[bool, dict]] = []
    x, positions = jnp.zeros((1, 8, 1, 8)), jnp.arange(8, dtype=jnp.int32)
    state = AttentionState(x, jnp.zeros((1, 1, 8)))
    kernel = wrapped(Spy())
    for others in (positions, positions + 0):
        mask = BlockMask(positions, others, None, None, is_causal=True)
        kernel.forward(x, x, x, state, mask, scale=0.3)
    assert seen == [(True, {"scale": 0.3}), (False, {"scale": 0.3})]


def test_equal_calls_of_a_kernel_are_traced_once():
    traced = []

    class Spy:
        def forward(self, query, key, value, state, mask, **options):
            traced.append((mask.is_causal, options["scale"]))
            return state

        def backward(self, *args, **options):
            raise AssertionError("not called")

        finished_d_query = staticmethod(xla.finished_d_query)

    kernel = TracedOnce(Spy())
    x, positions = jnp.zeros((1, 8, 1, 8)), jnp.arange(8, dtype=jnp.int32)
    state = AttentionState(x, jnp.zeros((1, 1, 8)))

    @jax.jit
    def ring(state):
        for step in range(3):
            state = kernel.forward(x, x, x, state, BlockMask(positions, positions + step, None, None, True), scale=0.3)
        return kernel.forward(x, x, x, state, BlockMask(positions, positions + 1, None, None, False), scale=0.3)

    ring(state)
    assert traced == [(True, 0.3), (False, 0.3)]


def test_the_registry_s_kernels_are_traced_once():
    assert isinstance(load("xla", Target("cpu", "cpu")), TracedOnce)


def test_mosaic_kernels_in_the_interpreter():
    """Keys are the same for both entries, queries and segment ids are not."""
    rng = np.random.default_rng(0)
    query, key = (rng.standard_normal(shape, np.float32) for shape in ((2, 1, 64, 1, 64), (1, 64, 1, 64)))
    ids, positions = rng.integers(1, 3, (2, 1, 64)).astype(np.int32), np.arange(64, dtype=np.int32)

    def attend(kernel, dtype, query, ids):
        state = AttentionState(jnp.zeros(query.shape, jnp.float32), jnp.full((1, 1, 64), -jnp.inf))
        mask = BlockMask(jnp.asarray(positions), jnp.asarray(positions), ids, ids, is_causal=True)
        block = (x.astype(dtype) for x in (query, key, key))
        return kernel.forward(*block, state, mask, scale=0.125)

    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        found = jax.vmap(functools.partial(attend, Mappable(mosaic_gpu), jnp.bfloat16))(query, ids)
    expected = jax.vmap(functools.partial(attend, xla, jnp.float32))(query, ids)
    for x, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, want, atol=0.02)


# Kernels of a ring of two, forward and backward. A fused backward leaves a part of the first step for last.
GPU_KERNELS = {"mosaic_gpu": 2 + 3, "mosaic_gpu_deterministic": 2 + 2 * 2, "triton": 2 + 2 * 2}


@pytest.mark.parametrize(("implementation", "launches"), GPU_KERNELS.items(), ids=GPU_KERNELS)
def test_ring_attention_on_gpus_maps_without_more_launches(implementation, launches):
    """On two H100s that are not there."""
    mesh = Mesh(np.array(compile_only_devices("h100", gpus_per_host=2)), ("seq",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())
    q, k = (jax.ShapeDtypeStruct((SIZE, 1, 256, heads, 64), jnp.bfloat16, sharding=place) for heads in (4, 2))
    ids = jax.ShapeDtypeStruct((SIZE, 1, 256), jnp.int32, sharding=place)

    def gradient(q, k, v, ids, d_out):
        attend = functools.partial(ring_attention, segment_ids=ids, is_causal=True, mesh=mesh)
        return jax.vjp(functools.partial(attend, implementation=implementation), q, k, v)[1](d_out)

    text = jax.jit(jax.vmap(gradient, (0, 0, None, 0, 0))).lower(q, k, k.update(shape=k.shape[1:]), ids, q).as_text()
    calls = [line for line in lines_as_run(text) if re.search(r"custom_call @(mosaic_gpu|triton_kernel)", line)]
    assert len(calls) == launches
    assert all(f"tensor<{SIZE}x128x4x64xbf16>" in call for call in calls)


def test_shards_with_positions_of_their_own_on_gpus():
    """Under check_vma, where arrays' types say over which axes they vary, and the loop over the entries must agree."""
    mesh = Mesh(np.array(compile_only_devices("a100-80gb", gpus_per_host=2)), ("seq",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec(None, None, "seq")
    q = jax.ShapeDtypeStruct((SIZE, 1, 256, 2, 64), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    positions = jax.ShapeDtypeStruct((SIZE, 256), jnp.int32, sharding=NamedSharding(mesh, PartitionSpec(None, "seq")))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(spec, PartitionSpec(None, "seq")), out_specs=spec, check_vma=True
    )
    @jax.vmap
    def attend(q, positions):
        return ring_attention_shard(
            q, q, q, axis_name="seq", positions=positions, is_causal=True, implementation="triton"
        )

    text = jax.jit(jax.grad(lambda q, p: attend(q, p).astype(jnp.float32).sum())).lower(q, positions).as_text()
    assert "triton_kernel_call" in text
    assert "stablehlo.while" in text
