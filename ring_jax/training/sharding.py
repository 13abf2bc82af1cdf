"""Where weights and optimizer state live: sharded over the data and seq axes together, so that no device holds all."""

import math
from collections.abc import Hashable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

BATCH_AXIS, SEQ_AXIS, HEAD_AXIS = "data", "seq", "tensor"

# The dim of heads, feed-forward columns or vocabulary, which the tensor axis cuts; counted after the dim of layers.
_HEAD_DIMS: dict[tuple[Hashable, ...], int] = {
    ("query", "kernel"): 1,
    ("key", "kernel"): 1,
    ("value", "kernel"): 1,
    ("out", "kernel"): 0,
    ("mlp", "gate"): 1,
    ("mlp", "up"): 1,
    ("mlp", "down"): 0,
    ("params", "head"): 1,
}


def shard_weights(shapes: Any, mesh: Mesh) -> Any:
    """A pytree of weights and optimizer state, as shapes and dtypes, with the sharding of each array.

    The tensor axis cuts heads, feed-forward columns and the vocabulary of the head; the data and seq axes together cut
    the first other dim that they divide, never the one of stacked layers, so that a step gathers one layer at a time.
    Arrays without such a dim are whole on every device. Optimizer moments lie where their weights lie.

    Raises:
        ValueError: the tensor axis does not divide a dim it should cut.
    """
    leaves, tree = jax.tree.flatten_with_path(shapes)
    return jax.tree.unflatten(tree, [_with_sharding(path, leaf, mesh) for path, leaf in leaves])


def _with_sharding(path: tuple[Any, ...], leaf: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    keys = tuple(_key(entry) for entry in path)
    spec = _weight_spec(keys, leaf.shape, mesh)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))


def _weight_spec(keys: tuple[Hashable, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    dims: list[Hashable] = [None] * len(shape)
    first = 1 if "layers" in keys else 0
    if HEAD_AXIS in mesh.shape and (head_dim := _HEAD_DIMS.get(keys[-2:])) is not None:
        size = shape[first + head_dim]
        if size % mesh.shape[HEAD_AXIS]:
            raise ValueError(
                f"mesh axis {HEAD_AXIS!r} of size {mesh.shape[HEAD_AXIS]} does not divide the {size} "
                f"{'heads' if keys[-1] == 'kernel' else 'columns'} of {'.'.join(map(str, keys))}: use a smaller axis"
            )
        dims[first + head_dim] = HEAD_AXIS
    axes = tuple(axis for axis in (BATCH_AXIS, SEQ_AXIS) if axis in mesh.shape)
    parts = math.prod(mesh.shape[axis] for axis in axes)
    for dim in range(first, len(shape)):
        if dims[dim] is None and shape[dim] % parts == 0:
            dims[dim] = axes
            break
    return PartitionSpec(*dims)


def _key(entry: Any) -> Hashable:
    return next(getattr(entry, name) for name in ("key", "name", "idx") if hasattr(entry, name))
