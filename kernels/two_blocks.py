"""Two blocks that a kernel takes at once: in what order it takes their keys, and kernels that know of one block only.

A step of a ring reads and writes all of the running state, and backward all gradients of the queries. Where shards are
short that is a large part of its time, and half as much if it takes the blocks of two ranks. Their keys are folded:
first the first halves of both blocks, then the second halves, the second block's before the first one's. In a zigzag
ring a step takes the blocks of the ranks `step` and `step + 1` places before, in this order. What a query sees of both
is then one run of keys, as it is of one block, also where the first is rank 0's and the second that of the last rank.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Shaped

from .contract import AttentionState, BlockKernel, Gradients


def folded(first: Shaped[Array, "..."], second: Shaped[Array, "..."], dim: int = 0) -> Shaped[Array, "..."]:
    """What belongs to two blocks' keys, in the order in which a kernel takes them; `dim` is that of the keys."""
    (a, d), (b, c) = (jnp.split(x, [x.shape[dim] // 2], axis=dim) for x in (first, second))
    return jnp.concatenate([a, b, c, d], axis=dim)


def unfolded(both: Shaped[Array, "..."], dim: int = 0) -> tuple[Shaped[Array, "..."], Shaped[Array, "..."]]:
    """The two blocks' parts of something in the order of `folded`."""
    half, length = both.shape[dim] // 4, both.shape[dim] // 2
    a, b, c, d = jnp.split(both, [half, length, length + length - half], axis=dim)
    return jnp.concatenate([a, d], axis=dim), jnp.concatenate([b, c], axis=dim)


def for_block_of_tile(
    tile: jax.Array, tiles_of_block: int, num_blocks: int, use: Callable[[int, jax.Array], None]
) -> None:
    """In a kernel: calls `use` with the block, 0 or 1, that a tile of keys belongs to, and the tile's number in it."""
    if num_blocks == 1:
        use(0, tile)
        return
    half = tiles_of_block // 2
    is_second = (tile >= half) & (tile < 3 * half)
    pl.when(~is_second)(lambda: use(0, jnp.where(tile < half, tile, tile - 2 * half)))
    pl.when(is_second)(lambda: use(1, tile - half))


@dataclasses.dataclass(frozen=True)
class TwoAsOne:
    """A kernel that knows of one block only. Two are given to it as one, put together in memory."""

    kernel: BlockKernel

    def forward(self, query: Array, key: Any, value: Any, *args: Any, **options: Any) -> AttentionState:
        return self.kernel.forward(query, _as_one(key), _as_one(value), *args, **options)

    def backward(self, query: Array, key: Any, value: Any, *args: Any, **options: Any) -> Gradients:
        if not isinstance(key, tuple):
            return self.kernel.backward(query, key, value, *args, **options)
        d_out, lse, delta, dq, sums, mask = args
        arrays = query, _as_one(key), _as_one(value), d_out, lse, delta, dq, folded(*sums, dim=2)
        result = self.kernel.backward(*arrays, mask, **options)
        assert not isinstance(result.sums, tuple)
        return result._replace(sums=unfolded(result.sums, dim=2))

    def finished_d_query(self, dq: Array, *, scale: float) -> Array:
        return self.kernel.finished_d_query(dq, scale=scale)


def _as_one(blocks: Any) -> Array:
    return folded(*blocks, dim=1) if isinstance(blocks, tuple) else blocks
