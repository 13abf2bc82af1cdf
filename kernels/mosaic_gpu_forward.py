"""Forward attention of one block on Hopper, in Pallas Mosaic GPU.

The shape of FlashAttention-3 (arXiv:2407.08608): one producer warpgroup copies tiles with TMA, the others compute 64
query rows each. A compute warpgroup runs the softmax of one key tile while its product of the tile before with the
values is still in the tensor cores. Making the compute warpgroups take turns at issuing products, as that paper does,
lost 1 to 3 % on an H200: they fall out of step by themselves. Sums are rescaled only where a row's maximum has grown by
more than a slack (as in FlashAttention-4), and whether any has is all that is asked of most tiles.

The running state is merged after the last key tile: until then its copy into shared memory is in flight. A program
takes one query tile after the other (`mosaic_gpu_queue`): while the output of one is written, the keys of the next are
on their way. Programs that share a query tile merge their sums always in the same order.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .contract import AttentionState, BlockMask
from .mosaic_gpu_choices import ForwardConfig, forward_has_ranges, forward_heads_together, forward_waves
from .mosaic_gpu_forward_block import Block, Inputs, Partial, Scratch
from .mosaic_gpu_forward_program import Program
from .mosaic_gpu_inline import known_after, scale_rows_below_one
from .mosaic_gpu_masks import MaskInputs, pad_last
from .mosaic_gpu_primitives import (
    ROWS,
    WARPGROUP_ROWS,
    accumulate_while,
    across_columns,
    full,
    hidden_zero,
    scores,
    scores_while_accumulating,
    semaphores,
    signal,
    wait_for_signals,
)
from .mosaic_gpu_queue import Piece, Queue
from .mosaic_gpu_softmax import LOG2_E, RunningSoftmax, Softmax, TileWeights, merge_weights, normalizer
from .tiles import key_ranges
from .varying import match_varying


@dataclasses.dataclass(frozen=True)
class _Worker:
    """One compute warpgroup of a program."""

    program: Program
    warpgroup: jax.Array

    def run(self) -> None:
        """Takes the program's pieces, one after the other."""
        program, scratch = self.program, self.program.scratch

        def attend(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            number, first, end = carry
            _Attention(program, self.warpgroup, number, first, end).run()
            plgpu.barrier_arrive(scratch.piece_free.at[scratch.piece_slot(number)])
            return number + 1, end, end + self.steps_of_piece(number + 1)

        zero = jnp.int32(0)
        begin = zero, zero, self.steps_of_piece(zero)
        if program.block.queue.one_each:
            # Out of a loop, numbers that are known take no registers.
            pieces = (begin[2] > 0).astype(jnp.int32)
            pl.when(pieces > 0)(lambda: attend(begin) and None)
        else:
            pieces, _, _ = lax.while_loop(lambda carry: carry[2] > carry[1], attend, begin)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if program.block.has_state:
            pl.when(pieces > 0)(lambda: plgpu.barrier_arrive(scratch.output_free.at[self.warpgroup]))

    def steps_of_piece(self, number: jax.Array) -> jax.Array:
        """Waits for a piece, and tells how many steps it has: none if there is no such piece."""
        scratch = self.program.scratch
        plgpu.barrier_wait(scratch.piece_ready.at[scratch.piece_slot(number)])
        return self.program.piece(number).walk.steps


@dataclasses.dataclass(frozen=True)
class _Attention:
    """A compute warpgroup's part of a piece. Its steps are named by the copies of keys they take: [first, end)."""

    program: Program
    warpgroup: jax.Array
    number: jax.Array
    first: jax.Array
    end: jax.Array

    @property
    def own(self) -> jax.Array:
        """The warpgroup. Without shared memory of its own for the output, the sums leave no register for addresses."""
        return self.warpgroup if self.program.block.config.early_state else self.warpgroup + hidden_zero()

    @property
    def own_after_steps(self) -> jax.Array:
        """The warpgroup, for addresses after the steps. In the last block they would take registers through these."""
        return self.own + hidden_zero() if self.program.block.is_rounded_merged else self.own

    @property
    def piece(self) -> Piece:
        return self.program.piece(self.number)

    def run(self) -> None:
        """From the first key tile to the output."""
        program, scratch, end = self.program, self.program.scratch, self.end
        carry, full_from = self.first_step(), self.first + 1
        if not program.block.is_all_full:
            partial_end = self.first + self.piece.walk.partial
            carry = lax.fori_loop(full_from, partial_end, lambda i, c: self.step(i, c, is_partial=True), carry)
            full_from = jnp.maximum(full_from, partial_end)
        carry = lax.fori_loop(full_from, end, lambda i, c: self.step(i, c, is_partial=False), carry)
        acc, softmax, weights = carry
        last_slot = program.slot(end - 1)
        plgpu.barrier_arrive(scratch.query_free.at[self.own_after_steps])

        def weigh():
            whole = softmax.whole()
            weights = self.weights_of_sums(whole)
            if program.block.config.early_state and program.block.has_state:
                self.wait_for_output()
            return whole, weights

        (softmax, weighed), acc = accumulate_while(acc, weights, scratch.value.at[last_slot], use=weigh)
        plgpu.barrier_arrive(scratch.value_free.at[last_slot])
        if not program.block.queue.num_ranges:
            self.write(acc, *weighed)
            return
        piece = self.piece
        is_merged = piece.merge_end > piece.merge_first
        pl.when(piece.left_by >= 0)(lambda: self.leave(acc, softmax))
        pl.when((piece.left_by < 0) & ~is_merged)(lambda: self.write(acc, *weighed))

        @pl.when(is_merged)
        def _merge_and_write():
            merged, softmax_of_all = self.merge(acc, softmax)
            self.write(merged, *self.weights_of_sums(softmax_of_all))

    def leave(self, acc: jax.Array, softmax: Softmax) -> None:
        """Leaves the sums for the program that has the end of the tile."""
        partial, left_by, warpgroup = self.program.partial, self.piece.left_by, self.own
        assert partial is not None
        partial.sums[left_by, warpgroup] = acc
        partial.statistics[left_by, warpgroup, 0] = softmax.maximum
        partial.statistics[left_by, warpgroup, 1] = softmax.total
        signal(self.program.counts, left_by + 1, warpgroup)

    def merge(self, acc: jax.Array, softmax: Softmax) -> tuple[jax.Array, Softmax]:
        """Adds what other programs have left of this tile, always in the same order."""
        partial = self.program.partial
        assert partial is not None

        def add(left_by: jax.Array, carry: tuple[jax.Array, Softmax]) -> tuple[jax.Array, Softmax]:
            acc, softmax = carry
            where = left_by, self.own
            wait_for_signals(self.program.counts, left_by + 1, self.own, count=jnp.int32(1))
            others = (plgpu.load(partial.statistics.at[(*where, i)], layout=ROWS, optimized=False) for i in range(2))
            softmax, own, other = softmax.merged(Softmax(*others))
            sums = plgpu.load(partial.sums.at[where], layout=plgpu.Layout.WGMMA, optimized=False)
            return acc * across_columns(own, acc.shape) + sums * across_columns(other, acc.shape), softmax

        return lax.fori_loop(self.piece.merge_first, self.piece.merge_end, add, (acc, softmax))

    def weights_of_sums(self, softmax: Softmax) -> tuple[jax.Array, jax.Array | None, jax.Array]:
        """What a row of the block's sums and one of the running output count in the new output, and the new lse."""
        if self.program.old is None:
            own, lse = normalizer(softmax)
            return own, None, lse
        old_lse = self.program.scratch.running_lse(self.number, self.own_after_steps)
        return merge_weights(softmax, plgpu.load(old_lse, layout=ROWS))

    def wait_for_output(self) -> None:
        """Waits for the running output; without one, for its place to be free."""
        plgpu.barrier_wait(self.program.scratch.output_ready.at[self.own])

    def write(self, acc: jax.Array, own: jax.Array, old: jax.Array | None, new_lse: jax.Array) -> None:
        """Weighs the sums and what was attended before, and sends the new output and its lse off."""
        program, block, scratch = self.program, self.program.block, self.program.scratch
        buffer = scratch.output.at[self.own]
        if not block.config.early_state:
            self.wait_for_output()
        output = acc * across_columns(own, acc.shape)
        if old is not None:
            output += plgpu.load(buffer, layout=plgpu.Layout.WGMMA) * across_columns(old, acc.shape)
            plgpu.commit_smem()  # Every thread has read its part of the old output before any writes the new one.
        else:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if block.is_rounded_merged:
            buffer = scratch.rounded_output(self.own)
        buffer[...] = output.astype(buffer.dtype)
        plgpu.commit_smem()
        piece = self.piece
        rows, num_rows = program.rows(piece.tile, self.own), program.new.lse.shape[-1]
        plgpu.copy_smem_to_gmem(buffer, program.new.output.at[piece.batch, rows, piece.head])
        # In the last tile a warpgroup may have none.
        has_rows = rows.start < num_rows if num_rows % block.config.q_tile else True

        @pl.when(has_rows)
        def _():
            program.new.lse[piece.batch, piece.head, rows] = new_lse

    def first_step(self) -> tuple:
        """Accumulator, softmax and unused weights after the scores of the first key tile."""
        block, scratch, slot = self.program.block, self.program.scratch, self.program.slot(self.first)

        def attend(*, is_partial: bool) -> tuple[RunningSoftmax, jax.Array]:
            plgpu.barrier_wait(scratch.query_ready.at[self.own])
            mask = self.visible(self.first_key(self.first)) if is_partial else None
            plgpu.barrier_wait(scratch.key_ready.at[slot])
            products = scores(scratch.query.at[self.own], scratch.key.at[slot])
            plgpu.barrier_arrive(scratch.key_free.at[slot])
            nothing = RunningSoftmax.of_nothing(WARPGROUP_ROWS)
            softmax, tile = nothing.update(products, mask, block.exponent_scale)
            return softmax, tile.weights.astype(block.dtype)

        if block.can_skip_mask:
            is_partial = self.piece.walk.partial > 0
            first = lax.cond(is_partial, lambda: attend(is_partial=True), lambda: attend(is_partial=False))
        else:
            first = attend(is_partial=not block.is_all_full)
        softmax, weights = first
        plgpu.barrier_wait(scratch.value_ready.at[slot])
        if block.has_state:

            @pl.when(self.number > 0)
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(scratch.output_free.at[self.own])

        return full((WARPGROUP_ROWS, block.head_dim), 0), softmax, weights

    def step(self, copy: jax.Array, carry: tuple, *, is_partial: bool) -> tuple:
        """The scores of a step's key tile, and under their softmax the product of the last step's with the values."""
        program, scratch = self.program, self.program.scratch
        acc, softmax, weights = carry
        slot, last_slot = program.slot(copy), program.slot(copy - 1)
        # Looked up before the products: under them registers are short.
        first_key = self.first_key(copy) if is_partial else None

        plgpu.barrier_wait(scratch.key_ready.at[slot])

        def use(products: jax.Array) -> tuple[tuple[RunningSoftmax, TileWeights], jax.Array]:
            plgpu.barrier_arrive(scratch.key_free.at[slot])
            scale = program.block.exponent_scale
            if first_key is not None:
                after = softmax.update(products, self.visible(first_key), scale)
            else:
                after = softmax.update_visible(products, scale)
            # Values are waited for when most weights are known. Before, they are often not there yet; after the last of
            # them the wait itself takes time that nothing hides, 2 to 5 % (see `benchmarks/LOG.md`).
            return after, known_after(slot, after[1].early_sums)

        def wait(slot: jax.Array) -> None:
            # What the next step multiplies its weights with.
            plgpu.barrier_wait(scratch.value_ready.at[slot])

        query, key, value = scratch.query.at[self.own], scratch.key.at[slot], scratch.value.at[last_slot]
        (softmax, tile), acc = scores_while_accumulating(query, key, acc, weights, value, use=use, wait=wait)
        plgpu.barrier_arrive(scratch.value_free.at[last_slot])
        # Rounded only now: the registers of the old weights were being read until the product was waited for.
        return scale_rows_below_one(acc, tile.decay), softmax, tile.weights.astype(program.block.dtype)

    def first_key(self, copy: jax.Array) -> jax.Array:
        """The first key of a step's tile."""
        return self.piece.walk.tile(copy - self.first) * self.program.block.config.k_tile

    def visible(self, first_key: jax.Array) -> jax.Array:
        """The mask of this warpgroup's queries and a key tile."""
        program, block, piece = self.program, self.program.block, self.piece
        rows, keys = program.rows(piece.tile, self.own), pl.ds(first_key, block.config.k_tile)
        return program.inputs.mask.visible(piece.batch, rows, keys, is_causal=block.is_causal, num_keys=block.num_keys)


def _run(program: Program) -> None:
    config, warpgroup = program.block.config, lax.axis_index("warpgroup")
    producer_registers, compute_registers = config.registers

    @pl.when(warpgroup == config.compute_warpgroups)
    def _produce():
        plgpu.set_max_registers(producer_registers, action="decrease")
        program.produce()

    @pl.when(warpgroup < config.compute_warpgroups)
    def _compute():
        plgpu.set_max_registers(compute_registers, action="increase")
        _Worker(program, lax.axis_index("warpgroup") + hidden_zero()).run()


def attend(
    query: Float[Array, "B T N H"],
    keys: tuple[Float[Array, "B S K H"], ...],
    values: tuple[Float[Array, "B S K H"], ...],
    state: AttentionState | None,
    mask: BlockMask,
    *,
    scale: float,
    is_last: bool,
    config: ForwardConfig,
) -> AttentionState:
    """Folds one block into `state`, or several at once, in place.

    T and S are multiples of 8 (beyond those of `mask`: padding), S of several blocks one of two key tiles, and H one of
    32. None is the state before any key. With `is_last` the output comes in the query's dtype.
    """
    batch, num_queries, num_heads, head_dim = query.shape
    num_keys, kv_heads = sum(key.shape[1] for key in keys), keys[0].shape[2]
    assert len(keys) == 1 or num_keys % (2 * len(keys) * config.k_tile) == 0
    row_tiles, key_tiles = -(-num_queries // config.q_tile), -(-num_keys // config.k_tile)
    group, in_place = num_heads // kv_heads, state is not None and not is_last
    queue = Queue.of(
        *(num_heads, row_tiles, batch),
        heads_together=forward_heads_together(mask, query, keys[0]),
        range_steps=key_tiles if forward_has_ranges(mask, config) else None,
        visits_empty=not in_place,
        waves=forward_waves(is_last=is_last),
        one_each=not config.early_state,
        lengths=1 if len(keys) == 1 else 2,
    )
    block = Block(
        config=config,
        queue=queue,
        num_keys=mask.k_positions.shape[-1],
        group=group,
        head_dim=head_dim,
        dtype=query.dtype,
        is_causal=mask.is_causal,
        exponent_scale=scale * LOG2_E,
        has_segments=mask.q_segment_ids is not None,
        has_state=state is not None,
        is_last=is_last and (state is None or config.can_round_merged),
    )
    ranges = key_ranges(mask, config.q_tile, config.k_tile)
    masks = MaskInputs.of(mask, config.q_tile, config.k_tile)
    inputs = Inputs(query, keys, values, masks, ranges, queue.work(ranges))
    # Written in place, the state is given as references; otherwise it is read like the other inputs.
    padded = None if state is None else AttentionState(state.output, pad_last(state.lse, WARPGROUP_ROWS))
    leaves, treedef = jax.tree.flatten((inputs, None if block.in_place else padded))
    num_rows = mask.q_positions.shape[0]
    new = (
        jax.ShapeDtypeStruct(query.shape, query.dtype if block.is_last else jnp.float32),
        jax.ShapeDtypeStruct((batch, num_heads, -(-num_rows // WARPGROUP_ROWS) * WARPGROUP_ROWS), jnp.float32),
    )

    partial_types = block.partial_types()

    def body(*refs, **scratch):
        inputs, old = jax.tree.unflatten(treedef, refs[: len(leaves)])
        output, lse, *parts = refs[len(leaves) :]
        new = AttentionState(output, lse)
        partial = Partial(*parts) if parts else None
        counts = None if queue.is_fixed else semaphores(1 + queue.num_ranges, config.compute_warpgroups)
        _run(Program(block, inputs, new if block.in_place else old, new, Scratch(**scratch), partial, counts))

    kernel = plgpu.kernel(
        body,
        out_type=partial_types if block.in_place else (*new, *partial_types),
        scratch_types=block.scratch_types(),
        grid=(queue.num_programs,),
        grid_names=("programs",),
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
