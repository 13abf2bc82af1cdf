"""In which precision layers multiply: float32 means float32, never TF32; smaller dtypes accumulate in float32."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32


def matmul_precision(dtype: DTypeLike) -> lax.Precision | None:
    """The `precision` argument for products of arrays of this dtype."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None


def matmul(equation: str, x: Float[Array, "..."], y: Float[Array, "..."]) -> Float32[Array, "..."]:
    """`jnp.einsum` of two arrays of one dtype, with a float32 result."""
    return jnp.einsum(equation, x, y, precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32)
