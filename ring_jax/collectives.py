"""The only collectives of the project: everything that crosses devices passes here. Called inside `jax.shard_map`."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, PyTree, Shaped

AxisName = Hashable | tuple[Hashable, ...]


def rotate[Tree: PyTree](tree: Tree, axis_name: AxisName) -> Tree:
    """One hop: every device sends its arrays to the next device of the axis and receives those of the one before."""
    size = lax.axis_size(axis_name)
    if size == 1:
        return tree
    ring = [(source, (source + 1) % size) for source in range(size)]

    def send(x: Array) -> Array:
        # As bits: XLA's CPU backend would widen a 16-bit float to float32 before sending it.
        if x.dtype.itemsize != 2:
            return lax.ppermute(x, axis_name, ring)
        sent = lax.ppermute(lax.bitcast_convert_type(x, jnp.uint16), axis_name, ring)
        return lax.bitcast_convert_type(sent, x.dtype)

    return jax.tree.map(send, tree)


def gather_shards(x: Shaped[Array, "..."], axis_name: AxisName) -> Shaped[Array, "num_shards ..."]:
    """Every device's `x`, stacked by rank. For small index arrays only: keys and values never pass here."""
    return lax.all_gather(x, axis_name)
