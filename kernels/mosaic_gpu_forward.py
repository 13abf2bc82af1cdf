"""Forward attention of one block on Hopper, in Pallas Mosaic GPU.

The shape of FlashAttention-3 (arXiv:2407.08608): one producer warpgroup copies tiles with TMA, the others compute 64
query rows each. A compute warpgroup runs the softmax of one key tile while its product of the tile before with the
values is still in the tensor cores. Making the compute warpgroups take turns at issuing products, as that paper does,
lost 1 to 3 % on an H200: they fall out of step by themselves.

The running state is merged after the last key tile: until then its copy into shared memory is in flight.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from .contract import AttentionState, BlockMask
from .mosaic_gpu_masks import MaskInputs, Walk, pad_last
from .mosaic_gpu_primitives import (
    ROWS,
    WARPGROUP_ROWS,
    Ref,
    accumulate,
    across_columns,
    full,
    matrix_scratch,
    scores,
    scores_while_accumulating,
)
from .tiles import TileRanges, key_ranges

_LOG2_E = math.log2(math.e)
_LN_2 = math.log(2.0)


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """Tile sizes of the forward kernel.

    `q_tile` queries per program, 64 for each compute warpgroup; `k_tile` keys per step; `stages` key and value tiles in
    shared memory. `early_state` gives the running output shared memory of its own, so that it is copied while keys are
    still computed with.
    """

    q_tile: int
    k_tile: int
    stages: int
    early_state: bool = True

    def __post_init__(self):
        if self.q_tile not in (128, 192):
            raise ValueError(f"q_tile must be 128 or 192 (64 rows for each of 2 or 3 warpgroups), got {self.q_tile}")
        if self.k_tile % 16 or not 16 <= self.k_tile <= 256:
            raise ValueError(f"k_tile must be a multiple of 16 up to 256, got {self.k_tile}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2, got {self.stages}")

    @property
    def compute_warpgroups(self) -> int:
        return self.q_tile // WARPGROUP_ROWS

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread of the producer and of the compute warpgroups: they share 64 Ki."""
        return {2: (24, 240), 3: (32, 160)}[self.compute_warpgroups]


def default_config(head_dim: int) -> ForwardConfig:
    """The tile sizes used for a head dim."""
    if head_dim <= 64:
        return ForwardConfig(q_tile=192, k_tile=128, stages=2)
    if head_dim <= 128:
        return ForwardConfig(q_tile=128, k_tile=128, stages=2)
    return ForwardConfig(q_tile=128, k_tile=64, stages=2, early_state=False)


class _Inputs(NamedTuple):
    """Arrays (outside) or references (inside) that the kernel reads."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    mask: MaskInputs
    ranges: TileRanges


class _Scratch(NamedTuple):
    """Shared memory and barriers of one program. `*_ready` count a copy's arrival, `*_free` the readers' leaving."""

    # Queries, keys and values; and the running output.
    tiles: Ref
    query_ready: Ref
    key_ready: Ref
    value_ready: Ref
    output_ready: Ref
    key_free: Ref
    value_free: Ref

    @property
    def query(self) -> Ref:
        return self.tiles[0][0]

    @property
    def key(self) -> Ref:
        return self.tiles[0][1]

    @property
    def value(self) -> Ref:
        return self.tiles[0][2]

    @property
    def output(self) -> Ref:
        return self.tiles[1]


class _Softmax(NamedTuple):
    """Online softmax of a warpgroup's rows: the largest score so far, in powers of two, and the sum of the weights."""

    maximum: Float[Array, " rows"]
    total: Float[Array, " rows"]


@dataclasses.dataclass(frozen=True)
class _Block:
    """Shapes and static choices of the kernel; `exponent_scale` turns products into powers of two."""

    config: ForwardConfig
    num_keys: int
    num_row_tiles: int
    group: int
    head_dim: int
    dtype: jnp.dtype
    is_causal: bool
    exponent_scale: float


