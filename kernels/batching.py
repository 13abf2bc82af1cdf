"""`jax.vmap` of block kernels that jax cannot map by itself: the mapped dim joins the batch."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Int32, PyTree

from .contract import AttentionState, BlockKernel, BlockMask, Gradients
from .tracing import diagonal_as_none, with_key_positions


@dataclasses.dataclass(frozen=True)
class Mappable:
    """A block kernel that can be mapped with `jax.vmap`, over any of its arrays.

    All arrays of the contract but the positions begin with the batch, so one launch computes the mapped blocks too.
    Arrays that are not mapped are repeated for it. Where positions are mapped, each block has tiles of its own to
    visit, and the blocks are computed one after the other; what they visit is computed for each of them alone.
    """

    kernel: BlockKernel

    def forward(self, *args: Any, **options: Any) -> AttentionState:
        return _call(lambda *a: self.kernel.forward(*a, **options), *args)

    def backward(self, *args: Any, **options: Any) -> Gradients:
        return _call(lambda *a: self.kernel.backward(*a, **options), *args)

    def finished_d_query(self, dq: Array, *, scale: float) -> Array:
        return self.kernel.finished_d_query(dq, scale=scale)


def _call(function: Any, *args: Any) -> Any:
    """`function(*args)`, whose last argument is the mask."""
    *arrays, mask = args

    @custom_vmap
    def call(mask, arrays):
        return function(*arrays, with_key_positions(mask))

    @call.def_vmap
    def _(size: int, is_mapped: list, mask: BlockMask, arrays: list):
        mask_is_mapped, arrays_are_mapped = is_mapped
        if mask_is_mapped.q_positions or mask_is_mapped.k_positions or mask_is_mapped.block:

            def one(index):
                mask_of_one, arrays_of_one = _entry((mask, arrays), tuple(is_mapped), index)
                return call(mask_of_one.alone(), arrays_of_one)

            results = lax.map(one, jnp.arange(size))
        else:
            fold = functools.partial(_fold, size=size)
            ids = jax.tree.map(fold, _segment_ids(mask), _segment_ids(mask_is_mapped))
            results = call(dataclasses.replace(mask, **ids), jax.tree.map(fold, arrays, arrays_are_mapped))
            results = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return call(diagonal_as_none(mask), arrays)


def _segment_ids(mask: BlockMask) -> dict[str, Any]:
    return {"q_segment_ids": mask.q_segment_ids, "k_segment_ids": mask.k_segment_ids}


def _entry(args: PyTree, is_mapped: PyTree[bool], index: Int32[Array, ""]) -> PyTree:
    """The arguments of one mapped block."""
    return jax.tree.map(
        lambda x, mapped: lax.dynamic_index_in_dim(x, index, keepdims=False) if mapped else x, args, is_mapped
    )


def _fold(x: Array, is_mapped: bool, size: int) -> Array:
    """An array `[size, B, ...]`, or `[B, ...]` for all alike, as `[size * B, ...]`."""
    x = x if is_mapped else jnp.broadcast_to(x[None], (size, *x.shape))
    return x.reshape(-1, *x.shape[2:])
