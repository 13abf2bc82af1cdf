"""Building blocks of the Mosaic GPU kernels, and the only place here that imports private jax names.

Each operation that the Mosaic interpreter refuses is one function with a mathematically equal branch for it, here and
in `mosaic_gpu_inline`:

- `scores_while_accumulating`, `accumulate_while`, `accumulate_two_beside`: `wgmma` into a carried accumulator, its left
  operand in registers.
- `add_to_gmem`: a bulk copy that adds into global memory (`reduction_op="add"`).
- `by_one_warp`: what one warp of a warpgroup does alone.
- `semaphores`, `signal`, `wait_for_signals`: waiting for another program of the grid.

One has no such branch: `mosaic_gpu_inline.take_number`, a counter that programs share.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax._src import config as _private_config

type Ref = Any
"""A reference to memory inside a kernel, or a tree of them; jax's own types are private, and `ref.at` has another."""

WARPGROUP_ROWS = 64
"""Rows of one warpgroup's matrix product: the M of every Hopper `wgmma`."""

ROWS = plgpu.Layout.WGMMA.reduce(1)
"""Layout of one number per row of a matrix product."""

COLUMNS = plgpu.Layout.WGMMA.reduce(0)
"""Layout of one number per column of a matrix product."""


def is_interpreted() -> bool:
    """Whether kernels traced now run in the Mosaic interpreter (`plgpu.force_gpu_interpret_mode`)."""
    return _private_config.pallas_tpu_interpret_mode_context_manager.value is not None


