"""Forward attention of one block on Hopper, in Pallas Mosaic GPU.

The shape of FlashAttention-3 (arXiv:2407.08608): one producer warpgroup copies tiles with TMA, the others compute 64
query rows each. A compute warpgroup runs the softmax of one key tile while its product of the tile before with the
values is still in the tensor cores. Making the compute warpgroups take turns at issuing products, as that paper does,
lost 1 to 3 % on an H200: they fall out of step by themselves. Sums are rescaled only where a row's maximum has grown by
more than a slack (as in FlashAttention-4), and whether any has is all that is asked of most tiles.

The running state is merged after the last key tile: until then its copy into shared memory is in flight. A program
takes several query heads in turn: while the output of one is written, the tiles of the next are on their way.

Where all programs are equal and the last few would run alone, several programs share the keys of those query tiles. The
last of them waits for the sums of the others and merges them, always in the same order.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .contract import AttentionState, BlockMask
from .mosaic_gpu_choices import ForwardConfig, forward_grid_order, forward_split
from .mosaic_gpu_forward_block import Block, Inputs, Partial, Scratch
from .mosaic_gpu_inline import scale_rows_below_one
from .mosaic_gpu_masks import MaskInputs, Walk, pad_last
from .mosaic_gpu_primitives import (
    ROWS,
    WARPGROUP_ROWS,
    Ref,
    accumulate_while,
    across_columns,
    full,
    hidden_zero,
    scores,
    scores_while_accumulating,
    semaphores,
    signal,
    slot_of,
    wait_for_signals,
)
from .mosaic_gpu_softmax import LOG2_E, Softmax, merge_weights, normalizer
from .mosaic_gpu_split import Place, Share, first_shared_tile, num_programs, place_and_share
from .tiles import key_ranges
from .varying import match_varying


@dataclasses.dataclass(frozen=True)
class _Program:
    """One program of the grid: its tile of queries, the key tiles they see, and what its warpgroups share.

    It takes `block.heads` query heads in turn. Copies of keys and values are numbered through all of its steps.
    """

    block: Block
    inputs: Ref
    # The state as it was, or None, and the state to write; references, in place the same ones.
    old: Any
    new: Any
    scratch: Scratch
    batch: jax.Array
    row_tile: jax.Array
    walk: Walk
    # Where any query tile's steps are shared by several programs.
    shared: "_Shared | None"

    @classmethod
    def here(cls, block: Block, inputs: Ref, old: Any, new: Any, scratch: Scratch, partial: Any) -> "_Program":
        if block.split is not None:
            return cls._here_or_shared(block, inputs, old, new, scratch, partial)
        batch = lax.axis_index("batch")
        # The last rows have the most keys in a causal block: they go first, so that the short ones fill the gaps.
        row_tile = block.num_row_tiles - 1 - lax.axis_index("row_tiles")
        walk = cls._walk(block, inputs, batch, row_tile)
        return cls(block, inputs, old, new, scratch, batch, row_tile, walk, None)

    @classmethod
    def _here_or_shared(cls, block: Block, inputs: Ref, old: Any, new: Any, scratch: Scratch, partial: Any):
        """Where the programs are one head's and some of them share a tile's steps."""
        place, share = _place_and_share(block, inputs)
        walk = cls._walk(block, inputs, place.batch, place.tile)
        # Each has at least one step, or none would signal that it is done.
        pieces = jnp.minimum(share.pieces, walk.steps)
        first, end = (walk.steps * piece // jnp.maximum(pieces, 1) for piece in (share.piece, share.piece + 1))
        walk = walk.part(first, jnp.where(share.piece < pieces, end - first, 0))
        shared = _Shared(share._replace(pieces=pieces), partial)
        return cls(block, inputs, old, new, scratch, place.batch, place.tile, walk, shared)

    @staticmethod
    def _walk(block: Block, inputs: Ref, batch: jax.Array, row_tile: jax.Array) -> Walk:
        walk = Walk.read(inputs.ranges, inputs.mask, batch, row_tile)
        if not block.in_place:
            # Rows without any key are written too: any tile will do, for its mask hides all of it.
            is_empty = walk.steps == 0
            walk = walk._replace(steps=jnp.where(is_empty, 1, walk.steps), partial=jnp.where(is_empty, 1, walk.partial))
        return walk

    def rows(self, warpgroup: jax.Array | int) -> pl.Slice:
        """The queries that a compute warpgroup holds."""
        config, row_tile = self.block.config, self.row_tile
        if config.compute_warpgroups > 2:
            # As for `head`: three warpgroups have fewer registers each.
            row_tile += hidden_zero()
        return pl.ds(row_tile * config.q_tile + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

    def head(self, turn: jax.Array) -> jax.Array:
        """A query head of this program. Computed where it is needed: kept through a loop it would cost a register."""
        if self.shared is not None:
            return _place_and_share(self.block, self.inputs)[0].head
        return (lax.axis_index("heads") + hidden_zero()) * self.block.heads + turn

    def slot(self, copy: jax.Array) -> jax.Array:
        return slot_of(copy, self.block.config.stages)

    def for_each_head(self, body: Callable[[jax.Array], None]) -> None:
        """Calls `body` with 0, 1 ... for the heads of this program."""
        if self.block.heads > 1:
            pl.loop(0, self.block.heads)(body)
        elif self.block.can_skip_mask:
            # In a loop, or the compiler finds no registers for the products in flight.
            pl.loop(0, 1 + hidden_zero())(body)
        else:
            body(jnp.int32(0))

    def run(self) -> None:
        config, warpgroup = self.block.config, lax.axis_index("warpgroup")
        producer_registers, compute_registers = config.registers

        @pl.when(self.walk.steps > 0)
        def _():
            @pl.when(warpgroup == config.compute_warpgroups)
            def _produce():
                plgpu.set_max_registers(producer_registers, action="decrease")
                self.produce()

            @pl.when(warpgroup < config.compute_warpgroups)
            def _compute():
                plgpu.set_max_registers(compute_registers, action="increase")
                _Worker(self, warpgroup).run()

    def produce(self) -> None:
        """The last warpgroup's part: for every head the queries, running output, and every step's keys and values."""
        config, scratch = self.block.config, self.scratch
        self.for_each_head(self.copy_head)

        @pl.loop(0, jnp.minimum(config.stages, self.walk.steps * self.block.heads))
        def _wait_for_last_readers(slot):
            plgpu.barrier_wait(scratch.key_free.at[slot])
            plgpu.barrier_wait(scratch.value_free.at[slot])

        if not config.early_state:
            self.prepare_output(jnp.int32(0))

    def copy_head(self, turn: jax.Array) -> None:
        config, inputs, scratch, steps = self.block.config, self.inputs, self.scratch, self.walk.steps
        head = self.head(turn)
        kv_head = lax.div(head, jnp.int32(self.block.group))

        @pl.loop(0, steps)
        def _copy_keys_and_values(step):
            copy = turn * steps + step
            slot = self.slot(copy)
            keys = (self.batch, pl.ds(self.walk.tile(step) * config.k_tile, config.k_tile), kv_head)
            pl.when(copy >= config.stages)(lambda: plgpu.barrier_wait(scratch.key_free.at[slot]))
            plgpu.copy_gmem_to_smem(inputs.key.at[keys], scratch.key.at[slot], scratch.key_ready.at[slot])
            # After the first keys, whose place is free before that of the last head's queries.
            pl.when(step == 0)(lambda: self.copy_queries(turn))
            pl.when(copy >= config.stages)(lambda: plgpu.barrier_wait(scratch.value_free.at[slot]))
            plgpu.copy_gmem_to_smem(inputs.value.at[keys], scratch.value.at[slot], scratch.value_ready.at[slot])

            # Needed last, so asked for when the first tiles are on their way, and the last head's output has left.
            if config.early_state and self.block.has_state:
                pl.when(step == jnp.minimum(2 * config.stages, steps) - 1)(lambda: self.prepare_output(turn))

    def copy_queries(self, turn: jax.Array) -> None:
        """Copies a head's queries, and with them the running logsumexps of their rows."""
        scratch = self.scratch
        for warpgroup in range(self.block.config.compute_warpgroups):
            self.wait_before_next(scratch.query_free.at[warpgroup], turn)
            rows, ready = self.rows(warpgroup), scratch.query_ready.at[warpgroup]
            queries = self.inputs.query.at[self.batch, rows, self.head(turn)]
            plgpu.copy_gmem_to_smem(queries, scratch.query.at[warpgroup], ready)
            if self.old is not None:
                lse = self.old.lse.at[self.batch, self.head(turn), rows]
                plgpu.copy_gmem_to_smem(lse, scratch.running_lse(turn, warpgroup), ready)

    def prepare_output(self, turn: jax.Array) -> None:
        """Copies the running output; without one, says that its place is free."""
        scratch = self.scratch
        for warpgroup in range(self.block.config.compute_warpgroups):
            ready = scratch.output_ready.at[warpgroup]
            if self.old is None:
                plgpu.barrier_arrive(ready)
                continue
            self.wait_before_next(scratch.output_free.at[warpgroup], turn)
            rows = self.old.output.at[self.batch, self.rows(warpgroup), self.head(turn)]
            plgpu.copy_gmem_to_smem(rows, scratch.output.at[warpgroup], ready)

    def wait_before_next(self, free: Ref, turn: jax.Array) -> None:
        """Waits until a compute warpgroup has left what the next head is to be copied into."""
        if self.block.heads > 1:
            pl.when(turn > 0)(lambda: plgpu.barrier_wait(free))