@dataclasses.dataclass(frozen=True)
class _Program:
    """One program of the grid: its tile of queries, the key tiles they see, and what its warpgroups share."""

    block: _Block
    inputs: Ref
    state: Ref
    scratch: _Scratch
    batch: jax.Array
    head: jax.Array
    row_tile: jax.Array
    walk: Walk

    @classmethod
    def here(cls, block: _Block, inputs: Ref, state: Ref, scratch: _Scratch) -> "_Program":
        batch, head = lax.axis_index("batch"), lax.axis_index("heads")
        # The last rows have the most keys in a causal block: they go first, so that the short ones fill the gaps.
        row_tile = block.num_row_tiles - 1 - lax.axis_index("row_tiles")
        return cls(block, inputs, state, scratch, batch, head, row_tile, Walk.read(inputs.ranges, batch, row_tile))

    def rows(self, warpgroup: jax.Array | int) -> pl.Slice:
        """The queries that a compute warpgroup holds."""
        return pl.ds(self.row_tile * self.block.config.q_tile + warpgroup * WARPGROUP_ROWS, WARPGROUP_ROWS)

    def slot(self, step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(self.block.config.stages))

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
        """The last warpgroup's part: copies queries and running output once, and the keys and values of every step."""
        config, inputs, scratch, steps = self.block.config, self.inputs, self.scratch, self.walk.steps
        kv_head = lax.div(self.head, jnp.int32(self.block.group))
        self.copy_rows(inputs.query, scratch.query, scratch.query_ready)

        @pl.loop(0, steps)
        def _copy_keys_and_values(step):
            slot = self.slot(step)
            keys = (self.batch, pl.ds(self.walk.tile(step) * config.k_tile, config.k_tile), kv_head)
            pl.when(step >= config.stages)(lambda: plgpu.barrier_wait(scratch.key_free.at[slot]))
            plgpu.copy_gmem_to_smem(inputs.key.at[keys], scratch.key.at[slot], scratch.key_ready.at[slot])
            pl.when(step >= config.stages)(lambda: plgpu.barrier_wait(scratch.value_free.at[slot]))
            plgpu.copy_gmem_to_smem(inputs.value.at[keys], scratch.value.at[slot], scratch.value_ready.at[slot])

            # Needed last, so asked for when the first tiles are on their way.
            @pl.when((step == jnp.minimum(config.stages, steps) - 1) & config.early_state)
            def _():
                self.copy_rows(self.state.output, scratch.output, scratch.output_ready)

        @pl.loop(0, jnp.minimum(config.stages, steps))
        def _wait_for_last_readers(slot):
            plgpu.barrier_wait(scratch.key_free.at[slot])
            plgpu.barrier_wait(scratch.value_free.at[slot])

        if not config.early_state:
            self.copy_rows(self.state.output, scratch.output, scratch.output_ready)

    def copy_rows(self, source: Ref, target: Ref, ready: Ref) -> None:
        for warpgroup in range(self.block.config.compute_warpgroups):
            rows = source.at[self.batch, self.rows(warpgroup), self.head]
            plgpu.copy_gmem_to_smem(rows, target.at[warpgroup], ready.at[warpgroup])


