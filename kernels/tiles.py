"""From a block's mask to the tiles a kernel visits: cheap integer work outside the kernel, linear in the tokens.

For every row tile (a tile of queries, or of keys in a dK/dV kernel) four numbers say which column tiles it meets:

    [start, full_start)     partial: computed with the mask
    [full_start, full_end)  full:    every pair is visible, computed without the mask
    [full_end, end)         partial

Tiles outside [start, end) are empty and never computed. The bounds are conservative: a partial tile may turn out to be
empty or full, never the other way round. Tiles that reach past the end of an array are always partial.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from .contract import BlockMask

_INT32_MAX = jnp.iinfo(jnp.int32).max


class TileRanges(NamedTuple):
    """Column tiles of every row tile, see the module's text; the leading dim is 1 without segment ids or merged.

    Of a mask with a stack of blocks, the leading dim is that of the blocks.
    """

    start: Int32[Array, "B R"]
    full_start: Int32[Array, "B R"]
    full_end: Int32[Array, "B R"]
    end: Int32[Array, "B R"]


class _Extent(NamedTuple):
    """The smallest and largest value of each tile; `low > high` in a tile without any."""

    low: Int32[Array, "B tiles"]
    high: Int32[Array, "B tiles"]


class TileSummary(NamedTuple):
    """All that the ranges need to know of the tiles of one side of a block; B is 1 where the batch does not matter."""

    whole: Bool[Array, "1 tiles"]
    positions: _Extent
    segment_ids: _Extent | None
    documents: _Extent | None

    def only(self, tile: Int32[Array, ""]) -> "TileSummary":
        """The summary of one tile alone, as a side of a single tile."""
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, tile, 1, axis=1), self)


def summarize_tiles(
    positions: Int32[Array, " L"] | Int32[Array, "blocks L"], segment_ids: Int32[Array, "B L"] | None, tile: int
) -> TileSummary:
    """The summary of one side of a block, cut into tiles of `tile` tokens; linear in the tokens.

    Positions of several blocks give a summary with the blocks in place of the batch.
    """
    assert positions.ndim == 1 or segment_ids is None
    segments = documents = None
    if segment_ids is not None:
        segments, documents = _extent(segment_ids, tile), _extent(segment_ids, tile, ignore_zero=True)
    whole = _whole_tiles(positions.shape[-1], tile)[None]
    return TileSummary(whole, _extent(jnp.atleast_2d(positions), tile), segments, documents)


def key_ranges(mask: BlockMask, q_tile: int, k_tile: int, *, merge_batch: bool = False) -> TileRanges:
    """For every tile of `q_tile` queries, the tiles of `k_tile` keys to visit.

    With `merge_batch` one set of ranges serves all rows of the batch: a tile is visited if any row needs it, and full
    if it is full in all of them. For a moment it takes memory for every pair of tiles; `key_ranges_between` of one
    query tile at a time does not.
    """
    return key_ranges_between(*_summaries(mask, q_tile, k_tile), mask.is_causal, merge_batch=merge_batch)


def query_ranges(mask: BlockMask, q_tile: int, k_tile: int, *, merge_batch: bool = False) -> TileRanges:
    """For every tile of `k_tile` keys, the tiles of `q_tile` queries to visit. `merge_batch` as in `key_ranges`."""
    return query_ranges_between(*_summaries(mask, q_tile, k_tile), mask.is_causal, merge_batch=merge_batch)


def key_ranges_between(q: TileSummary, k: TileSummary, is_causal: bool, *, merge_batch: bool = False) -> TileRanges:
    """`key_ranges` from the two sides' summaries, maybe of one query tile alone."""
    return _ranges(*_classify(q, k, is_causal, merge_batch))


def query_ranges_between(q: TileSummary, k: TileSummary, is_causal: bool, *, merge_batch: bool = False) -> TileRanges:
    """`query_ranges` from the two sides' summaries, maybe of one key tile alone."""
    empty, full = _classify(q, k, is_causal, merge_batch)
    return _ranges(empty.swapaxes(1, 2), full.swapaxes(1, 2))


