"""`jax.vmap` of block kernels that jax cannot map by itself: the mapped dim joins the batch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Int32, PyTree

from .contract import AttentionState, BlockKernel, BlockMask, Gradients


@dataclasses.dataclass(frozen=True)
class Mappable:
    """A block kernel that can be mapped with `jax.vmap`, over any of its arrays.

    All arrays of the contract but the positions begin with the batch, so one launch computes the mapped blocks too.
    Arrays that are not mapped are repeated for it. Where positions are mapped, each block has tiles of its own to
    visit, and the blocks are computed one after the other.
    """

    kernel: BlockKernel

    def forward(self, *args: Any, **options: Any) -> AttentionState:
        return _call(lambda *a: self.kernel.forward(*a, **options), *args)

    def backward(self, *args: Any, **options: Any) -> Gradients:
        return _call(lambda *a: self.kernel.backward(*a, **options), *args)


def _call(function: Any, *args: Any) -> Any:
    """`function(*args)`, whose last argument is the mask."""
    *arrays, mask = args
    # A kernel may ask whether both sides are the same tokens, and would not see it in two traced arrays.
    is_diagonal = mask.q_positions is mask.k_positions
    positions = (mask.q_positions,) if is_diagonal else (mask.q_positions, mask.k_positions)

    @custom_vmap
    def call(positions, arrays, q_segment_ids, k_segment_ids):
        return function(*arrays, BlockMask(positions[0], positions[-1], q_segment_ids, k_segment_ids, mask.is_causal))

    @call.def_vmap
    def _(size: int, is_mapped: list, *args: PyTree):
        if any(jax.tree.leaves(is_mapped[0])):
            results = lax.map(lambda index: call(*_entry(args, tuple(is_mapped), index)), jnp.arange(size))
        else:
            positions, *batched = args
            folded = jax.tree.map(lambda x, mapped: _fold(x, mapped, size), batched, is_mapped[1:])
            results = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), call(positions, *folded))
        return results, jax.tree.map(lambda _: True, results)

    return call(positions, arrays, mask.q_segment_ids, mask.k_segment_ids)


def _entry(args: PyTree, is_mapped: PyTree[bool], index: Int32[Array, ""]) -> PyTree:
    """The arguments of one mapped block."""
    return jax.tree.map(
        lambda x, mapped: lax.dynamic_index_in_dim(x, index, keepdims=False) if mapped else x, args, is_mapped
    )


def _fold(x: Array, is_mapped: bool, size: int) -> Array:
    """An array `[size, B, ...]`, or `[B, ...]` for all alike, as `[size * B, ...]`."""
    x = x if is_mapped else jnp.broadcast_to(x[None], (size, *x.shape))
    return x.reshape(-1, *x.shape[2:])
