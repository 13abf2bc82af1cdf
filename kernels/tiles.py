"""From a block's mask to the tiles a kernel visits: cheap integer work outside the kernel, linear in the tokens.

For every row tile (a tile of queries, or of keys in a dK/dV kernel) four numbers say which column tiles it meets:

    [start, full_start)     partial: computed with the mask
    [full_start, full_end)  full:    every pair is visible, computed without the mask
    [full_end, end)         partial

Tiles outside [start, end) are empty and never computed. The bounds are conservative: a partial tile may turn out to be
empty or full, never the other way round. Tiles that reach past the end of an array are always partial.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32

from .contract import BlockMask

_INT32_MAX = jnp.iinfo(jnp.int32).max


class TileRanges(NamedTuple):
    """Column tiles of every row tile, see the module's text. The leading dim is 1 without segment ids or when merged."""

    start: Int32[Array, "B R"]
    full_start: Int32[Array, "B R"]
    full_end: Int32[Array, "B R"]
    end: Int32[Array, "B R"]


class _Extent(NamedTuple):
    """The smallest and largest value of each tile; `low > high` in a tile without any."""

    low: Int32[Array, "B tiles"]
    high: Int32[Array, "B tiles"]


def key_ranges(mask: BlockMask, q_tile: int, k_tile: int, *, merge_batch: bool = False) -> TileRanges:
    """For every tile of `q_tile` queries, the tiles of `k_tile` keys to visit.

    With `merge_batch` one set of ranges serves all rows of the batch: a tile is visited if any row needs it, and full
    if it is full in all of them.
    """
    empty, full = _classify(mask, q_tile, k_tile, merge_batch)
    return _ranges(empty, full)


def query_ranges(mask: BlockMask, q_tile: int, k_tile: int, *, merge_batch: bool = False) -> TileRanges:
    """For every tile of `k_tile` keys, the tiles of `q_tile` queries to visit. `merge_batch` as in `key_ranges`."""
    empty, full = _classify(mask, q_tile, k_tile, merge_batch)
    return _ranges(empty.swapaxes(1, 2), full.swapaxes(1, 2))


def _classify(
    mask: BlockMask, q_tile: int, k_tile: int, merge_batch: bool
) -> tuple[Bool[Array, "B Q K"], Bool[Array, "B Q K"]]:
    """Whether each pair of tiles is surely empty, and whether it is surely full."""
    num_queries, num_keys = mask.q_positions.shape[0], mask.k_positions.shape[0]
    shape = (1, -(-num_queries // q_tile), -(-num_keys // k_tile))
    empty = jnp.zeros(shape, bool)
    full = _whole_tiles(num_queries, q_tile)[None, :, None] & _whole_tiles(num_keys, k_tile)[None, None, :]
    if mask.is_causal:
        q, k = _extent(mask.q_positions[None], q_tile), _extent(mask.k_positions[None], k_tile)
        empty |= q.high[:, :, None] < k.low[:, None, :]
        full &= q.low[:, :, None] >= k.high[:, None, :]
    if mask.q_segment_ids is not None and mask.k_segment_ids is not None:
        q, k = _extent(mask.q_segment_ids, q_tile), _extent(mask.k_segment_ids, k_tile)
        q_docs = _extent(mask.q_segment_ids, q_tile, ignore_zero=True)
        k_docs = _extent(mask.k_segment_ids, k_tile, ignore_zero=True)
        nothing = (q_docs.low > q_docs.high)[:, :, None] | (k_docs.low > k_docs.high)[:, None, :]
        apart = q_docs.high[:, :, None] < k_docs.low[:, None, :]
        empty |= nothing | apart | (k_docs.high[:, None, :] < q_docs.low[:, :, None])
        one_document = ((q.low == q.high) & (q.low != 0))[:, :, None] & (k.low == k.high)[:, None, :]
        full &= one_document & (q.low[:, :, None] == k.low[:, None, :])
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
    # Only one run of full tiles is named: the first. Without documents there is never a second one.
    full_start = jnp.minimum(jnp.min(jnp.where(full, columns, num_columns), axis=-1), end)
    broken = ~full & (columns >= full_start[..., None])
    full_end = jnp.minimum(jnp.min(jnp.where(broken, columns, num_columns), axis=-1), end)
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
