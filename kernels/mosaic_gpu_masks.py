"""What the Mosaic GPU kernels share about masks: the order of visiting tiles, and the mask of a partial tile."""

import functools
import operator
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int32

from .contract import BlockMask
from .mosaic_gpu_primitives import COLUMNS, ROWS, Ref, across_columns, across_rows

_AFTER_ALL = jnp.iinfo(jnp.int32).max


class Walk(NamedTuple):
    """The column tiles of one row tile in the order they are visited: the partial ones, then the full ones."""

    start: jax.Array
    before: jax.Array
    full_start: jax.Array
    full_end: jax.Array
    partial: jax.Array
    steps: jax.Array

    @classmethod
    def read(cls, ranges: Ref, mask: "MaskInputs", batch: jax.Array, row: jax.Array) -> "Walk":
        """The walk of row tile `row`, from references to the `TileRanges` of a mask."""
        first = 0 if ranges.start.shape[0] == 1 else batch if mask.block is None else mask.block[0]
        start, full_start, full_end, end = (field[first, row] for field in ranges)
        before = full_start - start
        return cls(start, before, full_start, full_end, before + end - full_end, end - start)

    def part(self, first: jax.Array, steps: jax.Array) -> "Walk":
        """The walk of so many steps from `first` on."""
        before, partial = jnp.maximum(self.before - first, 0), jnp.clip(self.partial - first, 0, steps)
        return self._replace(
            start=self.start + first,
            before=before,
            full_start=self.full_start + jnp.maximum(first - self.partial, 0),
            full_end=self.full_end + jnp.maximum(first - self.before, 0),
            partial=partial,
            steps=steps,
        )

    def tile(self, step: jax.Array) -> jax.Array:
        """The column tile of a step; steps below `partial` need the mask."""
        partial = jnp.where(step < self.before, self.start + step, self.full_end + step - self.before)
        return jnp.where(step < self.partial, partial, self.full_start + step - self.partial)


class MaskInputs(NamedTuple):
    """What masks are computed from: arrays (outside) or references (inside), padded to whole tiles.

    Positions are there if the mask is causal. Keys that are padding come after all queries, and belong to no segment.
    With `block`, which is read where it is needed lest it take a register through the kernels' loops, the key positions
    are those of several blocks.
    """

    q_positions: Int32[Array, " T"] | None
    k_positions: Int32[Array, " S"] | Int32[Array, "blocks S"] | None
    q_segment_ids: Int32[Array, "B T"] | None
    k_segment_ids: Int32[Array, "B S"] | None
    block: Int32[Array, "1"] | None

    @classmethod
    def of(cls, mask: BlockMask, q_tile: int, k_tile: int) -> "MaskInputs":
        is_causal = mask.is_causal
        return cls(
            pad_last(mask.q_positions, q_tile) if is_causal else None,
            pad_last(mask.k_positions, k_tile, _AFTER_ALL) if is_causal else None,
            None if mask.q_segment_ids is None else pad_last(mask.q_segment_ids, q_tile),
            None if mask.k_segment_ids is None else pad_last(mask.k_segment_ids, k_tile),
            mask.block[None] if is_causal and mask.block is not None else None,
        )

    def visible(
        self,
        batch: jax.Array,
        queries: pl.Slice,
        keys: pl.Slice,
        *,
        is_causal: bool,
        num_keys: int,
        keys_in_rows: bool = False,
    ) -> Bool[jax.Array, "rows columns"]:
        """Which pairs of some queries and keys attend, in the layout of a matrix product's result."""
        assert isinstance(queries.size, int)
        assert isinstance(keys.size, int)
        shape = (keys.size, queries.size) if keys_in_rows else (queries.size, keys.size)
        q_layout, k_layout = (COLUMNS, ROWS) if keys_in_rows else (ROWS, COLUMNS)
        spread_q, spread_k = (across_rows, across_columns) if keys_in_rows else (across_columns, across_rows)

        def pair(of_queries, of_keys):
            of_queries = plgpu.load(of_queries, layout=q_layout, optimized=False)
            of_keys = plgpu.load(of_keys, layout=k_layout, optimized=False)
            return spread_q(of_queries, shape), spread_k(of_keys, shape)

        conditions = []
        if not is_causal and self.q_segment_ids is None:
            index = plgpu.broadcasted_iota(jnp.int32, shape, 0 if keys_in_rows else 1, layout=plgpu.Layout.WGMMA)
            conditions.append(index < num_keys - keys.start)
        if is_causal:
            assert self.q_positions is not None
            assert self.k_positions is not None
            of_keys = keys if self.block is None else (self.block[0], keys)
            q_positions, k_positions = pair(self.q_positions.at[queries], self.k_positions.at[of_keys])
            conditions.append(q_positions >= k_positions)
        if self.q_segment_ids is not None and self.k_segment_ids is not None:
            q_ids, k_ids = pair(self.q_segment_ids.at[batch, queries], self.k_segment_ids.at[batch, keys])
            conditions.append((q_ids == k_ids) & (q_ids != 0))
        return functools.reduce(operator.and_, conditions)


def pad_last(values: jax.Array, tile: int, value: int = 0) -> jax.Array:
    """Pads the last dim to whole tiles, so that a tile's plain loads and stores stay inside the array."""
    padding = -values.shape[-1] % tile
    if not padding:
        return values
    return jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, padding)], constant_values=value)
