"""The type that `jax.shard_map(check_vma=True)` gives arrays: the mesh axes over which their values may differ."""

import jax
from jax import lax
from jaxtyping import Array, PyTree


def match_varying[Tree: PyTree](tree: Tree, *, like: PyTree) -> Tree:
    """Marks the arrays of `tree` as varying over every mesh axis that any array of `tree` or `like` varies over.

    Loop carries must keep their type, so fresh zeros need the type of what is added to them. Outside `check_vma=True`
    it does nothing.
    """
    axes = frozenset[str]().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves((tree, like))))

    def widen(x: Array) -> Array:
        missing = tuple(axes - jax.typeof(x).mat.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(widen, tree)
