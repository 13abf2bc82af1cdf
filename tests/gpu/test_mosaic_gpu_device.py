"""The Mosaic GPU kernels on a Hopper GPU, as CONTRIBUTING.md says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ring_jax.kernels import mosaic_gpu, mosaic_gpu_choices, mosaic_gpu_deterministic
from ring_jax.kernels.contract import AttentionState, BlockMask
from ring_jax.kernels.mosaic_gpu_queue import Queue
from ring_jax.kernels.reference import reference_attention, visible_pairs
from ring_jax.kernels.tiles import key_ranges
from tests.block_cases import Case, arrays, blocks, failures

pytestmark = pytest.mark.gpu

# Trying out matrix products for the code around the kernels takes longer than all the rest of these tests.
_OPTIONS = {"xla_gpu_autotune_level": 0}
KERNELS = {"fused": mosaic_gpu, "deterministic": mosaic_gpu_deterministic}
CASES = [
    Case(queries=520, keys=333, num_blocks=3, heads=6, kv_heads=2, head_dim=128, by_index=True),
    Case(queries=512, keys=512, heads=2, kv_heads=2, head_dim=128),
    Case(queries=520, keys=333, heads=4, kv_heads=1, head_dim=128, has_segments=True, batch=2),
    Case(dtype="float16", queries=320, keys=512, heads=4, kv_heads=2, head_dim=64, shuffled=True),
    Case(queries=384, keys=257, heads=1, kv_heads=1, head_dim=256),
    Case(dtype="float16", queries=384, keys=384, heads=3, kv_heads=3, head_dim=96, is_causal=False),
    Case(queries=257, keys=1, heads=2, kv_heads=1, head_dim=80),
    Case(queries=1, keys=300, heads=1, kv_heads=1, head_dim=32, is_causal=False),
    Case(queries=768, keys=768, heads=2, kv_heads=1, head_dim=64, has_segments=True, shuffled=True),
    Case(queries=520, keys=520, num_blocks=1, heads=4, kv_heads=2, head_dim=128),
    Case(queries=520, keys=333, num_blocks=3, heads=6, kv_heads=2, head_dim=128),
    Case(queries=400, keys=400, num_blocks=3, heads=4, kv_heads=2, head_dim=64, is_causal=False),
    Case(queries=512, keys=1024, num_blocks=2, heads=2, kv_heads=1, head_dim=128, is_causal=False, rising=True),
    Case(dtype="float16", queries=400, keys=1000, heads=2, kv_heads=1, head_dim=64, rising=True),
    # Several blocks at once.
    Case(queries=2048, keys=512, num_blocks=9, heads=4, kv_heads=1, head_dim=128, at_once=4, by_index=True),
    Case(queries=1024, keys=512, num_blocks=3, heads=4, kv_heads=1, head_dim=128, is_even=True, at_once=2),
    Case(queries=512, keys=1024, num_blocks=5, heads=2, kv_heads=2, head_dim=128, is_causal=False, at_once=2),
    Case(queries=2048, keys=768, num_blocks=5, heads=4, kv_heads=1, head_dim=128, at_once=2, by_index=True),
    # Key tiles whose steps several programs share.
    Case(queries=2048, keys=512, num_blocks=1, heads=4, kv_heads=1, head_dim=128, is_causal=False),
    Case(queries=4096, keys=512, heads=2, kv_heads=1, head_dim=64, is_causal=False, batch=2),
    Case(queries=4096, keys=1024, heads=4, kv_heads=1, head_dim=128, is_even=True),
    # And query tiles whose steps are cut into ranges.
    Case(queries=384, keys=32768, num_blocks=1, heads=1, kv_heads=1, head_dim=128, is_causal=False),
    Case(dtype="float16", queries=200, keys=33000, heads=2, kv_heads=1, head_dim=128, is_causal=False, batch=2),
    Case(queries=1024, keys=32768, heads=1, kv_heads=1, head_dim=128, is_even=True),
    Case(queries=384, keys=16384, num_blocks=3, heads=2, kv_heads=1, head_dim=128, is_causal=False),
    Case(queries=1024, keys=16384, num_blocks=3, heads=1, kv_heads=1, head_dim=128, is_even=True, by_index=True),
]


@pytest.mark.parametrize(
    ("case", "backward"),
    [(case, "fused") for case in CASES] + [(case, "deterministic") for case in CASES[:4]],
    ids=str,
)
def test_device_agrees_with_the_oracle(case, backward):
    run = jax.jit(lambda data: blocks(case)(KERNELS[backward], data), compiler_options=_OPTIONS)
    found = run(arrays(case))
    assert failures(case, {name: np.asarray(value) for name, value in found.items()}) == []


@pytest.mark.parametrize(("keys", "shares"), [(132 * 128, False), (2048, True)])
def test_stretches_of_the_queries_agree_with_the_oracle(keys, shares, monkeypatch, taken_stretches):
    monkeypatch.setattr(mosaic_gpu_choices, "_STRETCH_LEN", 256)
    monkeypatch.setattr(mosaic_gpu_choices, "_STEPS_FOR_STRETCHES", 1)
    positions = jnp.arange(8, dtype=jnp.int32)
    mask = BlockMask(positions, positions, None, None, is_causal=False)
    assert (mosaic_gpu_choices.backward_splits(mask, 2, keys // 128, 1, 32) is not None) == shares
    case = Case(queries=1024, keys=keys, num_blocks=1, heads=4, kv_heads=2, head_dim=128, is_causal=False)
    run = jax.jit(lambda data: blocks(case)(mosaic_gpu, data), compiler_options=_OPTIONS)
    found = run(arrays(case))
    assert set(taken_stretches) == {4}
    assert failures(case, {name: np.asarray(value) for name, value in found.items()}) == []


@pytest.mark.parametrize("head_dim", [128, 256])
def test_two_runs_give_identical_bits(head_dim):
    case = Case(queries=2048, keys=2048, heads=8, kv_heads=2, head_dim=head_dim)
    run = jax.jit(lambda data: blocks(case)(mosaic_gpu_deterministic, data), compiler_options=_OPTIONS)
    first, second = run(arrays(case)), run(arrays(case))
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_two_runs_of_shared_query_tiles_give_identical_bits():
    case = Case(queries=17024, keys=32768, num_blocks=1, heads=1, kv_heads=1, head_dim=128, is_causal=False)
    data = arrays(case)
    q_positions, k_positions = (jnp.arange(n, dtype=jnp.int32) for n in (case.queries, case.keys))
    mask = BlockMask(q_positions, k_positions, None, None, is_causal=False)
    queue = Queue.of(
        1, case.queries // 128, 1, heads_together=1, visits_empty=True, range_steps=256, waves=1, one_each=False
    )
    work = queue.work(key_ranges(mask, 128, 128))
    assert work is not None
    assert work.left_over.max() > 0
    run = jax.jit(lambda q, k, v: mosaic_gpu.forward(q, k, v, None, mask, scale=case.scale, is_last=True))
    one, other = (run(data["query"], data["key"], data["value"]) for _ in range(2))
    np.testing.assert_array_equal(one.output, other.output)
    np.testing.assert_array_equal(one.lse, other.lse)


@pytest.mark.parametrize("has_segments", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_nan_beyond_the_tail_stays_there(head_dim, sign, has_segments):
    """The rows that a tile reads past the end of one sequence are the next sequence's, and those are NaN here.

    The kernels end all the same, though waits are for numbers that are made of them.
    """
    case = Case(batch=2, queries=203, keys=203, heads=2, kv_heads=2, head_dim=head_dim, has_segments=has_segments)
    data = arrays(case)
    for name in ("query", "key", "value", "d_out"):
        data[name][1] = np.copysign(np.nan, sign)
    found = jax.jit(lambda data: blocks(case)(mosaic_gpu, data), compiler_options=_OPTIONS)(data)
    for name, value in found.items():
        value = np.asarray(value)[0]
        # Rows that see no key have the lse -inf.
        assert (np.isfinite(value) | np.isneginf(value)).all(), name


def test_arrays_past_two_to_the_31_elements():
    num_queries, num_keys, heads, head_dim = 2**19 + 64, 256, 32, 128
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (1, num_queries, heads, head_dim), jnp.bfloat16)
    key, value = (jax.random.normal(k, (1, num_keys, 8, head_dim), jnp.bfloat16) for k in keys[1:3])
    assert query.size > 2**31
    k_positions = jnp.arange(num_keys, dtype=jnp.int32)
    mask = BlockMask(jnp.arange(num_queries, dtype=jnp.int32), k_positions, None, None, is_causal=True)

    @jax.jit
    def both(query, key, value):
        state = AttentionState(
            jnp.zeros(query.shape, jnp.float32), jnp.full((1, heads, num_queries), -jnp.inf, jnp.float32)
        )
        state = mosaic_gpu.forward(query, key, value, state, mask, scale=head_dim**-0.5)
        delta = jnp.sum(query.astype(jnp.float32) * state.output, axis=-1).swapaxes(1, 2)
        dq = jnp.zeros(query.shape, jnp.float32)
        cotangents = (query, state.lse, delta, dq, None, mask)
        gradients = mosaic_gpu.backward(query, key, value, *cotangents, scale=head_dim**-0.5)
        dq = mosaic_gpu.finished_d_query(gradients.dq, scale=head_dim**-0.5)
        return state.output[:, -100:], dq[:, -100:]

    output, dq = both(query, key, value)
    last = np.asarray(query[:, -100:])
    visible = visible_pairs(np.arange(num_keys, num_keys + 100), np.arange(num_keys), is_causal=True)
    want = reference_attention(last, np.asarray(key), np.asarray(value), visible, d_out=last)
    for found, exact in ((output, want.output), (dq, want.dq)):
        assert np.abs(np.asarray(found) - exact).max() < 1e-2 * np.abs(exact).max()
