"""Layouts: in which order the tokens of a sequence are dealt to shards. Pure index maths: no devices, no kernels.

    contiguous  shard r holds one run of tokens. Under a causal mask the last shard works most.
    zigzag      the sequence is cut into 2N chunks; shard r holds chunks r and 2N-1-r, so every shard has the same
                causal work (Llama 3, arXiv:2407.21783, section 3.3.2).
    striped     shard r holds tokens r, r+N, r+2N, ... (Striped Attention, arXiv:2311.09431).

An array in layout order, split into N equal parts, gives every shard its tokens.
"""

import functools

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding
from jaxtyping import Array, Int32, Shaped

LAYOUTS = ("contiguous", "zigzag", "striped")

# Those in which, under a causal mask, queries of one shard that see anything of another shard all see as much of it.
EVEN_LAYOUTS = ("contiguous", "zigzag")


def check_layout(layout: str, seq_len: int, num_shards: int) -> None:
    """Raises ValueError if the layout is unknown or cannot deal `seq_len` tokens to `num_shards` shards evenly."""
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}: choose one of {', '.join(LAYOUTS)}")
    if num_shards < 1:
        raise ValueError(f"num_shards must be at least 1, got {num_shards}")
    parts = 2 * num_shards if layout == "zigzag" else num_shards
    if seq_len % parts:
        why = f"2 x {num_shards} chunks, two for each shard" if layout == "zigzag" else f"{num_shards} shards"
        raise ValueError(
            f"sequence length {seq_len} does not divide into {why} (layout {layout!r}): "
            f"pad it to {-(-seq_len // parts) * parts} and give the padding segment id 0"
        )


def shard_positions(
    layout: str, rank: int | Int32[Array, ""], shard_len: int, num_shards: int
) -> Int32[Array, " shard_len"]:
    """Global positions of the tokens of shard `rank`, in the order the shard holds them; `rank` may be traced."""
    rank = jnp.asarray(rank, jnp.int32)
    local = jnp.arange(shard_len, dtype=jnp.int32)
    if layout == "contiguous":
        return rank * shard_len + local
    if layout == "striped":
        return rank + num_shards * local
    assert layout == "zigzag", layout
    half = shard_len // 2
    late_start = (2 * num_shards - 1 - rank) * half
    return jnp.where(local < half, rank * half + local, late_start + local - half)


def layout_positions(layout: str, seq_len: int, num_shards: int) -> Int32[Array, " seq_len"]:
    """The global position of each token in layout order: `to_layout(x)[i]` is `x[layout_positions(...)[i]]`.

    Raises ValueError for an unknown `layout`, or a `seq_len` that it cannot deal evenly to `num_shards`.
    """
    check_layout(layout, seq_len, num_shards)
    ranks = jnp.arange(num_shards, dtype=jnp.int32)
    positions = jax.vmap(lambda rank: shard_positions(layout, rank, seq_len // num_shards, num_shards))(ranks)
    return positions.reshape(seq_len)


def to_layout(x: Shaped[Array, "..."], layout: str, num_shards: int, axis: int = 1) -> Shaped[Array, "..."]:
    """Reorders dim `axis` of `x` from natural order to layout order; shape and dtype stay.

    The sharding stays too, and no device collects the whole sequence: outside `jit`, and on Explicit mesh axes. Inside
    `jit` on Auto axes the partitioner decides, by what uses the result; `ring_attention` is such a use.

    Args:
        x: any array; sharded ones are accepted on every kind of mesh and exchanged between devices as needed.
        layout: one of `LAYOUTS`.
        num_shards: the number of shards of the sequence, the size of the sequence mesh axis.
        axis: the dim that holds the sequence.

    Raises:
        ValueError: unknown layout, a length it cannot deal evenly, or no such dim.
    """
    return _reorder(x, layout, num_shards, axis, inverse=False)


def from_layout(x: Shaped[Array, "..."], layout: str, num_shards: int, axis: int = 1) -> Shaped[Array, "..."]:
    """The inverse of `to_layout`: dim `axis` of `x` from the order of `layout` over `num_shards` to natural order.

    Same arguments and errors.
    """
    return _reorder(x, layout, num_shards, axis, inverse=True)


def _reorder(x: Array, layout: str, num_shards: int, axis: int, *, inverse: bool) -> Array:
    x = jnp.asarray(x)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} is out of range for an array of shape {x.shape}")
    axis %= x.ndim
    check_layout(layout, x.shape[axis], num_shards)
    if layout == "contiguous":
        return x
    reorder = functools.partial(_REORDER[layout, inverse], num_shards=num_shards, dim=axis)
    typed = jax.typeof(x).sharding
    if typed.spec[axis] is not None:
        return _reorder_on_explicit_axes(layout, inverse, num_shards, axis, typed)(x)
    if not isinstance(x, Tracer) and isinstance(x.sharding, NamedSharding):
        return _reorder_in_place(layout, inverse, num_shards, axis, x.sharding)(x)
    return reorder(x)


# Reshapes, flips and transposes rather than a gather: the partitioner turns them into exchanges of the parts that move,
# where a gather along a sharded dim would collect the whole array on every device.


def _to_zigzag(x: Array, *, num_shards: int, dim: int) -> Array:
    early, late = jnp.split(_split_dim(x, dim, 2 * num_shards), 2, axis=dim)
    return jnp.stack([early, jnp.flip(late, axis=dim)], axis=dim + 1).reshape(x.shape)


def _from_zigzag(x: Array, *, num_shards: int, dim: int) -> Array:
    pairs = _split_dim(_split_dim(x, dim, num_shards), dim + 1, 2)
    early = jax.lax.index_in_dim(pairs, 0, dim + 1, keepdims=False)
    late = jax.lax.index_in_dim(pairs, 1, dim + 1, keepdims=False)
    return jnp.concatenate([early, jnp.flip(late, axis=dim)], axis=dim).reshape(x.shape)


def _to_striped(x: Array, *, num_shards: int, dim: int) -> Array:
    return jnp.swapaxes(_split_dim(x, dim, x.shape[dim] // num_shards), dim, dim + 1).reshape(x.shape)


def _from_striped(x: Array, *, num_shards: int, dim: int) -> Array:
    return jnp.swapaxes(_split_dim(x, dim, num_shards), dim, dim + 1).reshape(x.shape)


_REORDER = {
    ("zigzag", False): _to_zigzag,
    ("zigzag", True): _from_zigzag,
    ("striped", False): _to_striped,
    ("striped", True): _from_striped,
}


@functools.lru_cache(maxsize=256)
def _reorder_on_explicit_axes(layout: str, inverse: bool, num_shards: int, dim: int, sharding: NamedSharding):
    """No Explicit type says how a dim that is sharded and then split lies on devices: the partitioner has to know."""
    reorder = functools.partial(_REORDER[layout, inverse], num_shards=num_shards, dim=dim)
    return jax.jit(jax.sharding.auto_axes(reorder, out_sharding=sharding))


@functools.lru_cache(maxsize=256)
def _reorder_in_place(layout: str, inverse: bool, num_shards: int, dim: int, sharding: NamedSharding):
    """Left to itself the partitioner gives up the sharding of a striped dim, and every device holds all of it."""
    reorder = functools.partial(_REORDER[layout, inverse], num_shards=num_shards, dim=dim)
    return jax.jit(reorder, out_shardings=sharding)


def _split_dim(x: Array, dim: int, parts: int) -> Array:
    """`x` with dim `dim` of length L as two dims, `parts` and L / parts."""
    return x.reshape(*x.shape[:dim], parts, x.shape[dim] // parts, *x.shape[dim + 1 :])
