"""A program of the fused backward kernel on Hopper, and the warpgroup of it that copies all that it reads."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .mosaic_gpu_backward_block import Block, Scratch
from .mosaic_gpu_choices import BACKWARD_WARPGROUPS
from .mosaic_gpu_masks import Walk
from .mosaic_gpu_primitives import WARPGROUP_ROWS, Ref, slot_of
from .mosaic_gpu_split import Numbers, Place, Share, Splits
from .several_blocks import block_of_tile, for_block


class QueryPlace(NamedTuple):
    """Where a program is: in which stretch of query tiles, counted through the heads, and at which of its tiles.

    Tiles are numbered as if the stretch were a head's first one, partial ones by themselves. Places are counted:
    divisions of the step by the number of tiles would take longer.
    """

    stretch: jax.Array
    tile: jax.Array


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of the grid: its tile of keys, its share of the query tiles that see them, and its shared memory."""

    block: Block
    inputs: Ref
    dq: Ref
    scratch: Scratch
    batch: jax.Array
    kv_head: jax.Array
    key_tile: jax.Array
    walk: Walk
    # Steps are query tiles that see this key tile, those of all query heads of the group together. This program's:
    first_step: jax.Array
    steps: jax.Array
    # A program for which nothing is left does not exist, nor one that would add zeros.
    exists: jax.Array | bool

    @classmethod
    def here(cls, block: Block, inputs: Ref, dq: Ref, scratch: Scratch) -> "Program":
        if block.splits is None:
            batch, kv_head, key_tile = (lax.axis_index(name) for name in ("batch", "kv_heads", "key_tiles"))
            if block.heads_together:
                kv_head += lax.axis_index("kv_groups") * block.heads_together
            walk = Walk.read(inputs.ranges, inputs.mask, batch, key_tile)
            return cls(
                *(block, inputs, dq, scratch, batch, kv_head, key_tile, walk),
                *(jnp.int32(0), walk.steps * block.group, walk.steps > 0 if block.skips_hidden else True),
            )
        (batch, kv_head, key_tile, exists), share = place_and_share(block.splits, inputs)
        walk = Walk.read(inputs.ranges, inputs.mask, batch, key_tile)
        first, end = (walk.steps * block.group * unit // share.units for unit in (share.first, share.end))
        exists = exists & (walk.steps > 0) if block.skips_hidden else exists
        return cls(block, inputs, dq, scratch, batch, kv_head, key_tile, walk, first, end - first, exists)

    @property
    def has_segments(self) -> bool:
        return self.inputs.mask.q_segment_ids is not None

    @property
    def is_shared(self) -> bool:
        """Whether several programs may share a key tile."""
        return self.block.splits is not None

    @property
    def partial_steps(self) -> jax.Array:
        """How many of this program's steps, the first ones, need the mask."""
        partial = self.walk.partial * self.block.group
        return jnp.clip(partial - self.first_step, 0, self.steps) if self.is_shared else partial

    @property
    def first_full(self) -> jax.Array:
        """The full tile to begin with.

        Each program begins a few later than the one before it: programs of one head run side by side, and beginning
        with the same tiles they would add to the same dQ at once.
        """
        walk = self.walk
        if not self.block.tiles_apart:
            return walk.full_start
        num_full = jnp.maximum(self._by_stretches(walk.full_end - walk.full_start), 1)
        return walk.full_start + lax.rem(self.key_tile * self.block.tiles_apart, num_full)

    def begin(self, is_partial: bool) -> QueryPlace:
        """This program's first place among the partial or the full tiles."""
        start, end, first = self._tiles(is_partial)
        first_stretch = self.kv_head * self.block.group * self.block.stretches
        if not self.is_shared:
            return QueryPlace(jnp.int32(0), first)
        step = self.first_step - (0 if is_partial else self.walk.partial * self.block.group)
        tiles, step = jnp.maximum(end - start, 1), jnp.maximum(step, 0)
        return QueryPlace(first_stretch + step // tiles, start + lax.rem(first - start + step, tiles))

    def query_head(self, stretch: jax.Array) -> jax.Array:
        """The query head that a stretch is of."""
        head = self._by_stretches(stretch)
        return head if self.is_shared else self.kv_head * self.block.group + head

    def tile(self, place: QueryPlace, is_partial: bool) -> jax.Array:
        """The query tile of a place."""
        tile, stretches = place.tile, self.block.stretches
        if stretches > 1:
            start, end, _ = self._tiles(is_partial)
            tile += lax.rem(place.stretch, jnp.int32(stretches)) * (end - start)
        return self.walk.tile(tile) if is_partial else tile

    def after(self, place: QueryPlace, is_partial: bool) -> QueryPlace:
        """The next place: a stretch's other tiles, then the next stretch or head."""
        start, end, first = self._tiles(is_partial)
        tile = jnp.where(place.tile + 1 == end, start, place.tile + 1)
        return QueryPlace(jnp.where(tile == first, place.stretch + 1, place.stretch), tile)

    def _tiles(self, is_partial: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The first partial or full tile of a head's first stretch, the end of them, and the one to begin with."""
        if is_partial:
            return jnp.int32(0), self._by_stretches(self.walk.partial), jnp.int32(0)
        start, end = self.walk.full_start, self.walk.full_end
        return start, end if self.block.stretches == 1 else start + self._by_stretches(end - start), self.first_full

    def _by_stretches(self, number: jax.Array) -> jax.Array:
        """A number divided by that of a head's stretches."""
        return number if self.block.stretches == 1 else lax.div(number, jnp.int32(self.block.stretches))

    def note_place(self, warpgroup: jax.Array) -> None:
        """Notes the key head and the key tile for `noted_place`.

        If it is not the grid that tells, to know them through the loops would cost registers.
        """
        if self.is_shared:
            numbers = self.scratch.numbers
            numbers[warpgroup, 0], numbers[warpgroup, 1] = self.kv_head, self.key_tile
            plgpu.commit_smem()  # For its barrier: all threads have written before any reads.

    def noted_place(self, warpgroup: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The key head and the key tile, known again after the loops."""
        if not self.is_shared:
            return self.kv_head, self.key_tile
        return self.scratch.numbers[warpgroup, 0], self.scratch.numbers[warpgroup, 1]

    def for_block_of(self, key_tile: jax.Array, use: Callable[[int, jax.Array], None]) -> None:
        """Calls `use` with the block that a key tile is of, and the tile's number in it."""
        keys = self.inputs.keys
        block, tile = block_of_tile(key_tile, keys[0].shape[1] // self.block.config.k_tile, len(keys))
        for_block(block, len(keys), lambda number: use(number, tile))

    def slot(self, step: jax.Array) -> jax.Array:
        return slot_of(step, self.block.config.stages)

    def wait_for_last(self, barriers: Ref) -> None:
        """Waits for the arrivals of the last steps, which no later step waits for."""

        @pl.loop(0, jnp.minimum(self.block.config.stages, self.steps))
        def _(slot):
            plgpu.barrier_wait(barriers.at[slot])

    def produce(self) -> None:
        """The third warpgroup's part: copies keys and values once, and the query side of every step.

        It reads no memory: see `by_one_warp`.
        """
        inputs, scratch = self.inputs, self.scratch

        def copy_keys(block: int, tile: jax.Array) -> None:
            for warpgroup in range(BACKWARD_WARPGROUPS):
                where, ready = (self.batch, keys_of(tile, warpgroup), self.kv_head), scratch.key_ready.at[warpgroup]
                plgpu.copy_gmem_to_smem(inputs.keys[block].at[where], scratch.key.at[warpgroup], ready)
                plgpu.copy_gmem_to_smem(inputs.values[block].at[where], scratch.value.at[warpgroup], ready)

        self.for_block_of(self.key_tile, copy_keys)

        def copy_tiles(step: jax.Array, place: QueryPlace) -> QueryPlace:
            slot, is_partial = self.slot(step), step < self.partial_steps
            tile = jnp.where(is_partial, self.tile(place, True), self.tile(place, False))
            pl.when(step >= self.block.config.stages)(lambda: plgpu.barrier_wait(scratch.tiles_free.at[slot]))
            rows = pl.ds(tile * self.block.config.q_tile, self.block.config.q_tile)
            head = self.query_head(place.stretch)
            ready = scratch.query_ready.at[slot]
            plgpu.copy_gmem_to_smem(inputs.query.at[self.batch, rows, head], scratch.query.at[slot], ready)
            plgpu.copy_gmem_to_smem(inputs.lse.at[self.batch, head, rows], scratch.statistics.at[slot, 0], ready)
            ready = scratch.d_out_ready.at[slot]
            plgpu.copy_gmem_to_smem(inputs.d_out.at[self.batch, rows, head], scratch.d_out.at[slot], ready)
            plgpu.copy_gmem_to_smem(inputs.delta.at[self.batch, head, rows], scratch.statistics.at[slot, 1], ready)
            after = _either(is_partial, self.after(place, True), self.after(place, False))
            return _either(step + 1 == self.partial_steps, self.begin(False), after)

        lax.fori_loop(0, self.steps, copy_tiles, _either(self.partial_steps > 0, self.begin(True), self.begin(False)))
        self.wait_for_last(scratch.tiles_free)


def place_and_share(splits: Splits, inputs: Ref, zero: jax.Array | int = 0) -> tuple[Place, Share]:
    """Where this program is, and its share of the steps of its key tile; `zero` may be a hidden one."""
    of_block = 0 if inputs.split.seen.shape[0] == 1 else inputs.mask.block[0]
    numbers = Numbers(*(field[of_block] for field in inputs.split))
    return splits.place_and_share(numbers, lax.axis_index("programs") + zero)


def keys_of(key_tile: jax.Array, warpgroup: jax.Array | int) -> pl.Slice:
    """The keys of a tile that a warpgroup holds."""
    return pl.ds((key_tile * BACKWARD_WARPGROUPS + warpgroup) * WARPGROUP_ROWS, WARPGROUP_ROWS)


def _either(condition: jax.Array, one: QueryPlace, other: QueryPlace) -> QueryPlace:
    return QueryPlace(*(jnp.where(condition, x, y) for x, y in zip(one, other, strict=True)))