def _summaries(mask: BlockMask, q_tile: int, k_tile: int) -> tuple[TileSummary, TileSummary]:
    return (
        summarize_tiles(mask.q_positions, mask.q_segment_ids, q_tile),
        summarize_tiles(mask.k_positions, mask.k_segment_ids, k_tile),
    )


def _classify(
    q: TileSummary, k: TileSummary, is_causal: bool, merge_batch: bool
) -> tuple[Bool[Array, "B Q K"], Bool[Array, "B Q K"]]:
    """Whether each pair of tiles is surely empty, and whether it is surely full."""
    full = q.whole[:, :, None] & k.whole[:, None, :]
    empty = jnp.zeros_like(full)
    if is_causal:
        empty |= q.positions.high[:, :, None] < k.positions.low[:, None, :]
        full &= q.positions.low[:, :, None] >= k.positions.high[:, None, :]
    if q.segment_ids is not None and k.segment_ids is not None:
        assert q.documents is not None
        assert k.documents is not None
        nothing = (q.documents.low > q.documents.high)[:, :, None] | (k.documents.low > k.documents.high)[:, None, :]
        apart = q.documents.high[:, :, None] < k.documents.low[:, None, :]
        empty = empty | nothing | apart | (k.documents.high[:, None, :] < q.documents.low[:, :, None])
        q_ids, k_ids = q.segment_ids, k.segment_ids
        one_document = ((q_ids.low == q_ids.high) & (q_ids.low != 0))[:, :, None] & (k_ids.low == k_ids.high)[
            :, None, :
        ]
        full = full & one_document & (q_ids.low[:, :, None] == k_ids.low[:, None, :])
    full &= ~empty
    if merge_batch:
        return empty.all(axis=0, keepdims=True), full.all(axis=0, keepdims=True)
    return empty, full


def _ranges(empty: Bool[Array, "B R C"], full: Bool[Array, "B R C"]) -> TileRanges:
    columns = lax.broadcasted_iota(jnp.int32, empty.shape, 2)
    num_columns = empty.shape[-1]
    start = jnp.min(jnp.where(empty, num_columns, columns), axis=-1)
    end = jnp.max(jnp.where(empty, 0, columns + 1), axis=-1)
    start = jnp.minimum(start, end)
    # Only one run of full tiles is named: the first. Without documents there is never a second one. No bound is found
    # by way of another, so that one pass over the pairs of tiles finds them all.
    full_start = jnp.minimum(jnp.min(jnp.where(full, columns, num_columns), axis=-1), end)
    after_full = ~full & jnp.pad(full, ((0, 0), (0, 0), (1, 0)))[..., :-1]
    full_end = jnp.minimum(jnp.min(jnp.where(after_full, columns, num_columns), axis=-1), end)
    return TileRanges(start, full_start, full_end, end)


def _extent(values: Int32[Array, "B L"], tile: int, ignore_zero: bool = False) -> _Extent:
    """Extent of the values in each tile; values past the end, and zeros if ignored, do not count."""
    low = high = values
    if ignore_zero:
        low, high = jnp.where(values == 0, _INT32_MAX, values), jnp.where(values == 0, -_INT32_MAX, values)
    pad = ((0, 0), (0, -values.shape[1] % tile))
    low = jnp.pad(low, pad, constant_values=_INT32_MAX).reshape(values.shape[0], -1, tile)
    high = jnp.pad(high, pad, constant_values=-_INT32_MAX).reshape(values.shape[0], -1, tile)
    return _Extent(low.min(axis=-1), high.max(axis=-1))


def _whole_tiles(length: int, tile: int) -> Bool[Array, " tiles"]:
    return jnp.arange(1, -(-length // tile) + 1, dtype=jnp.int32) * tile <= length
