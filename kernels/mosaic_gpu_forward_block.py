"""What one program of the forward kernel on Hopper works on: its inputs, its shared memory, and what is fixed of it."""

import dataclasses
from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from .mosaic_gpu_choices import ForwardConfig
from .mosaic_gpu_masks import MaskInputs
from .mosaic_gpu_primitives import WARPGROUP_ROWS, Ref, matrix_scratch, one_place, slot_of
from .mosaic_gpu_softmax import Softmax
from .mosaic_gpu_split import Split
from .tiles import TileRanges

_LSE_SLOTS = 2


class Inputs(NamedTuple):
    """Arrays (outside) or references (inside) that the kernel reads."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    mask: MaskInputs
    ranges: TileRanges
    # The first of the last head's query tiles whose steps are shared, where there are such tiles.
    first_shared: Int32[Array, "1"] | None = None


class Partial(NamedTuple):
    """Where pieces of a shared query tile leave their part for the last one of them.

    `sums`, float32 `[tiles, pieces - 1, warpgroups, 64, H]`, are not normalized; `statistics`, `[tiles, pieces - 1,
    warpgroups, 2, 64]`, are the fields of `Softmax`. `done`, `[tiles, warpgroups]`, counts the pieces that are there.
    """

    sums: Ref
    statistics: Ref
    done: Ref | None


class Scratch(NamedTuple):
    """Shared memory and barriers of one program. `*_ready` count a copy's arrival, `*_free` the readers' leaving."""

    # Queries, keys and values; and the output: the running one on its way in, and the new one on its way out.
    tiles: Ref
    # Running logsumexps of two heads: those of one are read after the next one's have been copied.
    lse: Ref
    query_ready: Ref
    key_ready: Ref
    value_ready: Ref
    output_ready: Ref
    query_free: Ref
    key_free: Ref
    value_free: Ref
    output_free: Ref

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
        return self.tiles[1][0]

    def running_lse(self, turn: jax.Array, warpgroup: jax.Array | int) -> Ref:
        """The running logsumexps of a warpgroup's rows of a head."""
        return self.lse.at[slot_of(turn, _LSE_SLOTS), warpgroup]

    def rounded_output(self, warpgroup: jax.Array) -> Ref:
        """Where a warpgroup's output lies in the inputs' dtype, in half of the place of its running output."""
        return self.tiles[1][1].at[2 * warpgroup]


@dataclasses.dataclass(frozen=True)
class Block:
    """Shapes and static choices of the kernel; `exponent_scale` turns products into powers of two."""

    config: ForwardConfig
    num_keys: int
    num_row_tiles: int
    # Query heads for one key/value head, and query heads in one program.
    group: int
    heads: int
    head_dim: int
    dtype: jnp.dtype
    is_causal: bool
    exponent_scale: float
    has_segments: bool
    has_state: bool
    is_last: bool
    split: Split | None = None

    @property
    def can_skip_mask(self) -> bool:
        """Whether a head's first tile is computed without the mask if it is full: elsewhere registers are short."""
        has_registers = self.config.early_state and self.config.compute_warpgroups == 2 and not self.has_segments
        return has_registers and not self.is_all_full

    @property
    def is_all_full(self) -> bool:
        """Whether every query surely sees every key of every tile."""
        return not self.is_causal and not self.has_segments and self.num_keys % self.config.k_tile == 0

    @property
    def in_place(self) -> bool:
        return self.has_state and not self.is_last

    @property
    def is_rounded_merged(self) -> bool:
        """Whether the new output is of another dtype than the running one, whose place it takes."""
        return self.has_state and self.is_last

    def scratch_types(self) -> dict:
        """What `Scratch` is made of, by its fields' names."""
        config, head_dim = self.config, self.head_dim
        warpgroups, stages = config.compute_warpgroups, config.stages
        key_value = matrix_scratch((stages, config.k_tile, head_dim), self.dtype)
        inputs = (matrix_scratch((warpgroups, WARPGROUP_ROWS, head_dim), self.dtype), key_value, key_value)
        running_dtype = self.dtype if self.is_last and not self.has_state else jnp.float32
        output = matrix_scratch((warpgroups, WARPGROUP_ROWS, head_dim), running_dtype)
        rounded = matrix_scratch((2 * warpgroups, WARPGROUP_ROWS, head_dim), self.dtype)
        outputs = one_place(output, rounded) if self.is_rounded_merged else (output,)
        return Scratch(
            tiles=(inputs, outputs) if config.early_state else plgpu.RefUnion(inputs, outputs),
            lse=plgpu.SMEM((_LSE_SLOTS, warpgroups, WARPGROUP_ROWS), jnp.float32),
            query_ready=plgpu.Barrier(num_arrivals=2 if self.has_state else 1, num_barriers=warpgroups),
            key_ready=plgpu.Barrier(num_barriers=stages),
            value_ready=plgpu.Barrier(num_barriers=stages),
            output_ready=plgpu.Barrier(num_barriers=warpgroups),
            query_free=plgpu.Barrier(num_barriers=warpgroups),
            key_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            value_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            output_free=plgpu.Barrier(num_barriers=warpgroups),
        )._asdict()

    def partial_types(self, batch: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The arrays of a `Partial`, in the order of its fields; none if no tile is shared."""
        if self.split is None:
            return ()
        pieces = (self.split.tiles * batch, self.split.pieces - 1, self.config.compute_warpgroups)
        shapes = (*pieces, WARPGROUP_ROWS, self.head_dim), (*pieces, len(Softmax._fields), WARPGROUP_ROWS)
        return tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
