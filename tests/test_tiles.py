"""Tile ranges against the dense mask: nothing visible is left out, nothing hidden is called full."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring_jax.kernels.contract import BlockMask
from ring_jax.kernels.reference import visible_pairs
from ring_jax.kernels.tiles import TileRanges, key_ranges, query_ranges
from ring_jax.layouts import LAYOUTS, shard_positions

Q_TILE, K_TILE = 4, 3


@functools.partial(jax.jit, static_argnames=("q_tile", "k_tile", "merge_batch"))
def _both_ranges(mask: BlockMask, q_tile: int, k_tile: int, merge_batch: bool) -> tuple[TileRanges, TileRanges]:
    return (
        key_ranges(mask, q_tile, k_tile, merge_batch=merge_batch),
        query_ranges(mask, q_tile, k_tile, merge_batch=merge_batch),
    )


def _dense_tiles(visible: np.ndarray, q_tile: int, k_tile: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every tile: whether any pair in it is visible, and whether all are and it is a whole tile."""
    batch, queries, keys = visible.shape
    padded = np.pad(visible, ((0, 0), (0, -queries % q_tile), (0, -keys % k_tile)))
    tiles = padded.reshape(batch, padded.shape[1] // q_tile, q_tile, padded.shape[2] // k_tile, k_tile)
    return tiles.any(axis=(2, 4)), tiles.all(axis=(2, 4))


def _check_sound(mask: BlockMask, merge_batch: bool, q_tile: int = Q_TILE, k_tile: int = K_TILE) -> None:
    dense = jax.tree.map(np.asarray, mask)
    visible = visible_pairs(
        dense.q_positions, dense.k_positions, dense.q_segment_ids, dense.k_segment_ids, is_causal=mask.is_causal
    )
    some, full = _dense_tiles(visible, q_tile, k_tile)
    if merge_batch:
        some, full = some.any(axis=0, keepdims=True), full.all(axis=0, keepdims=True)
    by_query, by_key = _both_ranges(mask, q_tile, k_tile, merge_batch)
    by_rows = (by_query, some, full), (by_key, some.swapaxes(1, 2), full.swapaxes(1, 2))
    for ranges, some_visible, all_visible in by_rows:
        start, full_start, full_end, end = (np.asarray(x)[..., None] for x in ranges)
        columns = np.arange(some_visible.shape[-1])
        visited = (start <= columns) & (columns < end)
        unmasked = (full_start <= columns) & (columns < full_end)
        assert (start <= end).all()
        assert not (some_visible & ~visited).any(), "a tile with visible pairs is not visited"
        assert not (unmasked & ~all_visible).any(), "a tile with hidden pairs is computed without the mask"
        assert not (unmasked & ~visited).any(), "a full tile outside the visited range"
        # The kernel walks [start, full_start), [full_start, full_end), [full_end, end): each tile exactly once.
        walked = sum(
            (low <= columns) & (columns < high)
            for low, high in ((start, full_start), (full_start, full_end), (full_end, end))
        )
        np.testing.assert_array_equal(walked, visited.astype(int))


@settings(max_examples=150, derandomize=True, deadline=None, database=None)
@given(data=st.data())
def test_ranges_are_sound_for_any_mask(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31 - 1)))
    queries, keys, batch = 18, 16, 2

    def positions(count: int) -> np.ndarray:
        drawn = rng.integers(0, data.draw(st.sampled_from((1, 4, 20, 2**31 - 1))), count)
        return np.sort(drawn) if data.draw(st.booleans()) else drawn

    def segment_ids(count: int) -> np.ndarray:
        drawn = rng.integers(0, data.draw(st.integers(1, 4)), (batch, count))
        return np.repeat(drawn, data.draw(st.integers(1, count)), axis=1)[:, :count]

    with_segments = data.draw(st.booleans())
    mask = BlockMask(
        jnp.asarray(positions(queries), jnp.int32),
        jnp.asarray(positions(keys), jnp.int32),
        jnp.asarray(segment_ids(queries), jnp.int32) if with_segments else None,
        jnp.asarray(segment_ids(keys), jnp.int32) if with_segments else None,
        data.draw(st.booleans()),
    )
    _check_sound(mask, merge_batch=data.draw(st.booleans()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("q_tile", "k_tile"), [(4, 4), (4, 8), (8, 4), (16, 3)])
def test_ranges_are_sound_for_every_pair_of_shards(layout: str, q_tile: int, k_tile: int):
    shards, shard_len = 4, 24
    for rank, owner in np.ndindex(shards, shards):
        own, theirs = (shard_positions(layout, int(r), shard_len, shards) for r in (rank, owner))
        _check_sound(BlockMask(own, theirs, None, None, True), False, q_tile, k_tile)


def test_ranges_of_several_blocks_are_those_of_each_alone():
    own, *theirs = (shard_positions("striped", rank, 22, 4) for rank in range(4))
    several = BlockMask(own, jnp.stack(theirs), None, None, True, block=jnp.int32(0))
    for ranges_of in (key_ranges, query_ranges):
        of_several = ranges_of(several, 4, 8)
        for block in range(3):
            mask = dataclasses.replace(several, block=jnp.int32(block)).alone()
            np.testing.assert_array_equal(mask.k_positions, theirs[block])
            for found, expected in zip(of_several, ranges_of(mask, 4, 8), strict=True):
                np.testing.assert_array_equal(found[block], expected[0])


def test_causal_ranges_are_exact():
    """On the diagonal block of a contiguous layout, with tiles of 4: row r meets r full tiles, then one partial."""
    positions = jnp.arange(16, dtype=jnp.int32)
    by_query, by_key = _both_ranges(BlockMask(positions, positions, None, None, True), 4, 4, False)
    rows = [0, 1, 2, 3]
    np.testing.assert_array_equal(by_query.start[0], [0, 0, 0, 0])
    np.testing.assert_array_equal(by_query.full_start[0], [1, 0, 0, 0])  # row 0 has no full tile
    np.testing.assert_array_equal(by_query.full_end[0], [1, 1, 2, 3])
    np.testing.assert_array_equal(by_query.end[0], [1, 2, 3, 4])
    np.testing.assert_array_equal(by_key.start[0], rows)
    np.testing.assert_array_equal(by_key.full_start[0], [1, 2, 3, 4])
    np.testing.assert_array_equal(by_key.full_end[0], [4, 4, 4, 4])
    np.testing.assert_array_equal(by_key.end[0], [4, 4, 4, 4])


def test_unmasked_ranges_are_all_full_but_the_rest():
    positions = jnp.arange(14, dtype=jnp.int32)
    by_query, _ = _both_ranges(BlockMask(positions, positions, None, None, False), 4, 4, False)
    np.testing.assert_array_equal(by_query.start[0], [0, 0, 0, 0])
    np.testing.assert_array_equal(by_query.full_end[0] - by_query.full_start[0], [3, 3, 3, 0])
    np.testing.assert_array_equal(by_query.end[0], [4, 4, 4, 4])


def test_documents_cut_tiles_away():
    """Four documents of one tile each: every query tile meets its own key tile only, and without the mask."""
    positions = jnp.arange(16, dtype=jnp.int32)
    ids = jnp.repeat(jnp.arange(1, 5, dtype=jnp.int32), 4)[None]
    by_query, by_key = _both_ranges(BlockMask(positions, positions, ids, ids, False), 4, 4, False)
    for ranges in (by_query, by_key):
        np.testing.assert_array_equal(ranges.start[0], [0, 1, 2, 3])
        np.testing.assert_array_equal(ranges.full_start[0], [0, 1, 2, 3])
        np.testing.assert_array_equal(ranges.full_end[0], [1, 2, 3, 4])
        np.testing.assert_array_equal(ranges.end[0], [1, 2, 3, 4])


def test_padding_is_never_visited():
    positions = jnp.arange(16, dtype=jnp.int32)
    ids = jnp.asarray([[1] * 8 + [0] * 8, [0] * 16], jnp.int32)
    by_query, by_key = _both_ranges(BlockMask(positions, positions, ids, ids, True), 4, 4, False)
    np.testing.assert_array_equal(by_query.end - by_query.start, [[1, 2, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(by_key.end - by_key.start, [[2, 1, 0, 0], [0, 0, 0, 0]])
