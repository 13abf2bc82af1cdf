"""Runs the Triton block kernels on a CPU, in a process of its own, through Triton's interpreter.

Triton decides when it is imported whether it interprets, so the tests that compile kernels and those that interpret
them cannot share a process. `start()` returns a pool of one process in which `jax_triton.triton_call` hands the kernel
to the interpreter; everything above that call, tile ranges and carried state included, is the project's own code.
"""

import functools
import math
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np

from tests import block_cases


def start() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_interpret_triton)


def run(case: block_cases.Case, capability: int, data: dict[str, Any]) -> dict[str, np.ndarray]:
    """All results of a case on its arrays, with the kernels built for `capability`; to be submitted to the pool."""
    import jax

    from ring_jax.kernels import triton_gpu

    block = functools.partial(block_cases.blocks(case), triton_gpu)
    with triton_gpu.target(capability):
        return jax.tree.map(np.asarray, jax.jit(block)(data))


def late_block_errors(capability: int) -> tuple[float, float]:
    """`block_cases.late_block_error` and `late_block_gradient_error` of the kernels built for `capability`."""
    from ring_jax.kernels import triton_gpu

    with triton_gpu.target(capability):
        forward = block_cases.late_block_error(triton_gpu.forward)
        return forward, block_cases.late_block_gradient_error(triton_gpu.backward)


def _interpret_triton() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import jax_triton

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax_triton.triton_call = _interpreted_call


def _interpreted_call(*args: Any, kernel: Any, out_type: Any, grid: Any, **kwargs: Any) -> Any:
    """Stands in for `jax_triton.triton_call`: refs are read and written, outputs start as NaN."""
    import jax

    options = ("num_warps", "num_stages", "compute_capability", "backend_options")
    keywords = {name: value for name, value in kwargs.items() if name not in options}
    refs = [a for a in args if isinstance(a, jax.Ref)]
    plain = [a for a in args if not any(a is r for r in refs)]
    outputs, tree = jax.tree.flatten(out_type)
    results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (*refs, *outputs)]

    def run(plain_values: list[np.ndarray], ref_values: list[np.ndarray]) -> list[np.ndarray]:
        read = [_argument(value) for value in plain_values]
        written = [Tensor(np.array(value)) for value in ref_values]
        written += [Tensor(np.full(o.shape, np.nan, o.dtype)) for o in outputs]
        kernel[grid](*read, *written, **keywords)
        return [tensor.array for tensor in written]

    values = jax.pure_callback(run, results, plain, [ref[...] for ref in refs])
    for ref, value in zip(refs, values, strict=False):
        ref[...] = value
    return jax.tree.unflatten(tree, values[len(refs) :])


def _argument(value: Any) -> Any:
    import jax_triton
    from triton.tools.tensor_descriptor import TensorDescriptor

    if isinstance(value, jax_triton.TensorDescriptor):
        return TensorDescriptor(_argument(value.base), list(value.shape), list(value.strides), list(value.block_shape))
    return None if value is None else Tensor(np.array(value))


class Tensor:
    """The little of torch.Tensor that the interpreter asks for, over a numpy array."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = array.dtype
        self.shape = array.shape

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> "Tensor":
        return self

    def cpu(self) -> "Tensor":
        return self

    def copy_(self, other: "Tensor") -> None:
        assert other.array is self.array, "the interpreter works on our memory, there is nothing to copy back"

    def new_empty(self, size: int, device: str) -> "Tensor":
        return Tensor(np.empty(size, self.array.dtype))

    def set_(self, storage: "Tensor", offset: int, size: tuple[int, ...], stride: tuple[int, ...]) -> None:
        assert offset == 0
        assert math.prod(size) == storage.array.size
        self.array = storage.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)