def matrix_scratch(shape: Sequence[int], dtype: jnp.dtype) -> pl.MemoryRef:
    """Shared memory for matrices whose last dim is tiled and swizzled as `wgmma` and TMA want it."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = next(bytes_ for bytes_ in (128, 64, 32) if shape[-1] * itemsize % bytes_ == 0)
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))  # pyright: ignore[reportAbstractUsage]
    transforms = (tiling, plgpu.SwizzleTransform(swizzle))  # pyright: ignore[reportAbstractUsage]
    return plgpu.SMEM(tuple(shape), dtype, transforms=transforms)


def one_place(*scratch: Any) -> Any:
    """Shared memory for several arrays that lie over each other, each entry by its own bytes.

    The interpreter has them beside each other: to its race detector any two parts of arrays in one place are the same.
    """
    return scratch if is_interpreted() else plgpu.RefUnion(*scratch)


def full(shape: tuple[int, ...], value: float, layout: Any = plgpu.Layout.WGMMA) -> jax.Array:
    """A float32 constant held in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def across_columns(rows: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One number per row, repeated over the columns."""
    return lax.broadcast_in_dim(rows, shape, [0])


def across_rows(columns: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One number per column, repeated over the rows."""
    return lax.broadcast_in_dim(columns, shape, [1])


def _accumulator(rows: int, columns: int) -> plgpu.WGMMAAccumulatorRef:
    return plgpu.WGMMAAccumulatorRef((rows, columns), jnp.float32)


def slot_of(copy: jax.Array, stages: int) -> jax.Array:
    """Which of so many places in shared memory a copy goes to: they are taken in turn. `copy` counts from 0."""
    if stages & (stages - 1) == 0:
        return copy & (stages - 1)
    return lax.rem(copy, jnp.int32(stages))


def by_one_warp(work: Callable[[], None]) -> None:
    """Has the first warp of a warpgroup do something alone; the other three go on at once.

    A warpgroup that only copies would otherwise compute in four warps where each copy comes from and goes to, which
    takes time and energy from those that multiply. `work` takes scalars, copies and barriers; memory cannot be read in
    it. What follows may run before it, up to where the warpgroup's threads wait for each other. A barrier that is
    waited for in `work` may not be waited for by the whole warpgroup: each warp counts for itself how often it has.
    """
    if is_interpreted():
        work()
        return
    plgpu.warp_map(lambda warp: pl.when(warp == 0)(work))


def hidden_zero() -> jax.Array:
    """A zero that the compiler takes for a new number in every iteration of a loop.

    Added to the index of a tile that does not change in the loop, it keeps the compiler from computing the addresses of
    all of the tile's products before the loop and holding them in registers that the accumulators need.
    """
    return lax.optimization_barrier(jnp.int32(0))


def scores(query: Ref, key: Ref) -> jax.Array:
    """`query @ key.T` of two matrices in shared memory, waited for."""

    def body(acc):
        plgpu.wgmma(acc, query, key.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(body, _accumulator(query.shape[0], key.shape[0]))


def accumulate_while[R](acc: jax.Array, weights: jax.Array, value: Ref, *, use: Callable[[], R]) -> tuple[R, jax.Array]:
    """`use()` and under it `acc + weights @ value`; `weights` in registers, `value` in shared memory."""
    if is_interpreted():
        return use(), _plain_accumulate(acc, weights, value)

    def body(acc_ref):
        acc_ref[...] = acc
        plgpu.wgmma(acc_ref, weights, value)
        result = lax.optimization_barrier(use())
        return lax.optimization_barrier((result, acc_ref[...]))

    return pl.run_scoped(body, _accumulator(*acc.shape))


def accumulate(acc: jax.Array, weights: jax.Array, value: Ref) -> jax.Array:
    """`acc + weights @ value`, waited for; `weights` in registers, `value` in shared memory."""
    if is_interpreted():
        return _plain_accumulate(acc, weights, value)

    def body(acc_ref):
        acc_ref[...] = acc
        plgpu.wgmma(acc_ref, weights, value)
        return acc_ref[...]

    return pl.run_scoped(body, _accumulator(*acc.shape))


def _plain_accumulate(acc: jax.Array, weights: jax.Array, value: Ref) -> jax.Array:
    product = jnp.dot(weights, value[...], preferred_element_type=jnp.float32)
    plgpu.commit_smem()  # Orders this plain read before the next copy into `value`, as waiting for wgmma does.
    return acc + product


def scores_while_accumulating[R, W](
    query: Ref,
    key: Ref,
    acc: jax.Array,
    weights: jax.Array,
    value: Ref,
    *,
    use: Callable[[jax.Array], tuple[R, W]],
    wait: Callable[[W], None],
) -> tuple[R, jax.Array]:
    """The first result of `use(query @ key.T)`, and `acc + weights @ value`, `use` running under the second product.

    `weights` is in registers, the other operands in shared memory. `wait` is called with the second result of `use` and
    must wait for a barrier. The wait for the second product would follow otherwise, and ptxas moves it up into the
    arithmetic of `use`; across the branch that a barrier's wait is, it does not.

    Call it right after what must be waited for first: with a branch between the zeros of a new accumulator and its
    first product, ptxas writes them into registers.
    """
    if is_interpreted():
        result, for_wait = use(scores(query, key))
        wait(for_wait)
        return result, _plain_accumulate(acc, weights, value)

    def body(products_ref, acc_ref):
        acc_ref[...] = acc
        plgpu.wgmma(products_ref, query, key.transpose((1, 0)))
        plgpu.wgmma(acc_ref, weights, value)
        result = use(plgpu.wgmma_accumulator_load(products_ref, wait_n=1))
        # Keeps LLVM from moving this arithmetic behind the wait for the second product.
        result, for_wait = lax.optimization_barrier(result)
        wait(for_wait)
        return lax.optimization_barrier((result, acc_ref[...]))

    return pl.run_scoped(body, _accumulator(query.shape[0], key.shape[0]), _accumulator(*acc.shape))


def two_scores[R](
    key: Ref,
    query: Ref,
    value: Ref,
    d_out: Ref,
    *,
    use: Callable[[jax.Array], R],
    issued: Callable[[], None] | None = None,
) -> tuple[R, jax.Array]:
    """`use(key @ query.T)` and `value @ d_out.T` of tiles in shared memory, `use` running under the second product.

    `issued` is called when both are in flight.
    """

    def body(first, second):
        plgpu.wgmma(first, key, query.transpose((1, 0)))
        plgpu.wgmma(second, value, d_out.transpose((1, 0)))
        if issued is not None:
            issued()
        result = lax.optimization_barrier(use(plgpu.wgmma_accumulator_load(first, wait_n=1)))
        return lax.optimization_barrier((result, second[...]))

    acc = _accumulator(key.shape[0], query.shape[0])
    return pl.run_scoped(body, acc, acc)


def accumulate_two_beside[R](
    first: tuple[jax.Array, jax.Array, Ref],
    second: tuple[jax.Array, jax.Array, Ref],
    lefts: Sequence[Ref],
    rights: Sequence[Ref],
    *,
    use: Callable[[jax.Array], None],
) -> tuple[jax.Array, jax.Array]:
    """`acc + weights @ value` of both triples, while `use` is given the sum of `left.T @ right` over the pairs.

    All products are in flight together. `weights` are in registers, `value`, `left` and `right` in shared memory.
    """
    if is_interpreted():
        use(sum_of_products(lefts, rights))
        return _plain_accumulate(*first), _plain_accumulate(*second)

    def body(first_acc, second_acc, beside):
        first_acc[...], second_acc[...] = first[0], second[0]
        for left, right in zip(lefts, rights, strict=True):
            plgpu.wgmma(beside, left.transpose((1, 0)), right)
        plgpu.wgmma(first_acc, *first[1:])
        plgpu.wgmma(second_acc, *second[1:])
        use(plgpu.wgmma_accumulator_load(beside, wait_n=2))
        return first_acc[...], second_acc[...]

    shapes = first[0].shape, second[0].shape, (lefts[0].shape[1], rights[0].shape[1])
    return pl.run_scoped(body, *(_accumulator(*shape) for shape in shapes))


def sum_of_products(lefts: Sequence[Ref], rights: Sequence) -> jax.Array:
    """The sum of `left.T @ right` over pairs of matrices in shared memory, waited for."""

    def body(acc):
        for left, right in zip(lefts, rights, strict=True):
            plgpu.wgmma(acc, left.transpose((1, 0)), right)
        return acc[...]

    return pl.run_scoped(body, _accumulator(lefts[0].shape[1], rights[0].shape[1]))


def semaphores(*shape: int) -> Ref | None:
    """Semaphores that all programs of a kernel share, 0 at its beginning. Every call makes new ones.

    None in the interpreter, which runs one program of the grid after the other.
    """
    return None if is_interpreted() else pl.get_global(plgpu.SemaphoreType.REGULAR(shape))


def signal(everyones: Ref | None, *where: jax.Array) -> None:
    """Adds 1 to one of `semaphores` when all of this warpgroup's threads have written what they wrote before."""
    if everyones is not None:
        plgpu.commit_smem()  # For its barrier: one thread signals for all.
        plgpu.semaphore_signal(everyones.at[where], memory_scope="gpu")


def wait_for_signals(everyones: Ref | None, *where: jax.Array, count: jax.Array) -> None:
    """Waits for so many signals of one of `semaphores`, and takes them off."""
    if everyones is not None:
        plgpu.semaphore_wait(everyones.at[where], count, memory_scope="gpu")


def add_to_gmem(source: Ref, array: Ref, entry: tuple, first_row: jax.Array | int, columns: tuple) -> None:
    """Adds a committed tile in shared memory to rows `first_row...` of `array.at[*entry, rows, *columns]`.

    The copy is asynchronous, a group of its own (`plgpu.wait_smem_to_gmem`). The number of all rows divides by 8.
    The interpreter's branch adds without atomics: it runs one program of the grid at a time.
    """
    if not is_interpreted():
        rows = pl.ds(first_row, source.shape[0])
        plgpu.copy_smem_to_gmem(source, array.at[(*entry, rows, *columns)], reduction_op="add")
        return
    num_rows = array.shape[len(entry)]

    @pl.loop(0, jnp.minimum(source.shape[0], num_rows - first_row) // 8)
    def _(group):
        where = (*entry, pl.ds(first_row + group * 8, 8), *columns)
        array[where] = array[where] + source[pl.ds(group * 8, 8)]
