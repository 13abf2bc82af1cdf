"""Block kernel on cuDNN's flash attention, through jax's own wrappers: full blocks and causal-diagonal ones.

cuDNN knows no positions: it can leave a block whole, or mask it by token index. So it serves blocks without a mask, and
a shard's causal attention to itself, where both sides have the same ascending positions. It takes and returns the
inputs' dtype; running results are merged in float32 outside of it, by one more pass over the output. It is here to
compare with, and to choose where a mesh has one shard, or the attention is not causal.

The names of jax that this needs are private; they are imported in `_wrappers` and nowhere else.
"""

import types
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from .contract import AttentionState, BlockMask, Gradients, unchanged_d_query

finished_d_query = unchanged_d_query

_OLDEST_COMPUTE_CAPABILITY = 80
_DTYPES = ("bfloat16", "float16")
# Written into a row of zeros, see `_stand_in_output`: far below the rounding of its dtype's results, and its inverse
# times a sum of products of ordinary size still fits the dtype.
_TINY = {"bfloat16": 2.0**-30, "float16": 2.0**-12}


def unsupported_reason(compute_capability: int | None, head_dim: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why cuDNN cannot serve such a device, head dim and dtype, with what it can; None if it can."""
    if compute_capability is None:
        return "it needs an NVIDIA GPU"
    if compute_capability < _OLDEST_COMPUTE_CAPABILITY:
        return f"it needs compute capability 8.0 (Ampere) or newer, and this GPU has {compute_capability / 10}"
    largest = 256 if compute_capability >= 90 else 128
    if head_dim > largest or head_dim % 8:
        return f"it takes head dims that are multiples of 8 up to {largest} on this GPU, and this one is {head_dim}"
    if jnp.dtype(dtype).name not in _DTYPES:
        return f"it takes {' and '.join(_DTYPES)}, and the inputs are {jnp.dtype(dtype).name}"
    return None


def forward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    state: AttentionState | None,
    mask: BlockMask,
    *,
    scale: float,
    is_last: bool = False,
) -> AttentionState:
    """Folds this block into `state`. See `contract.BlockKernel`.

    Raises NotImplementedError for masks other than the two it knows.
    """
    block_output, block_lse = _call_forward(query, key, value, _mask_name(mask), scale)
    if state is None:
        return AttentionState(block_output.astype(query.dtype if is_last else jnp.float32), block_lse)
    lse = jnp.logaddexp(state.lse, block_lse)
    # Every query of these blocks sees a key, so `lse` is finite.
    old, new = (jnp.exp(part - lse).swapaxes(1, 2)[..., None] for part in (state.lse, block_lse))
    output = state.output * old + block_output.astype(jnp.float32) * new
    return AttentionState(output.astype(query.dtype if is_last else jnp.float32), lse)


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    d_out: Float[Array, "B T N H"],
    lse: Float32[Array, "B N T"],
    delta: Float32[Array, "B N T"],
    dq: Float32[Array, "B T N H"],
    sums: None,
    mask: BlockMask,
    *,
    scale: float,
    is_only: bool = False,
) -> Gradients:
    """This block's gradients from the ring's final `lse`. See `contract.BlockKernel`; raises like `forward`."""
    assert sums is None
    d_out, output = _stand_in_output(d_out, delta)
    block_dq, dk, dv = _call_backward(query, key, value, lse, output, d_out, _mask_name(mask), scale)
    if not is_only:
        dk, dv = dk.astype(jnp.float32), dv.astype(jnp.float32)
    return Gradients(dq + block_dq.astype(jnp.float32), (dk, dv))


def _mask_name(mask: BlockMask) -> str:
    """Which of cuDNN's masks this is, judged while tracing: one program serves every device of the mesh."""
    if mask.q_segment_ids is not None:
        raise NotImplementedError("implementation 'cudnn' has no segment ids; 'triton' and 'xla' do")
    if not mask.is_causal:
        return "NO_MASK"
    if mask.q_positions is not mask.k_positions:
        raise NotImplementedError(
            "implementation 'cudnn' can mask a causal block only where queries and keys are the same tokens; "
            "blocks that other shards send have positions known only at run time. 'triton' and 'xla' mask by position"
        )
    return "CAUSAL"


def _stand_in_output(
    d_out: Float[Array, "B T N H"], delta: Float32[Array, "B N T"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N H"]]:
    """`d_out`, and an output whose products with it sum to `delta`.

    cuDNN wants the output only to compute `rowsum(d_out * output)`, which a ring knows already and which a cotangent of
    the logsumexp has changed. The smallest such output is the multiple `delta / |d_out|^2` of `d_out`. A row whose
    `d_out` is zero gets one tiny entry, so that it too has such a multiple.
    """
    exact = d_out.astype(jnp.float32)
    is_zero = jnp.all(exact == 0, axis=-1, keepdims=True)
    is_first = (jnp.arange(exact.shape[-1]) == 0)[None, None, None]
    exact = jnp.where(is_zero & is_first, _TINY[d_out.dtype.name], exact)
    # Divided by the largest entry first: squares of small numbers would vanish.
    largest = jnp.max(jnp.abs(exact), axis=-1, keepdims=True)
    unit = exact / largest
    factor = delta.swapaxes(1, 2)[..., None] / (largest * jnp.sum(unit * unit, axis=-1, keepdims=True))
    return exact.astype(d_out.dtype), (unit * factor).astype(d_out.dtype)


def _call_forward(query: Array, key: Array, value: Array, mask_name: str, scale: float) -> tuple[Array, Array]:
    """Output `[B, T, N, H]` in the inputs' dtype and float32 logsumexp `[B, N, T]` of one block."""
    options = _options(mask_name, scale)
    return _wrappers().forward.bind(query, key, value, *_absent(query, 7), **options, is_training=True)


def _call_backward(
    query: Array, key: Array, value: Array, lse: Array, output: Array, d_out: Array, mask_name: str, scale: float
) -> tuple[Array, Array, Array]:
    """Gradients of query, key and value, in their dtype."""
    options = _options(mask_name, scale)
    return _wrappers().backward.bind(query, key, value, *_absent(query, 7), lse, output, d_out, **options)


def _absent(query: Array, count: int) -> list[Array]:
    """What jax's wrappers take for no bias, sequence lengths, offsets and page tables."""
    return [jnp.zeros(0, query.dtype)] * count


def _options(mask_name: str, scale: float) -> dict[str, Any]:
    wrappers = _wrappers()
    return {
        "scale": scale,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),
        "mask_type": wrappers.masks[mask_name],
        "layout": wrappers.layouts["BTNH"].value,
        "sliding_window_length": None,
    }


def _wrappers() -> types.SimpleNamespace:
    try:
        from jax._src.cudnn.fused_attention_stablehlo import (
            AttentionLayout,
            MaskType,
            _dot_product_attention_bwd_p_wrapper,
            _dot_product_attention_fwd_p_wrapper,
        )
    except ImportError as error:
        raise NotImplementedError(
            f"implementation 'cudnn' needs private names of jax that jax {jax.__version__} does not have ({error}); "
            "it was written for jax 0.11.2. 'triton' and 'xla' do not need them"
        ) from error
    return types.SimpleNamespace(
        forward=_dot_product_attention_fwd_p_wrapper,
        backward=_dot_product_attention_bwd_p_wrapper,
        masks=MaskType,
        layouts=AttentionLayout,
    )