def _place_and_share(block: Block, inputs: Ref) -> tuple[Place, Share]:
    assert block.split is not None
    batch, _, num_heads, _ = inputs.query.shape
    program = lax.axis_index("programs") + hidden_zero()
    sizes = {"num_heads": num_heads, "tiles": block.num_row_tiles, "batch": batch}
    return place_and_share(block.split, inputs.first_shared, program, **sizes)


class _Shared(NamedTuple):
    """A program's share of its query tile's steps, and where sums go for the last piece, which merges them.

    It waits for the pieces before it only. They come before it in the grid, and so have begun or ended when it begins:
    GPUs begin programs in the grid's order, though CUDA does not promise it.
    """

    share: Share
    partial: Partial

    @property
    def is_merged_by_another(self) -> jax.Array:
        """Whether this is a piece whose sums another one merges."""
        return self.share.piece < self.share.pieces - 1

    def leave(self, warpgroup: jax.Array, acc: jax.Array, softmax: Softmax) -> None:
        """Leaves a warpgroup's sums for the last piece."""
        where = self.share.tile, self.share.piece, warpgroup
        self.partial.sums[where] = acc
        self.partial.statistics[(*where, 0)] = softmax.maximum
        self.partial.statistics[(*where, 1)] = softmax.total
        signal(self.partial.done, self.share.tile, warpgroup)

    def merge(self, warpgroup: jax.Array, acc: jax.Array, softmax: Softmax) -> tuple[jax.Array, Softmax]:
        """Adds what all other pieces have left for a warpgroup, always in the same order."""
        wait_for_signals(self.partial.done, self.share.tile, warpgroup, count=self.share.pieces - 1)

        def add(piece: jax.Array, carry: tuple[jax.Array, Softmax]) -> tuple[jax.Array, Softmax]:
            acc, softmax = carry
            where = self.share.tile, piece, warpgroup
            others = (
                plgpu.load(self.partial.statistics.at[(*where, i)], layout=ROWS, optimized=False) for i in range(2)
            )
            softmax, own, other = softmax.merged(Softmax(*others))
            sums = plgpu.load(self.partial.sums.at[where], layout=plgpu.Layout.WGMMA, optimized=False)
            return acc * across_columns(own, acc.shape) + sums * across_columns(other, acc.shape), softmax

        return lax.fori_loop(0, self.share.pieces - 1, add, (acc, softmax))