@dataclasses.dataclass(frozen=True)
class _Worker:
    """One compute warpgroup of a program."""

    program: _Program
    warpgroup: jax.Array

    def run(self) -> None:
        program, scratch, walk = self.program, self.program.scratch, self.program.walk
        rows = program.rows(self.warpgroup)
        lse = program.state.lse.at[program.batch, program.head, rows]
        # The last tile may have warpgroups without any row.
        num_rows = program.state.lse.shape[-1]
        has_rows = rows.start < num_rows if num_rows % program.block.config.q_tile else True
        old_lse = _load_if(has_rows, lse)
        carry = self.first_step()
        carry = lax.fori_loop(1, walk.partial, lambda i, c: self.step(i, c, is_partial=True), carry)
        first_full = jnp.maximum(walk.partial, 1)
        carry = lax.fori_loop(first_full, walk.steps, lambda i, c: self.step(i, c, is_partial=False), carry)
        acc, softmax, weights = carry
        last_slot = program.slot(walk.steps - 1)
        plgpu.barrier_wait(scratch.value_ready.at[last_slot])
        acc = accumulate(acc, weights, scratch.value.at[last_slot])
        plgpu.barrier_arrive(scratch.value_free.at[last_slot])
        output = scratch.output.at[self.warpgroup]
        plgpu.barrier_wait(scratch.output_ready.at[self.warpgroup])
        old_output = plgpu.load(output, layout=plgpu.Layout.WGMMA)
        plgpu.commit_smem()  # Every thread has read its part of the old output before any writes the new one.
        output[...], new_lse = _merge(acc, softmax, old_output, old_lse)

        @pl.when(has_rows)
        def _():
            lse[...] = new_lse

        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(output, program.state.output.at[program.batch, rows, program.head])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def first_step(self) -> tuple:
        """Accumulator, softmax and unused weights after the scores of the first key tile, computed with the mask."""
        program, block, scratch = self.program, self.program.block, self.program.scratch
        plgpu.barrier_wait(scratch.query_ready.at[self.warpgroup])
        mask = self.visible(jnp.int32(0))
        plgpu.barrier_wait(scratch.key_ready.at[0])
        products = scores(scratch.query.at[self.warpgroup], scratch.key.at[0])
        plgpu.barrier_arrive(scratch.key_free.at[0])
        empty = _Softmax(full((WARPGROUP_ROWS,), -jnp.inf, ROWS), full((WARPGROUP_ROWS,), 0, ROWS))
        softmax, _, weights = self.update(empty, products, mask)
        return full((WARPGROUP_ROWS, program.block.head_dim), 0), softmax, weights.astype(block.dtype)

    def step(self, step: jax.Array, carry: tuple, *, is_partial: bool) -> tuple:
        """The scores of a step's key tile, and under their softmax the product of the last step's with the values."""
        program, scratch = self.program, self.program.scratch
        acc, softmax, weights = carry
        slot, last_slot = program.slot(step), program.slot(step - 1)

        def ready():
            plgpu.barrier_wait(scratch.key_ready.at[slot])
            plgpu.barrier_wait(scratch.value_ready.at[last_slot])

        def use(products):
            plgpu.barrier_arrive(scratch.key_free.at[slot])
            return self.update(softmax, products, self.visible(step) if is_partial else None)

        query, key, value = scratch.query.at[self.warpgroup], scratch.key.at[slot], scratch.value.at[last_slot]
        (softmax, decay, weights), acc = scores_while_accumulating(
            query, key, acc, weights, value, ready=ready, use=use
        )
        plgpu.barrier_arrive(scratch.value_free.at[last_slot])
        # Rounded only now: the registers of the old weights were being read until the product was waited for.
        return acc * across_columns(decay, acc.shape), softmax, weights.astype(program.block.dtype)

    def visible(self, step: jax.Array) -> jax.Array:
        """The mask of this warpgroup's rows and a step's key tile."""
        program, block = self.program, self.program.block
        keys = pl.ds(program.walk.tile(step) * block.config.k_tile, block.config.k_tile)
        return program.inputs.mask.visible(
            program.batch, program.rows(self.warpgroup), keys, is_causal=block.is_causal, num_keys=block.num_keys
        )

    def update(self, softmax: _Softmax, products: jax.Array, mask: jax.Array | None) -> tuple:
        """Softmax state after one key tile, what earlier sums decay by, and the tile's weights."""
        scale = self.program.block.exponent_scale
        if mask is not None:
            products = jnp.where(mask, products, -jnp.inf)
        maximum = jnp.maximum(softmax.maximum, products.max(axis=1) * scale)
        # A row without any visible key so far has the maximum -inf: subtract zero there instead.
        base = jnp.where(maximum == -jnp.inf, 0.0, maximum) if mask is not None else maximum
        decay = jnp.exp2(softmax.maximum - base)
        weights = jnp.exp2(products * scale - across_columns(base, products.shape))
        total = softmax.total * decay + weights.sum(axis=1)
        return _Softmax(maximum, total), decay, weights


