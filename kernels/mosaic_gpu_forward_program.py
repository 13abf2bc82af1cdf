"""A program of the forward kernel on Hopper, and the warpgroup of it that looks its work up and copies all of it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from .mosaic_gpu_forward_block import Block, Partial, Scratch
from .mosaic_gpu_primitives import WARPGROUP_ROWS, Ref, by_one_warp, slot_of
from .mosaic_gpu_queue import Piece, Position
from .several_blocks import block_of_tile, for_block


class KeyTile(NamedTuple):
    """A tile of keys: of which sequence and head, and in which of the blocks that are taken at once."""

    batch: jax.Array
    kv_head: jax.Array
    block: jax.Array
    tile: jax.Array


class PieceCopies(NamedTuple):
    """What is copied for a piece: its number and steps, and of how many steps the pieces before it were."""

    piece: Piece
    number: jax.Array
    steps: jax.Array
    before: jax.Array


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of the grid: what it reads and writes, and what its warpgroups share.

    It takes pieces of work in turn, see `mosaic_gpu_queue`. Its last warpgroup looks them up, and copies. Pieces, and
    the copies of keys and values of all pieces, are numbered from 0.
    """

    block: Block
    inputs: Ref
    # The state as it was, or None, and the state to write; references, in place the same ones.
    old: Any
    new: Any
    scratch: Scratch
    partial: Partial | None
    # Semaphores of all programs: the first counts the entries of the queue that were taken. Each following row, one for
    # each compute warpgroup, says that a range has left its part.
    counts: Ref | None

    def rows(self, tile: jax.Array, warpgroup: jax.Array | int) -> pl.Slice:
        """The queries that a compute warpgroup holds."""
        return pl.ds(tile * self.block.config.q_tile + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

    def slot(self, copy: jax.Array) -> jax.Array:
        return slot_of(copy, self.block.config.stages)

    def produce(self) -> None:
        """The last warpgroup's part: for every piece the queries, running output, and each step's keys and values."""
        config, block, scratch = self.block.config, self.block, self.scratch
        position, end = block.queue.begin(self.inputs)
        zero = jnp.int32(0)

        def copy_piece(carry: tuple) -> tuple:
            position, steps, number, copies_before = carry
            position, next_steps = self.copy_piece(position, end, steps, number, copies_before)
            return position, next_steps, number + 1, copies_before + steps

        first = *self.announce_next(position, end, zero), zero, zero
        _, _, pieces, copies = lax.while_loop(lambda carry: carry[1] > 0, copy_piece, first)

        pl.when(pieces > 0)(lambda: plgpu.barrier_wait(scratch.piece_free.at[scratch.piece_slot(pieces - 1)]))

        @by_one_warp
        def _wait_for_the_end():
            @pl.when(pieces > 0)
            def _of_queries_and_output():
                for warpgroup in range(config.compute_warpgroups):
                    plgpu.barrier_wait(scratch.query_free.at[warpgroup])
                    if block.has_state:
                        plgpu.barrier_wait(scratch.output_free.at[warpgroup])

            if config.early_state:
                self.wait_for_last_readers(copies)

    def wait_for_last_readers(self, copies: jax.Array) -> None:
        """Waits until the last of so many keys and values have been computed with."""

        @pl.loop(0, jnp.minimum(self.block.config.stages, copies))
        def _(slot):
            plgpu.barrier_wait(self.scratch.key_free.at[slot])
            plgpu.barrier_wait(self.scratch.value_free.at[slot])

    def announce_next(self, position: Position, end: jax.Array, number: jax.Array) -> tuple[Position, jax.Array]:
        """Looks the next piece up and tells the compute warpgroups. Returns its position and steps, none at the end."""
        scratch = self.scratch
        slot, counter = scratch.piece_slot(number), None if self.counts is None else self.counts.at[0, 0]
        pl.when(number > 1)(lambda: plgpu.barrier_wait(scratch.piece_free.at[slot]))
        found = self.block.queue.write_next(
            self.inputs, position, end, number, counter, scratch.taken, scratch.numbers_of_piece(number)
        )
        plgpu.commit_smem()  # For its barrier: all have written before any thread says so.
        plgpu.barrier_arrive(scratch.piece_ready.at[slot])
        return found

    def copy_piece(
        self, position: Position, end: jax.Array, steps: jax.Array, number: jax.Array, copies_before: jax.Array
    ) -> tuple[Position, jax.Array]:
        """Copies all that a piece takes. Returns the position and the steps of the next one, looked up meanwhile."""
        # The piece is read here, for one warp alone cannot read memory.
        copies = PieceCopies(self.piece(number), number, steps, copies_before)

        @by_one_warp
        def _copy_all_but_last_values():
            @pl.loop(0, steps)
            def _step(step):
                tile = self.key_tile(copies.piece, step)
                self.copy_keys(tile, step, copies)

                @pl.when(step < steps - 1)
                def _values():
                    self.copy_values(tile, step, copies)

        # Here there is time for it: the place of the last values is not free yet.
        following = self.announce_next(position, end, number + 1)
        # Read anew: kept meanwhile it would cost registers.
        copies = copies._replace(piece=self.piece(number))

        @by_one_warp
        def _copy_last_values():
            self.copy_values(self.key_tile(copies.piece, steps - 1), steps - 1, copies)
            if not self.block.config.early_state:
                # The output comes to lie where queries, keys and values do.
                self.wait_for_last_readers(steps)
                self.prepare_output(copies.piece, number)

        return following

    def key_tile(self, piece: Piece, step: jax.Array) -> KeyTile:
        """The tile of keys of a piece's step."""
        tiles_of_block = self.inputs.keys[0].shape[1] // self.block.config.k_tile
        block, tile = block_of_tile(piece.walk.tile(step), tiles_of_block, len(self.inputs.keys))
        return KeyTile(piece.batch, lax.div(piece.head, jnp.int32(self.block.group)), block, tile)

    def piece(self, number: jax.Array) -> Piece:
        """A piece. The warps that compute read it where they need it: kept through loops it would cost registers."""
        return Piece.read(self.scratch.numbers_of_piece(number))

    def copy_tile(self, blocks: tuple[Ref, ...], tile: KeyTile, target: Ref, ready: Ref) -> None:
        """Copies a tile of keys, or of values."""
        keys = pl.ds(tile.tile * self.block.config.k_tile, self.block.config.k_tile)

        def copy(block: int) -> None:
            plgpu.copy_gmem_to_smem(blocks[block].at[tile.batch, keys, tile.kv_head], target, ready)

        for_block(tile.block, len(blocks), copy)

    def copy_keys(self, tile: KeyTile, step: jax.Array, copies: PieceCopies) -> None:
        """Copies the keys of a step, and after the first ones the queries, whose place is free later."""
        scratch, copy = self.scratch, copies.before + step
        slot = self.slot(copy)
        pl.when(copy >= self.block.config.stages)(lambda: plgpu.barrier_wait(scratch.key_free.at[slot]))
        self.copy_tile(self.inputs.keys, tile, scratch.key.at[slot], scratch.key_ready.at[slot])
        pl.when(step == 0)(lambda: self.copy_queries(copies.piece, copies.number))

    def copy_values(self, tile: KeyTile, step: jax.Array, copies: PieceCopies) -> None:
        """Copies the values of a step, and once some have been copied the running output, which is needed last."""
        config, scratch, copy = self.block.config, self.scratch, copies.before + step
        slot = self.slot(copy)
        pl.when(copy >= config.stages)(lambda: plgpu.barrier_wait(scratch.value_free.at[slot]))
        self.copy_tile(self.inputs.values, tile, scratch.value.at[slot], scratch.value_ready.at[slot])
        if config.early_state and self.block.has_state:
            after = jnp.minimum(2 * config.stages, copies.steps) - 1
            pl.when(step == after)(lambda: self.prepare_output(copies.piece, copies.number))

    def copy_queries(self, piece: Piece, number: jax.Array) -> None:
        """Copies a piece's queries, and with them the running logsumexps of their rows."""
        scratch = self.scratch
        for warpgroup in range(self.block.config.compute_warpgroups):
            self.wait_before_next(scratch.query_free.at[warpgroup], number)
            rows, ready = self.rows(piece.tile, warpgroup), scratch.query_ready.at[warpgroup]
            queries = self.inputs.query.at[piece.batch, rows, piece.head]
            plgpu.copy_gmem_to_smem(queries, scratch.query.at[warpgroup], ready)
            if self.old is not None:
                lse = self.old.lse.at[piece.batch, piece.head, rows]
                running = scratch.running_lse(number, warpgroup)
                self.copy_unless_left(piece, lse, running, ready)

    def prepare_output(self, piece: Piece, number: jax.Array) -> None:
        """Copies the running output; without one, or for a piece that is left, says that its place is free."""
        scratch = self.scratch
        for warpgroup in range(self.block.config.compute_warpgroups):
            ready = scratch.output_ready.at[warpgroup]
            if self.old is None:
                plgpu.barrier_arrive(ready)
                continue
            self.wait_before_next(scratch.output_free.at[warpgroup], number)
            rows = self.old.output.at[piece.batch, self.rows(piece.tile, warpgroup), piece.head]
            self.copy_unless_left(piece, rows, scratch.output.at[warpgroup], ready)

    def copy_unless_left(self, piece: Piece, source: Ref, target: Ref, ready: Ref) -> None:
        """Copies part of the running state; not for a piece that is left, for the program that merges it writes it."""
        if not self.block.queue.num_ranges:
            plgpu.copy_gmem_to_smem(source, target, ready)
            return
        pl.when(piece.left_by < 0)(lambda: plgpu.copy_gmem_to_smem(source, target, ready))
        pl.when(piece.left_by >= 0)(lambda: plgpu.barrier_arrive(ready))

    def wait_before_next(self, free: Ref, number: jax.Array) -> None:
        """Waits until a compute warpgroup has left what the next piece's is to be copied into."""
        pl.when(number > 0)(lambda: plgpu.barrier_wait(free))
