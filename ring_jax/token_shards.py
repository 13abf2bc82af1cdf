"""Work that treats every token alone, done on the shard that holds the token: chunked, and never gathered.

A scan over chunks of a sharded sequence would make the partitioner gather it, and a scan that sums weight gradients
outside `shard_map` would reduce them over the devices in every chunk. Inside, chunks are local and gradients are
reduced once.
"""

import math
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, PyTree, Shaped

from .collectives import AxisName
from .kernels import match_varying

# A chunk is at most this part of a shard's tokens, so that even a short shard never holds a wide intermediate whole.
_MIN_CHUNKS = 4


def num_shards(axis: AxisName) -> int:
    """The number of parts that the mesh of `jax.set_mesh` cuts a dim into over `axis`; 1 without a mesh or the axis."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[name] for name in _names(axis) if name in sizes)


def token_spec(batch_axis: AxisName | None, seq_axis: AxisName) -> PartitionSpec:
    """How `[B, T, ...]` arrays are sharded: over those of the axes that the mesh of `jax.set_mesh` has, not manual."""
    known = _axes_of_kind(AxisType.Auto, AxisType.Explicit)
    dims = (tuple(name for name in _names(axis) if name in known) for axis in (batch_axis, seq_axis))
    return PartitionSpec(*(names or None for names in dims))


def constrain(x: Shaped[Array, "B T ..."], spec: PartitionSpec) -> Shaped[Array, "B T ..."]:
    """Tells the partitioner that `x` is sharded so, and over no other Auto axis; nothing where `spec` is empty.

    Raises:
        ValueError: the batch or the sequence does not divide by its axes.
    """
    if not any(spec):
        return x
    _check_divides(x.shape, spec)
    return jax.lax.with_sharding_constraint(x, spec)


def constrain_weight(weight: Shaped[Array, "..."], dim: int, axis: AxisName | None) -> Shaped[Array, "..."]:
    """Tells the partitioner to use `weight` cut along `dim` over `axis` (tensor parallelism), gathered over all others.

    Left to itself it may gather over `axis` too, and every device of it then does the same work. Nothing where the mesh
    has no such axis or `dim` does not divide by it.
    """
    names = tuple(name for name in _names(axis) if name in _axes_of_kind(AxisType.Auto))
    if not names or weight.shape[dim] % num_shards(names):
        return weight
    return jax.lax.with_sharding_constraint(weight, PartitionSpec(*[None] * dim, names))


def map_token_shards(
    fn: Callable[[PyTree, PyTree], PyTree],
    tokens: PyTree,
    weights: PyTree,
    *,
    batch_axis: AxisName | None,
    seq_axis: AxisName,
) -> PyTree:
    """`fn(tokens, weights)` on each shard of `tokens`, arrays `[B, T, ...]`; the result's arrays are `[B, T, ...]` too.

    `fn` sees whole `weights` (still sharded over axes that do not cut tokens, such as tensor parallelism) and must
    treat each token alone. Without a mesh, inside a `shard_map` over these axes, or where each is of one device, it is
    simply called.

    Raises:
        ValueError: the batch or the sequence does not divide by its axes.
    """

    def local(tokens: PyTree, weights: PyTree) -> PyTree:
        # Widened once here, the weights' gradients are summed over the shards once, not in every chunk.
        return fn(tokens, match_varying(weights, like=tokens))

    spec = token_spec(batch_axis, seq_axis)
    if not any(spec):
        return local(tokens, weights)
    _check_divides(jax.tree.leaves(tokens)[0].shape, spec)
    # Axes of one device cut nothing, and XLA's partitioner refuses sums over them beside others that are not manual.
    cut = PartitionSpec(*(tuple(name for name in _names(names) if num_shards(name) > 1) or None for names in spec))
    manual = {name for names in cut for name in _names(names)}
    mapped = local
    if manual:
        mapped = jax.shard_map(local, in_specs=(cut, PartitionSpec()), out_specs=cut, axis_names=manual)
    return on_auto_axes(mapped, spec)(tokens, weights)


def on_auto_axes(fn: Callable[..., Any], out_spec: PartitionSpec) -> Callable[..., Any]:
    """`fn` with the Explicit axes of the mesh treated as Auto inside it; `out_spec` says how its result is sharded.

    Weights sharded over the same axes as tokens (FSDP) are ambiguous operands to the Explicit type system and
    ordinary ones to the partitioner.
    """
    explicit = _axes_of_kind(AxisType.Explicit)
    if not explicit:
        return fn
    spec = PartitionSpec(*(tuple(n for n in _names(names) if n in explicit) or None for names in out_spec))
    return jax.sharding.auto_axes(axes=tuple(explicit), out_sharding=spec)(fn)


def call_on_auto_axes[R](method: Callable[..., R], module: nnx.Module, *args: Any, out_spec: PartitionSpec) -> R:
    """`method(module, *args)` by `on_auto_axes`; the method must not change the module."""
    if not _axes_of_kind(AxisType.Explicit):
        return method(module, *args)
    graph, state = nnx.split(module)
    return on_auto_axes(lambda state, *args: method(nnx.merge(graph, state), *args), out_spec)(state, *args)


def to_chunks(x: Shaped[Array, "B T *rest"], chunk_size: int) -> Shaped[Array, "chunks length *rest"]:
    """The tokens of one shard in equal chunks of at most `chunk_size` tokens; zeros fill the last one up."""
    tokens = x.shape[0] * x.shape[1]
    num_chunks = min(tokens, max(_MIN_CHUNKS, -(-tokens // chunk_size)))
    length = -(-tokens // num_chunks)
    flat = x.reshape(tokens, *x.shape[2:])
    flat = jnp.pad(flat, ((0, num_chunks * length - tokens), *((0, 0) for _ in x.shape[2:])))
    return flat.reshape(num_chunks, length, *x.shape[2:])


def from_chunks(chunks: Shaped[Array, "chunks length *rest"], batch: int, seq_len: int) -> Shaped[Array, "B T *rest"]:
    """The inverse of `to_chunks`, without the zeros."""
    rest = chunks.shape[2:]
    return chunks.reshape(-1, *rest)[: batch * seq_len].reshape(batch, seq_len, *rest)


def _axes_of_kind(*kinds: AxisType) -> frozenset[Any]:
    mesh = jax.sharding.get_abstract_mesh()
    return frozenset(n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind in kinds)


def _names(axis: AxisName | None) -> tuple[Hashable, ...]:
    if axis is None:
        return ()
    return axis if isinstance(axis, tuple) else (axis,)


def _check_divides(shape: tuple[int, ...], spec: PartitionSpec) -> None:
    sizes = jax.sharding.get_abstract_mesh().shape
    for what, length, names in zip(("batch size", "sequence length"), shape, spec, strict=False):
        parts = math.prod(sizes[name] for name in _names(names))
        if length % parts:
            raise ValueError(
                f"{what} {length} does not divide by the {parts} devices of mesh axes {names}: "
                f"pad it to {-(-length // parts) * parts}, or use a mesh where it divides"
            )
