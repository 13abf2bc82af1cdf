"""The Mosaic GPU kernels compiled for Hopper without a GPU: registers, memory, and where loops wait."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks import machine_code
from benchmarks.registers import Usage, compile_mosaic
from ring_jax.cluster import compile_only_devices
from ring_jax.kernels import mosaic_gpu, mosaic_gpu_choices, mosaic_gpu_split
from ring_jax.kernels.contract import AttentionState, BlockMask


@pytest.mark.parametrize(
    ("head_dim", "num_blocks", "has_state", "is_last", "at_once"),
    [
        (128, None, False, True, 1),
        (128, None, False, False, 1),
        (128, 1, True, False, 1),
        (128, 8, True, False, 1),
        (128, 8, True, True, 1),
        (128, 8, True, False, 2),
        (128, 8, True, True, 2),
        (128, 8, True, False, 3),
        (128, 8, True, True, 4),
        (96, 8, True, False, 1),
    ],
)
def test_forward_with_ranges_of_steps_compiles_without_spills(head_dim, num_blocks, has_state, is_last, at_once):
    """Of an only, a first, a middle and a last block, the latter two of several that are named, also several at once.

    No array is copied.
    """
    queries, keys, heads, kv_heads = 17 * 128, 8192, 8, 2
    sharding = jax.sharding.SingleDeviceSharding(compile_only_devices("h100")[0])

    def array(shape, dtype=jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def run(query, key, value, state, q_positions, k_positions, block):
        is_even = num_blocks is not None
        block = block if num_blocks == 8 else None
        mask = BlockMask(q_positions, k_positions, None, None, is_causal=is_even, is_even=is_even, block=block)
        keys, values = (key, value) if at_once == 1 else ((key,) * at_once, (value,) * at_once)
        return mosaic_gpu.forward(query, keys, values, state, mask, scale=head_dim**-0.5, is_last=is_last)

    query, key = array((1, queries, heads, head_dim)), array((1, keys, kv_heads, head_dim))
    state = AttentionState(array(query.shape, jnp.float32), array((1, heads, queries), jnp.float32))
    k_positions = array((8, at_once * keys) if num_blocks == 8 else (at_once * keys,), jnp.int32)
    in_place = has_state and not is_last
    args = (
        query,
        key,
        key,
        state if has_state else None,
        array((queries,), jnp.int32),
        k_positions,
        array((), jnp.int32),
    )
    compiled, usage = compile_mosaic(jax.jit(run, donate_argnums=3 if in_place else ()), *args)
    assert [use for use in usage if use.spills or use.serialized] == []
    _check_waits_for_values(usage)
    # Of several blocks for tiles of each of two lengths.
    parts = min(at_once, 2) * 132 * 128 * (head_dim + 2) * 4
    memory = compiled.memory_analysis()
    assert memory is not None
    assert parts <= memory.temp_size_in_bytes < 1.1 * parts
    assert memory.alias_size_in_bytes == in_place * 4 * (math.prod(query.shape) + heads * queries)


@pytest.mark.parametrize(
    ("head_dim", "kind"),
    [
        *((head_dim, kind) for head_dim in (64, 128) for kind in ("only block", "of several blocks")),
        *((128, kind) for kind in ("causal", "two of several blocks", "only block, long")),
    ],
)
def test_backward_with_shared_key_tiles_compiles_without_spills(head_dim, kind, taken_stretches):
    """8 key heads of 128 tiles, or half of them, are no multiple of 132. Beside their parts no array is made.

    Through the queries of a long block programs go by stretches.
    """
    tokens = 65536 if kind.endswith("long") else 16384
    heads, kv_heads, is_even = 32, 8, not kind.startswith("only block")
    sharding = jax.sharding.SingleDeviceSharding(compile_only_devices("h100")[0])

    def array(shape, dtype=jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    at_once, is_named = 1 + kind.startswith("two"), kind.endswith("of several blocks")

    def run(query, key, value, d_out, lse, delta, dq, sums, q_positions, k_positions, block):
        block = block if is_named else None
        mask = BlockMask(q_positions, k_positions, None, None, is_causal=is_even, is_even=is_even, block=block)
        keys, values = (key, value) if at_once == 1 else ((key, key), (value, value))
        args = query, keys, values, d_out, lse, delta, dq, sums if is_even else None, mask
        return mosaic_gpu.backward(*args, scale=head_dim**-0.5, is_only=not is_even)

    query, key = array((1, tokens, heads, head_dim)), array((1, tokens, kv_heads, head_dim))
    of_rows, k_shape = array((1, heads, tokens), jnp.float32), (8, at_once * tokens) if is_named else (tokens,)
    sums = array((1, 2, *key.shape[1:]), jnp.float32)
    sums = sums if at_once == 1 else (sums, sums)
    args = (
        *(query, key, key, query, of_rows, of_rows, array(query.shape, jnp.float32), sums),
        *(array((tokens,), jnp.int32), array(k_shape, jnp.int32), array((), jnp.int32)),
    )
    compiled, usage = compile_mosaic(jax.jit(run, donate_argnums=(6, 7) if is_even else 6), *args)
    assert set(taken_stretches) == {32 if kind.endswith("long") else 1}
    assert [use for use in usage if use.spills or use.serialized] == []
    places = [int(n) for n in re.findall(rf"f32\[(\d+),2,2,64,{head_dim}\]", compiled.as_text() or "")]
    assert places, "no key tile is shared"
    # XLA makes one of equal operands, zeros say: what the kernel writes would be two names for one array.
    (call,) = re.findall(r"custom-call\((.*?)\), custom_call_target=\"mosaic_gpu", compiled.as_text() or "")
    operands = re.findall(r"%[\w.-]+", call)
    # Here two blocks have the same keys and values.
    assert len(operands) - len(set(operands)) == 2 * (at_once - 1)
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < 1.05 * places[0] * 4 * 4 * 64 * head_dim
    of_sums = sum(math.prod(x.shape) for x in jax.tree.leaves(sums))
    assert memory.alias_size_in_bytes == 4 * (math.prod(query.shape) + is_even * of_sums)


# What the masks of the kernels that are compiled below hold.
MASKS = ["positions", "positions of several blocks", "segment ids"]


@pytest.mark.parametrize("mask_of", MASKS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_forward_compiles_for_hopper_in_place_without_spills(head_dim, mask_of):
    q, k, state, mask = _shapes(head_dim, mask_of)
    forward = jax.jit(lambda *args: mosaic_gpu.forward(*args, scale=0.1), donate_argnums=3)
    _check_waits_for_values(_check_compiled(forward, (q, k, k, state, mask), jax.tree.leaves(state)))


@pytest.mark.parametrize("mask_of", MASKS)
@pytest.mark.parametrize(("head_dim", "has_state"), [(128, False), (128, True), (64, False)])
def test_last_block_compiles_without_spills_and_writes_no_float32_output(head_dim, has_state, mask_of):
    q, k, state, mask = _shapes(head_dim, mask_of)
    forward = jax.jit(lambda *args: mosaic_gpu.forward(*args, scale=0.1, is_last=True))
    _check_waits_for_values(_check_compiled(forward, (q, k, k, state if has_state else None, mask), []))


@pytest.mark.parametrize(
    ("head_dim", "backward", "mask_of"),
    [
        (64, mosaic_gpu.backward, MASKS[0]),
        *((128, mosaic_gpu.backward, mask_of) for mask_of in MASKS),
        *((64, mosaic_gpu.deterministic_backward, mask_of) for mask_of in MASKS[:2]),
        *((256, mosaic_gpu.backward, mask_of) for mask_of in MASKS[:2]),
    ],
)
def test_backward_compiles_for_hopper_in_place_without_spills(head_dim, backward, mask_of):
    q, k, state, mask = _shapes(head_dim, mask_of)
    _check_backward(backward, q, k, state, mask)


@pytest.mark.parametrize(
    ("head_dim", "kv_heads", "mask_of", "spills"), [(64, 2, MASKS[1], 16), (64, 2, MASKS[2], 28), (128, 8, MASKS[2], 8)]
)
def test_backward_spills_no_more_than_it_did(head_dim, kv_heads, mask_of, spills):
    """What is left of spills, outside of the loop of full tiles: 0 is wanted."""
    q, k, state, mask = _shapes(head_dim, mask_of, kv_heads)
    _check_backward(mosaic_gpu.backward, q, k, state, mask, most_spills=spills)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_backward_of_an_even_block_with_as_many_key_heads_compiles_without_spills(head_dim):
    q, k, state, mask = _shapes(head_dim, kv_heads=8)
    _check_backward(mosaic_gpu.backward, q, k, state, dataclasses.replace(mask, is_even=True))


@pytest.mark.parametrize("is_only", [False, True])
@pytest.mark.parametrize(
    ("is_causal", "kv_heads", "multiprocessors", "order"),
    [
        (False, 2, 64, ["kv_heads", "key_tiles", "batch"]),
        (True, 2, 64, ["key_tiles", "kv_heads", "batch"]),
        (True, 2, 16, ["kv_heads", "key_tiles", "batch"]),
        (True, 8, 48, ["kv_groups", "key_tiles", "kv_heads", "batch"]),
    ],
)
def test_every_order_of_the_grid_compiles_without_spills(
    is_causal, kv_heads, multiprocessors, order, is_only, monkeypatch
):
    """All heads together, one after the other, or some together. No program is shared."""
    monkeypatch.setattr(mosaic_gpu_split, "MULTIPROCESSORS", 64)
    monkeypatch.setattr(mosaic_gpu_choices, "MULTIPROCESSORS", multiprocessors)
    q, k, state, mask = _shapes(128, kv_heads=kv_heads)
    mask = dataclasses.replace(mask, is_causal=is_causal)
    config = mosaic_gpu_choices.default_backward_config(128)
    assert list(mosaic_gpu_choices.backward_grid(mask, kv_heads, 32, 1, config)) == order
    _check_backward(mosaic_gpu.backward, q, k, state, mask, is_only=is_only)


def _shapes(head_dim: int, mask_of: str = MASKS[0], kv_heads: int = 2) -> Any:
    """A causal GQA block of 4096 tokens on an H100 that is not there."""
    sharding = jax.sharding.SingleDeviceSharding(compile_only_devices("h100")[0])

    def array(shape, dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    q, k = (array((1, 4096, heads, head_dim), jnp.bfloat16) for heads in (8, kv_heads))
    state = AttentionState(array(q.shape, jnp.float32), array((1, 8, 4096), jnp.float32))
    positions, ids = array((4096,), jnp.int32), array((1, 4096), jnp.int32) if mask_of == "segment ids" else None
    if mask_of == "positions of several blocks":
        of_several = array((8, 4096), jnp.int32)
        return q, k, state, BlockMask(positions, of_several, None, None, is_causal=True, block=array((), jnp.int32))
    return q, k, state, BlockMask(positions, positions, ids, ids, is_causal=True)


def _check_waits_for_values(usage: list[Usage]) -> None:
    """Every loop of the forward waits for the next values while the last quarter of its exponentials is computed."""
    for use in usage:
        found = machine_code.loops(use.ptx)
        assert found
        for loop in found:
            assert 0.7 <= loop.waits[-1] / loop.exponentials <= 0.95, loop


def _check_backward(backward, q, k, state, mask, *, is_only: bool = False, most_spills: int = 0) -> None:
    """Of one block, or of one whose gradients are added to sums where one kernel computes them."""
    is_fused = backward is mosaic_gpu.backward and q.shape[3] <= mosaic_gpu.MAX_FUSED_HEAD_DIM
    sums = jax.ShapeDtypeStruct((k.shape[0], 2, *k.shape[1:]), jnp.float32, sharding=k.sharding)
    sums = sums if is_fused and not is_only else None
    run = jax.jit(lambda *args: backward(*args, scale=0.1, is_only=is_only), donate_argnums=(6, 7))
    args = (q, k, k, q, state.lse, state.lse, state.output, sums, mask)
    _check_compiled(run, args, [state.output, *jax.tree.leaves(sums)], most_spills=most_spills)


def _check_compiled(function, args, donated, *, most_spills: int = 0) -> list[Usage]:
    """Nothing is spilled, or so many bytes at most, and no temporary is as large as an array.

    What is donated is updated where it lies.
    """
    compiled, usage = compile_mosaic(function, *args)
    assert usage
    assert [use for use in usage if use.spills > most_spills or use.serialized] == []
    memory = compiled.memory_analysis()
    assert memory is not None
    donated_bytes = sum(4 * array.size for array in donated)
    assert memory.alias_size_in_bytes == donated_bytes
    smallest_output = 4096 * 8 * 64 * 2
    assert memory.temp_size_in_bytes < smallest_output / 100
    return usage
