"""What a program of the fused backward kernel on Hopper works on: arrays, shared memory, and static choices."""

import dataclasses
from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from .mosaic_gpu_choices import BACKWARD_WARPGROUPS, BackwardConfig
from .mosaic_gpu_inline import PIECE_AS_IT_LIES
from .mosaic_gpu_masks import MaskInputs
from .mosaic_gpu_primitives import WARPGROUP_ROWS, Ref, matrix_scratch
from .mosaic_gpu_split import Numbers, Splits
from .tiles import TileRanges


class Inputs(NamedTuple):
    """Arrays (outside) or references (inside) that the kernel reads."""

    query: Float[Array, "B T N H"]
    # Of one block, or of several that are taken at once.
    keys: tuple[Float[Array, "B S K H"], ...]
    values: tuple[Float[Array, "B S K H"], ...]
    d_out: Float[Array, "B T N H"]
    lse: Float32[Array, "B N T"]
    delta: Float32[Array, "B N T"]
    mask: MaskInputs
    ranges: TileRanges
    # Where programs share the steps of some key tiles.
    split: Numbers | None = None


class Outputs(NamedTuple):
    """Where the gradients of keys and values go: added to each block's `sums`, or else into two arrays of their own.

    Those of key tiles whose steps are shared are left in `parts`, by each program that shares one: [place, dK or dV,
    warpgroup, keys, head dim]. `arrivals` are semaphores that count, for each warpgroup of such a tile, who has.
    """

    sums: tuple[Ref, ...]
    gradients: tuple[Ref, ...]
    parts: Ref | None = None
    arrivals: Ref | None = None


class Scratch(NamedTuple):
    """Shared memory and barriers of one program. `*_ready` count a copy's arrival, `*_free` the readers' leaving."""

    key: Ref
    value: Ref
    # The query-side tiles, or after the last step the gradients on their way out.
    tiles: Ref
    statistics: Ref
    d_scores: Ref
    d_query: Ref
    # For each compute warpgroup the key head and the key tile, and a place where the number of an arrival goes from the
    # thread that took it to the others.
    numbers: Ref
    key_ready: Ref
    query_ready: Ref
    d_out_ready: Ref
    tiles_free: Ref
    d_scores_ready: Ref
    d_scores_free: Ref
    turn: Ref
    all_done: Ref

    @property
    def query(self) -> Ref:
        return self.tiles[0][0]

    @property
    def d_out(self) -> Ref:
        return self.tiles[0][1]

    @property
    def gradient(self) -> Ref:
        return self.tiles[1]


@dataclasses.dataclass(frozen=True)
class Block:
    """Shapes and static choices of the kernel."""

    config: BackwardConfig
    num_keys: int
    key_tiles: int
    group: int
    head_dim: int
    dtype: jnp.dtype
    gradient_dtype: jnp.dtype
    # Whether key tiles that no query sees are left alone: what would be added is zeros. Where tiles are of 128 queries,
    # registers are short of what that takes.
    skips_hidden: bool
    is_causal: bool
    # How many key heads' programs are taken side by side where that is neither one's nor all heads', else 0.
    heads_together: int
    # By how many query tiles programs beside each other begin apart; documents part them by themselves.
    tiles_apart: int
    # In how many equal stretches, one after the other, programs go through a head's query tiles.
    stretches: int
    # Whether the address that dQ is stored at stays in a register through the loops. Where gradients are added to sums
    # others would then be spilled, but with segment ids fewer are.
    keeps_address: bool
    scale: float
    splits: Splits | None

    def scratch_types(self) -> dict:
        """What `Scratch` is made of, by its fields' names."""
        config, head_dim = self.config, self.head_dim
        warpgroups, stages = BACKWARD_WARPGROUPS, config.stages
        key_value = matrix_scratch((warpgroups, WARPGROUP_ROWS, head_dim), self.dtype)
        query = matrix_scratch((stages, config.q_tile, head_dim), self.dtype)
        gradient = matrix_scratch((warpgroups, WARPGROUP_ROWS, head_dim), self.gradient_dtype)
        return Scratch(
            key=key_value,
            value=key_value,
            tiles=plgpu.RefUnion((query, query), gradient),
            statistics=plgpu.SMEM((stages, 2, config.q_tile), jnp.float32),
            d_scores=matrix_scratch((stages, warpgroups, WARPGROUP_ROWS, config.q_tile), self.dtype),
            d_query=plgpu.SMEM((warpgroups, *PIECE_AS_IT_LIES), jnp.float32),
            numbers=plgpu.SMEM((warpgroups, 3), jnp.int32),
            key_ready=plgpu.Barrier(num_arrivals=2, num_barriers=warpgroups),
            query_ready=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            d_out_ready=plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            tiles_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            d_scores_ready=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            d_scores_free=plgpu.Barrier(num_arrivals=warpgroups, num_barriers=stages),
            turn=plgpu.Barrier(num_barriers=warpgroups),
            all_done=plgpu.Barrier(num_arrivals=warpgroups),
        )._asdict()

    def parts_types(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """The array of what programs that share a tile leave, if any does."""
        if self.splits is None:
            return ()
        shape = (self.splits.places, 2, BACKWARD_WARPGROUPS, WARPGROUP_ROWS, self.head_dim)
        return (jax.ShapeDtypeStruct(shape, jnp.float32),)
