"""Rotary position embedding from explicit positions (RoFormer, arXiv:2104.09864, equation 34)."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, UInt32


def apply_rope(
    x: Float[Array, "B T N H"], positions: Int32[Array, "*B T"], *, theta: float = 10_000.0
) -> Float[Array, "B T N H"]:
    """Rotates features `i` and `i + H/2` of every head by `positions * theta ** (-2i / H)` radians.

    This pairing of features is that of Llama checkpoints on Hugging Face and of `nnx.RoPE`. Attention depends on the
    difference of two tokens' positions only, at any distance from the start: see `_turns_per_token`.

    Args:
        x: queries or keys, any float dtype; rotated in float32.
        positions: global positions of the tokens, `[T]` or `[B, T]`, not the index within a shard.
        theta: base of the geometric sequence of frequencies.

    Returns:
        The rotated array in the dtype of `x`.

    Raises:
        ValueError: an odd head dim, or positions that do not match the tokens.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"RoPE rotates pairs of features: head dim {x.shape[-1]} is odd; use an even one, or no RoPE")
    if positions.shape not in (x.shape[1:2], x.shape[:2]):
        raise ValueError(f"positions of shape {positions.shape} do not match tokens {x.shape[:2]}: give [T] or [B, T]")
    positions = positions.astype(jnp.uint32).reshape(-1, x.shape[1], 1, 1)
    phase = positions * _turns_per_token(x.shape[-1], theta).reshape(1, 1, 1, -1)
    angle = lax.bitcast_convert_type(phase, jnp.int32).astype(jnp.float32) * np.float32(2 * math.pi / 2**32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _turns_per_token(head_dim: int, theta: float) -> UInt32[np.ndarray, " half"]:
    """Each frequency in turns per token, times 2^32.

    Multiplied by a position in wrapping uint32 arithmetic this is the phase, reduced to one turn without rounding. In
    float32, `position * frequency` is off by 0.03 radians at one million tokens; here the whole error is that of the
    frequency itself, 2^-33 turns per token (8e-4 radians at one million), and differences of positions are exact.
    """
    frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    return np.round(frequencies / (2 * math.pi) * 2**32).astype(np.uint32)
