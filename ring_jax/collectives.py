"""The only collectives of the project: everything that crosses devices passes here. Called inside `jax.shard_map`."""

from collections.abc import Hashable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PyTree, Shaped

AxisName = Hashable | tuple[Hashable, ...]


def rotate[Tree: PyTree](tree: Tree, axis_name: AxisName, *, by: int = 1) -> Tree:
    """One hop: every device sends its arrays to the device `by` places on and receives those of the one before it."""
    by %= lax.axis_size(axis_name)
    if by == 0:
        return tree
    axes, ring = _ring(axis_name, by)

    def send(x: Array) -> Array:
        # As bits: XLA's CPU backend would widen a 16-bit float to float32 before sending it.
        if x.dtype.itemsize != 2:
            return lax.ppermute(x, axes, ring)
        sent = lax.ppermute(lax.bitcast_convert_type(x, jnp.uint16), axes, ring)
        return lax.bitcast_convert_type(sent, x.dtype)

    return jax.tree.map(send, tree)


def _ring(axis_name: AxisName, by: int) -> tuple[AxisName, list[tuple[int, int]]]:
    """The axes in the mesh's order, as `ppermute` wants them, and the hops of a ring in the order of `axis_name`."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    ordered = names
    if len(names) > 1:
        ordered = tuple(sorted(names, key=jax.sharding.get_abstract_mesh().axis_names.index))
    index_in_mesh_order = np.arange(lax.axis_size(names)).reshape([lax.axis_size(name) for name in ordered])
    of_rank = index_in_mesh_order.transpose([ordered.index(name) for name in names]).ravel().tolist()
    return ordered, list(zip(of_rank, of_rank[by:] + of_rank[:by], strict=True))


def gather_shards(x: Shaped[Array, "..."], axis_name: AxisName) -> Shaped[Array, "num_shards ..."]:
    """Every device's `x`, stacked by rank. For small index arrays only: keys and values never pass here."""
    return lax.all_gather(x, axis_name)