@dataclasses.dataclass(frozen=True)
class _Worker:
    """One compute warpgroup of a program."""

    program: _Program
    warpgroup: jax.Array

    def run(self) -> None:
        self.program.for_each_head(self.attend)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def attend(self, turn: jax.Array) -> None:
        """One query head, from its first key tile to its output."""
        program, scratch, walk = self.program, self.program.scratch, self.program.walk
        carry = self.first_step(turn)
        first_full = jnp.int32(1)
        if not program.block.is_all_full:
            carry = lax.fori_loop(1, walk.partial, lambda i, c: self.step(turn, i, c, is_partial=True), carry)
            first_full = jnp.maximum(walk.partial, 1)
        carry = lax.fori_loop(first_full, walk.steps, lambda i, c: self.step(turn, i, c, is_partial=False), carry)
        acc, softmax, weights = carry
        last_slot = program.slot((turn + 1) * walk.steps - 1)

        def weigh():
            result = self.weights_of_sums(turn, softmax)
            if program.block.config.early_state and program.block.has_state:
                self.wait_for_output()
            return result

        weighed, acc = accumulate_while(acc, weights, scratch.value.at[last_slot], use=weigh)
        plgpu.barrier_arrive(scratch.value_free.at[last_slot])
        if (shared := program.shared) is None:
            self.write(turn, acc, *weighed)
            return
        pl.when(shared.share.pieces == 1)(lambda: self.write(turn, acc, *weighed))
        pl.when(shared.is_merged_by_another)(lambda: shared.leave(self.warpgroup, acc, softmax))

        @pl.when((shared.share.pieces > 1) & (shared.share.piece == shared.share.pieces - 1))
        def _merge_and_write():
            merged, softmax_of_all = shared.merge(self.warpgroup, acc, softmax)
            self.write(turn, merged, *self.weights_of_sums(turn, softmax_of_all))

    def weights_of_sums(self, turn: jax.Array, softmax: Softmax) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """What a row of the block's sums and one of the running output count in the new output, and the new lse."""
        if self.program.old is None:
            own, lse = normalizer(softmax)
            return own, None, lse
        old_lse = self.program.scratch.running_lse(turn, self.warpgroup)
        return merge_weights(softmax, plgpu.load(old_lse, layout=ROWS))

    def wait_for_output(self) -> None:
        """Waits for the running output; without one, for its place to be free."""
        plgpu.barrier_wait(self.program.scratch.output_ready.at[self.warpgroup])

    def write(self, turn: jax.Array, acc: jax.Array, own: jax.Array, old: jax.Array | None, new_lse: jax.Array) -> None:
        """Weighs the sums and what was attended before, and sends the new output and its lse off."""
        program, block, scratch = self.program, self.program.block, self.program.scratch
        buffer = scratch.output.at[self.warpgroup]
        if not block.config.early_state:
            self.wait_for_output()
        output = acc * across_columns(own, acc.shape)
        if old is not None:
            output += plgpu.load(buffer, layout=plgpu.Layout.WGMMA) * across_columns(old, acc.shape)
            plgpu.commit_smem()  # Every thread has read its part of the old output before any writes the new one.
        else:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if block.is_rounded_merged:
            buffer = scratch.rounded_output(self.warpgroup)
        buffer[...] = output.astype(buffer.dtype)
        plgpu.commit_smem()
        where = program.batch, program.rows(self.warpgroup), program.head(turn)
        plgpu.copy_smem_to_gmem(buffer, program.new.output.at[where])
        rows, num_rows = program.rows(self.warpgroup), program.new.lse.shape[-1]
        # In the last tile a warpgroup may have none.
        has_rows = rows.start < num_rows if num_rows % block.config.q_tile else True

        @pl.when(has_rows)
        def _():
            program.new.lse[program.batch, program.head(turn), rows] = new_lse

    def first_step(self, turn: jax.Array) -> tuple:
        """Accumulator, softmax and unused weights after the scores of the first key tile."""
        program, block, scratch = self.program, self.program.block, self.program.scratch
        slot = program.slot(turn * program.walk.steps)

        def attend(*, is_partial: bool) -> tuple[Softmax, jax.Array]:
            plgpu.barrier_wait(scratch.query_ready.at[self.warpgroup])
            mask = self.visible(jnp.int32(0)) if is_partial else None
            plgpu.barrier_wait(scratch.key_ready.at[slot])
            products = scores(scratch.query.at[self.warpgroup], scratch.key.at[slot])
            plgpu.barrier_arrive(scratch.key_free.at[slot])
            self.after_last_scores(turn, jnp.int32(0))
            softmax, _decay, weights = Softmax.of_nothing(WARPGROUP_ROWS).update(products, mask, block.exponent_scale)
            return softmax, weights.astype(block.dtype)

        if block.can_skip_mask:
            is_partial = program.walk.partial > 0
            first = lax.cond(is_partial, lambda: attend(is_partial=True), lambda: attend(is_partial=False))
        else:
            first = attend(is_partial=not block.is_all_full)
        softmax, weights = first
        plgpu.barrier_wait(scratch.value_ready.at[slot])
        if block.has_state and block.heads > 1:

            @pl.when(turn > 0)
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(scratch.output_free.at[self.warpgroup])

        return full((WARPGROUP_ROWS, program.block.head_dim), 0), softmax, weights

    def step(self, turn: jax.Array, step: jax.Array, carry: tuple, *, is_partial: bool) -> tuple:
        """The scores of a step's key tile, and under their softmax the product of the last step's with the values."""
        program, scratch = self.program, self.program.scratch
        acc, softmax, weights = carry
        copy = turn * program.walk.steps + step
        slot, last_slot = program.slot(copy), program.slot(copy - 1)

        plgpu.barrier_wait(scratch.key_ready.at[slot])

        def use(products):
            plgpu.barrier_arrive(scratch.key_free.at[slot])
            self.after_last_scores(turn, step)
            if is_partial:
                return softmax.update(products, self.visible(step), program.block.exponent_scale)
            return softmax.update_visible(products, program.block.exponent_scale)

        def used():
            # What the next step multiplies its weights with.
            plgpu.barrier_wait(scratch.value_ready.at[slot])

        query, key, value = scratch.query.at[self.warpgroup], scratch.key.at[slot], scratch.value.at[last_slot]
        (softmax, decay, weights), acc = scores_while_accumulating(query, key, acc, weights, value, use=use, used=used)
        plgpu.barrier_arrive(scratch.value_free.at[last_slot])
        # Rounded only now: the registers of the old weights were being read until the product was waited for.
        return scale_rows_below_one(acc, decay), softmax, weights.astype(program.block.dtype)

    def after_last_scores(self, turn: jax.Array, step: jax.Array) -> None:
        """After the last scores of a head, the next one's queries may come."""
        program, free = self.program, self.program.scratch.query_free.at[self.warpgroup]
        if program.block.heads > 1:
            is_last = (step == program.walk.steps - 1) & (turn < program.block.heads - 1)
            pl.when(is_last)(lambda: plgpu.barrier_arrive(free))

    def visible(self, step: jax.Array) -> jax.Array:
        """The mask of this warpgroup's rows and a step's key tile."""
        program, block = self.program, self.program.block
        keys = pl.ds(program.walk.tile(step) * block.config.k_tile, block.config.k_tile)
        return program.inputs.mask.visible(
            program.batch, program.rows(self.warpgroup), keys, is_causal=block.is_causal, num_keys=block.num_keys
        )


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    state: AttentionState | None,
    mask: BlockMask,
    *,
    scale: float,
    is_last: bool,
    config: ForwardConfig,
) -> AttentionState:
    """Folds one block into `state`, in place. T and S are multiples of 8 (beyond those of `mask`: padding), H of 32.

    None is the state before any key. With `is_last` the output comes in the query's dtype.
    """
    batch, num_queries, num_heads, head_dim = query.shape
    row_tiles, key_tiles = -(-num_queries // config.q_tile), -(-key.shape[1] // config.k_tile)
    block = Block(
        config=config,
        num_keys=mask.k_positions.shape[-1],
        num_row_tiles=row_tiles,
        group=num_heads // key.shape[2],
        heads=max(heads for heads in range(1, config.heads + 1) if num_heads % heads == 0),
        head_dim=head_dim,
        dtype=query.dtype,
        is_causal=mask.is_causal,
        exponent_scale=scale * LOG2_E,
        has_segments=mask.q_segment_ids is not None,
        has_state=state is not None,
        is_last=is_last and (state is None or config.can_round_merged),
        split=forward_split(mask, config, num_heads, row_tiles, batch, key_tiles),
    )
    grid = {"row_tiles": row_tiles, "heads": num_heads // block.heads, "batch": batch}
    order = forward_grid_order(mask.has_uneven_tiles, head_dim, math.prod(grid.values()))
    if block.split is not None:
        order = ("programs",)
        grid = {"programs": num_programs(block.split, num_heads, row_tiles, batch)}
    masks = MaskInputs.of(mask, config.q_tile, config.k_tile)
    ranges = key_ranges(mask, config.q_tile, config.k_tile)
    first_shared = None if block.split is None else first_shared_tile(mask, ranges, block.split)
    inputs = Inputs(query, key, value, masks, ranges, first_shared)
    # Written in place, the state is given as references; otherwise it is read like the other inputs.
    padded = None if state is None else AttentionState(state.output, pad_last(state.lse, WARPGROUP_ROWS))
    leaves, treedef = jax.tree.flatten((inputs, None if block.in_place else padded))
    num_rows = mask.q_positions.shape[0]
    new = (
        jax.ShapeDtypeStruct(query.shape, query.dtype if block.is_last else jnp.float32),
        jax.ShapeDtypeStruct((batch, num_heads, -(-num_rows // WARPGROUP_ROWS) * WARPGROUP_ROWS), jnp.float32),
    )

    partial_types = block.partial_types(batch)

    def body(*refs, **scratch):
        inputs, old = jax.tree.unflatten(treedef, refs[: len(leaves)])
        output, lse, *parts = refs[len(leaves) :]
        new, partial = AttentionState(output, lse), None
        if parts:
            sums, statistics = parts
            partial = Partial(sums, statistics, semaphores(sums.shape[0], config.compute_warpgroups))
        old = new if block.in_place else old
        _Program.here(block, inputs, old, new, Scratch(**scratch), partial).run()

    kernel = plgpu.kernel(
        body,
        out_type=partial_types if block.in_place else (*new, *partial_types),
        scratch_types=block.scratch_types(),
        grid=tuple(grid[name] for name in order),
        grid_names=order,
        num_threads=config.compute_warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="ring_jax_attention_forward",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
    )
    if block.in_place:

        def update(refs):
            (output_ref, lse_ref), partial_refs = refs
            # Partial sums are kept only because the state's discharge wants all of a kernel's results used.
            partial: Any = kernel(*leaves, output_ref, lse_ref)
            for ref, x in zip(partial_refs, partial, strict=True):
                ref[...] = x

        empty = [jnp.empty(x.shape, x.dtype) for x in partial_types]
        results: Any = pl.run_state(update)((padded, empty))
        output, lse = results[0]
    else:
        results = kernel(*leaves)
        output, lse = match_varying(tuple(results[:2]), like=query)
    return AttentionState(output.astype(query.dtype) if is_last else output, lse[..., :num_rows])