def _load_if(exists: jax.Array | bool, lse: Ref) -> jax.Array:
    """The lse of a warpgroup's rows, or of no keys if there are no such rows."""

    def load():
        return plgpu.load(lse, layout=ROWS, optimized=False)

    if isinstance(exists, bool):
        assert exists
        return load()
    return lax.cond(exists, load, lambda: full((WARPGROUP_ROWS,), -jnp.inf, ROWS))


def _merge(acc: jax.Array, softmax: _Softmax, old_output: jax.Array, old_lse: jax.Array) -> tuple:
    """The running output and lse after this block, from those before and the block's own."""
    old = old_lse * _LOG2_E
    maximum = jnp.maximum(softmax.maximum, old)
    base = jnp.where(maximum == -jnp.inf, 0.0, maximum)
    new_weight, old_weight = jnp.exp2(softmax.maximum - base), jnp.exp2(old - base)
    total = softmax.total * new_weight + old_weight
    norm = 1.0 / jnp.where(total == 0.0, 1.0, total)
    output = acc * across_columns(new_weight * norm, acc.shape)
    output += old_output * across_columns(old_weight * norm, acc.shape)
    return output, (base + jnp.log2(total)) * _LN_2


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    state: AttentionState,
    mask: BlockMask,
    *,
    scale: float,
    config: ForwardConfig,
) -> AttentionState:
    """Folds one block into `state`, in place. T and S are multiples of 8 (beyond those of `mask`: padding), H of 32."""
    batch, num_queries, num_heads, head_dim = query.shape
    row_tiles = -(-num_queries // config.q_tile)
    block = _Block(
        config=config,
        num_keys=mask.k_positions.shape[0],
        num_row_tiles=row_tiles,
        group=num_heads // key.shape[2],
        head_dim=head_dim,
        dtype=query.dtype,
        is_causal=mask.is_causal,
        exponent_scale=scale * _LOG2_E,
    )
    inputs = _Inputs(
        query,
        key,
        value,
        MaskInputs.of(mask, config.q_tile, config.k_tile),
        key_ranges(mask, config.q_tile, config.k_tile),
    )
    leaves, treedef = jax.tree.flatten(inputs)

    def body(*refs, **scratch):
        *input_refs, output, lse = refs
        inputs = jax.tree.unflatten(treedef, input_refs)
        _Program.here(block, inputs, AttentionState(output, lse), _Scratch(**scratch)).run()

    kernel = plgpu.kernel(
        body,
        out_type=(),
        scratch_types=_scratch(config, head_dim, query.dtype),
        grid=(num_heads, row_tiles, batch),
        grid_names=("heads", "row_tiles", "batch"),
        num_threads=config.compute_warpgroups + 1,
        thread_name="warpgroup",
        kernel_name="ring_jax_attention_forward",
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )
    padded = AttentionState(state.output, pad_last(state.lse, WARPGROUP_ROWS))
    output, lse = pl.run_state(lambda refs: kernel(*leaves, *refs))(padded)
    return AttentionState(output, lse[..., : state.lse.shape[-1]])


def _scratch(config: ForwardConfig, head_dim: int, dtype) -> dict:
    warpgroups, stages = config.compute_warpgroups, config.stages
    key_value = matrix_scratch((stages, config.k_tile, head_dim), dtype)
    inputs = (matrix_scratch((warpgroups, WARPGROUP_ROWS, head_dim), dtype), key_value, key_value)
    output = matrix_scratch((warpgroups, WARPGROUP_ROWS, head_dim), jnp.float32)
    return _Scratch(
        tiles=(inputs, output) if config.early_state else plgpu.RefUnion(inputs, output),
        query_ready=plgpu.Barrier(num_barriers=warpgroups),
        key_ready=plgpu.Barrier(num_barriers=stages),
        value_ready=plgpu.Barrier(num_barriers=stages),
        output_ready=plgpu.Barrier(num_barriers=warpgroups),
        key_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
        value_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
    )._asdict()
