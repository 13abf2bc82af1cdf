"""Operations that Pallas has no words for, written in Mosaic GPU's own dialect.

The Mosaic interpreter knows none of it: every function has a mathematically equal branch for it. Only `take_number` has
none; programs that are interpreted share no counter (`mosaic_gpu_queue.Queue.is_fixed`).
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils as mgpu_utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector
from jaxtyping import Array, Float, Float32

from .mosaic_gpu_primitives import ROWS, Ref, across_columns, is_interpreted

PIECE_AS_IT_LIES = (32, 128)
"""Shape of a matrix of 64 rows and columns `as_it_lies` in a warpgroup's registers."""

_WGMMA = plgpu.Layout.WGMMA
# Of such a matrix warp, half and row make up its rows, and eight columns, thread and number its columns; a warpgroup's
# threads hold them by eight columns, warp, row, thread, half and number.
_MATRIX_DIMS, _THREAD_DIMS = (-6, -5, -4, -3, -2, -1), (-5, -2, -4, -6, -3, -1)


def _inline(arg_types: tuple[Any, ...], return_type: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`plgpu.inline_mgpu`, whose own type has it that what it decorates keeps its first argument."""
    return plgpu.inline_mgpu(arg_types=arg_types, return_type=return_type)


def exponents_below(
    products: Float32[Array, "rows columns"], maximum: Float32[Array, " rows"], factor: float, *, limit: float
) -> tuple[Float32[Array, "rows columns"], Float32[Array, " rows"], Float32[Array, " rows"]]:
    """Exponents `products * factor - maximum` of a row, its maximum, and by what factor earlier sums decay.

    A row's maximum is raised by its largest exponent where that is above `limit` (at least 0), and where it was -inf.
    Elsewhere it stays, and the factor is 1.

    Rows are rarely raised. So a warp first only looks whether any of its rows must be: it compares the exponents' bits
    as integers, which orders those above 0 as they are and takes one instruction for two of them.
    """
    if is_interpreted():
        base = jnp.where(maximum == -jnp.inf, 0.0, maximum)
        exponents = products * factor - across_columns(base, products.shape)
        largest = exponents.max(axis=1)
        shift = jnp.where((largest > limit) | (maximum == -jnp.inf), largest, 0.0)
        raised = base + shift
        return exponents - across_columns(shift, exponents.shape), raised, jnp.exp2(maximum - raised)

    matrix, row = (
        plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)
        for shape, layout in ((products.shape, _WGMMA), (maximum.shape, ROWS))
    )

    @_inline(arg_types=(_WGMMA, ROWS), return_type=(matrix, row, row))
    def compute(_ctx: Any, products: Any, maximum: Any) -> Any:
        zero, nothing = _constant(0.0), _constant(-np.inf)
        is_new = [arith.cmpf(arith.CmpFPredicate.OEQ, x, nothing) for x in _elements(maximum)]
        base = _with_elements(
            maximum, [arith.select(new, zero, x) for new, x in zip(is_new, _elements(maximum), strict=True)]
        )
        exponents = products * _splat(products, factor) - _across(base, products)
        # A thread holds two rows; in the order of registers, two columns of one, then of the other.
        registers, i32 = list(exponents.registers.flat), ir.IntegerType.get_signless(32)
        limit_bits = arith.constant(i32, int(np.float32(limit).view(np.int32)))
        must_raise = arith.ori(*is_new)
        for of_row in (registers[0::2], registers[1::2]):
            bits = [arith.bitcast(i32, x) for register in of_row for x in _parts(register)]
            largest = bits[0]
            for x in bits[1:]:
                largest = arith.maxsi(largest, x)
            must_raise = arith.ori(must_raise, arith.cmpi(arith.CmpIPredicate.sgt, largest, limit_bits))

        def raise_() -> Any:
            largest = exponents.reduce("max", 1)
            shift = []
            for new, x in zip(is_new, _elements(largest), strict=True):
                above = arith.cmpf(arith.CmpFPredicate.OGT, x, _constant(limit))
                shift.append(arith.select(arith.ori(new, above), x, zero))
            shift = _with_elements(maximum, shift)
            raised = base + shift
            return exponents - _across(shift, exponents), raised, (maximum - raised).exp2(approx=True)

        def keep() -> Any:
            return exponents, maximum, _with_elements(maximum, [_constant(1.0)] * 2)

        return _if_any(must_raise, raise_, keep)

    return compute(products, maximum)


def scale_rows_below_one(
    matrix: Float32[Array, "rows columns"], factors: Float32[Array, " rows"]
) -> Float32[Array, "rows columns"]:
    """`matrix * factors` a row, for factors up to 1. A warp whose factors are all 1 leaves its rows as they are."""
    if is_interpreted():
        return matrix * across_columns(factors, matrix.shape)

    @_inline(arg_types=(_WGMMA, ROWS), return_type=plgpu.ShapeDtypeStruct(matrix.shape, jnp.float32, layout=_WGMMA))
    def scale(_ctx: Any, matrix: Any, factors: Any) -> Any:
        below = [arith.cmpf(arith.CmpFPredicate.ULT, x, _constant(1.0)) for x in _elements(factors)]
        return _if_any(arith.ori(*below), lambda: matrix * _across(factors, matrix), lambda: matrix)

    return scale(matrix, factors)


def sums_of_parts(
    matrix: Float32[Array, "rows columns"],
) -> tuple[Float32[Array, "rows 8"], Float32[Array, "rows 8"]]:
    """Sums over every eighth column, with no exchange between threads: of the first 3/4 of the columns, and of all."""
    num_rows, columns = matrix.shape
    num_first = columns * 3 // 4
    assert num_first % 8 == 0, f"3/4 of {columns} columns are no multiple of 8"
    if is_interpreted():
        first, rest = (x.reshape(num_rows, -1, 8).sum(axis=1) for x in (matrix[:, :num_first], matrix[:, num_first:]))
        return first, first + rest
    sums = plgpu.ShapeDtypeStruct((num_rows, 8), jnp.float32, layout=_WGMMA)

    @_inline(arg_types=(_WGMMA,), return_type=(sums, sums))
    def compute(_ctx: Any, matrix: Any) -> Any:
        # Eight columns of a matrix are registers of their own.
        by_columns = np.moveaxis(matrix.registers, 1, 0)[:, :, None]
        totals = list(itertools.accumulate(by_columns, np.vectorize(arith.addf, otypes=[object])))
        first, every = (
            mgpu.FragmentedArray(_registers=x, _layout=matrix.layout, _is_signed=None)
            for x in (totals[num_first // 8 - 1], totals[-1])
        )
        return first, every

    return compute(matrix)


def known_after(number: jax.Array, values: Float[Array, "rows columns"]) -> jax.Array:
    """`number`, an int32, which no compiler knows before it has computed `values`, float32 or of 16 bits.

    None of these may be negative, lest it be another number; NaN may.

    What waits at a barrier with such a number does so after the arithmetic of `values`. Without, ptxas moves waits as
    far up as it can, or the arithmetic as far down.
    """
    if is_interpreted():
        return number
    splat = plgpu.Layout.WG_SPLAT

    @_inline(arg_types=(splat, _WGMMA), return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=splat))
    def compute(_ctx: Any, number: Any, values: Any) -> Any:
        # No sign is set, of NaN neither: the GPU's arithmetic gives only one, the positive. Of two numbers of 16 bits,
        # which one instruction rounds, the second one's sign is looked at. By the vote ptxas sees that the result is
        # the same in all threads of a warp, and that addresses made of it need no register in each.
        i32 = ir.IntegerType.get_signless(32)
        signs = functools.reduce(arith.ori, _words(values))
        asm = (
            "{ .reg .b32 n; .reg .pred p; setp.lt.s32 p, $2, 0; vote.sync.any.pred p, p, 0xffffffff; "
            "selp.u32 n, 1, 0, p; add.u32 $0, $1, n; }"
        )
        known = llvm.inline_asm(i32, [number.registers.item(), signs], asm, "=r,r,r", has_side_effects=True)
        return mgpu.FragmentedArray.splat(known, (), is_signed=True)

    return compute(number, values)


def store_as_it_lies(values: Float32[Array, "64 64"], buffer: Ref, *, keeps_address: bool) -> None:
    """Stores a matrix from registers into shared memory of `PIECE_AS_IT_LIES`, as it lies there: see `as_it_lies`.

    In a loop it keeps its address in a register, or computes it each time.

    So it takes the fewest stores and one address, no number is moved for them, and no two threads meet at shared
    memory's banks. Where all is only added up, it can be put in order once, at the end.
    """
    assert values.shape == (64, 64)
    assert buffer.shape == PIECE_AS_IT_LIES
    if is_interpreted():
        buffer[...] = as_it_lies(values)
        return

    @_inline(arg_types=(_WGMMA, plgpu.RefType()), return_type=None)
    def store(_ctx: Any, values: Any, buffer: Any) -> None:
        i32 = ir.IntegerType.get_signless(32)
        start = llvm.ptrtoint(i32, mgpu_utils.memref_ptr(buffer))
        if keeps_address:
            thread = mgpu_utils.thread_idx()
        else:
            # What comes of it cannot be taken out of a loop.
            thread = llvm.inline_asm(i32, [], "mov.u32 $0, %tid.x;", "=r", has_side_effects=True)
        thread = arith.remui(thread, arith.constant(i32, 128))
        place = arith.addi(start, arith.muli(thread, arith.constant(i32, 16)))
        for i, registers in enumerate(values.registers.reshape(8, 2)):
            asm = f"st.shared.v4.f32 [$0 + {i * 128 * 16}], {{$1, $2, $3, $4}};"
            operands = [place, *(x for register in registers for x in _parts(register))]
            llvm.inline_asm(ir.Type.parse("!llvm.void"), operands, asm, "r,f,f,f,f", has_side_effects=True)

    store(values, buffer)


def as_it_lies(matrix: Float32[Array, "*others 64 64"]) -> Float32[Array, "*others 32 128"]:
    """The numbers of a matrix as a warpgroup's threads hold them: four of each thread, four more of each, and so on.

    A thread holds of every eight columns two, in two rows that are eight apart.
    """
    *others, _, _ = matrix.shape
    by_threads = jnp.moveaxis(matrix.reshape(*others, 4, 2, 8, 8, 4, 2), _MATRIX_DIMS, _THREAD_DIMS)
    return by_threads.reshape(*others, *PIECE_AS_IT_LIES)


def from_as_it_lies(numbers: Float32[Array, "*others 32 128"]) -> Float32[Array, "*others 64 64"]:
    """The matrix of which `as_it_lies` gives the numbers."""
    *others, _, _ = numbers.shape
    by_rows = jnp.moveaxis(numbers.reshape(*others, 8, 4, 8, 4, 2, 2), _THREAD_DIMS, _MATRIX_DIMS)
    return by_rows.reshape(*others, 64, 64)


def take_number(counter: Ref, place: Ref, *, is_after_writes: bool = False) -> jax.Array:
    """A number from 0 on that no other call in the grid gets; `place` is an int32 in shared memory.

    If it `is_after_writes`, then whoever gets a number can read what all with a smaller one have written before.
    """
    order = "acq_rel" if is_after_writes else "relaxed"

    @_inline(arg_types=(plgpu.RefType(), plgpu.RefType()), return_type=None)
    def take(_ctx: Any, counter: Any, place: Any) -> None:
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        mgpu_utils.warpgroup_barrier()  # All threads have read the number before.
        thread = arith.remui(mgpu_utils.thread_idx(), arith.constant(i32, 128))
        is_first = arith.cmpi(arith.CmpIPredicate.eq, thread, arith.constant(i32, 0))
        where = llvm.ptrtoint(i64, mgpu_utils.memref_ptr(counter))
        to = llvm.ptrtoint(i32, mgpu_utils.memref_ptr(place))
        asm = f"{{ .reg .u32 n; @$0 atom.{order}.gpu.global.add.u32 n, [$1], 1; @$0 st.shared.u32 [$2], n; }}"
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [is_first, where, to], asm, "b,l,r", has_side_effects=True)
        mgpu_utils.warpgroup_barrier()

    take(counter, place)
    return place[...]


def _constant(value: float) -> Any:
    f32 = ir.F32Type.get()
    return arith.constant(f32, ir.FloatAttr.get(f32, value))


def _splat(like: Any, value: float) -> Any:
    return mgpu.FragmentedArray.splat(_constant(value), like.shape, like.layout)


def _across(rows: Any, matrix: Any) -> Any:
    return rows.broadcast_in_dim(matrix.shape, (0,), matrix.layout)


def _parts(register: Any) -> list[Any]:
    """The numbers in a register of a fragmented array."""
    return [vector.extract(register, [], [i]) for i in range(ir.VectorType(register.type).shape[0])]


def _elements(rows: Any) -> list[Any]:
    """A thread's numbers of an array in the layout ROWS: two."""
    return [x for register in rows.registers.flat for x in _parts(register)]


def _words(array: Any) -> list[Any]:
    """A thread's numbers of an array, 32 bits at a time, as integers."""
    register = ir.VectorType(array.registers.flat[0].type)
    words = register.shape[0] * mgpu_utils.bitwidth(register.element_type) // 32
    as_words = ir.VectorType.get((words,), ir.IntegerType.get_signless(32))
    return [word for register in array.registers.flat for word in _parts(vector.bitcast(as_words, register))]


def _with_elements(like: Any, elements: list[Any]) -> Any:
    """`like` with other numbers, one for each register."""
    registers = np.empty_like(like.registers)
    registers.flat = [vector.broadcast(like.registers.flat[0].type, x) for x in elements]
    return mgpu.FragmentedArray(_registers=registers, _layout=like.layout, _is_signed=None)


def _if_any(condition: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """What `then` gives in the warps in which `condition` holds in any thread, in the others what `otherwise` gives."""
    i32 = ir.IntegerType.get_signless(32)
    asm = "{ .reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.any.pred p, p, 0xffffffff; selp.b32 $0, 1, 0, p; }"
    anywhere = llvm.inline_asm(i32, [arith.extui(i32, condition)], asm, "=r,r", has_side_effects=True)
    anywhere = arith.cmpi(arith.CmpIPredicate.ne, anywhere, arith.constant(i32, 0))
    # The types of the results are those of the second branch, which computes nothing.
    arrays, treedef = jax.tree.flatten(otherwise(), is_leaf=lambda x: isinstance(x, mgpu.FragmentedArray))
    result = scf.IfOp(anywhere, [r.type for x in arrays for r in x.registers.flat], has_else=True)
    for block, branch in ((result.then_block, then), (result.else_block, otherwise)):
        assert block is not None
        with ir.InsertionPoint(block):
            leaves = jax.tree.leaves(branch(), is_leaf=lambda x: isinstance(x, mgpu.FragmentedArray))
            scf.yield_([r for x in leaves for r in x.registers.flat])
    values, out = iter(result.results), []
    for x in arrays:
        registers = np.empty_like(x.registers)
        registers.flat = [next(values) for _ in range(registers.size)]
        out.append(mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None))
    return jax.tree.unflatten(treedef, out)
