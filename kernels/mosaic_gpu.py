"""Attention blocks on Hopper GPUs: Pallas Mosaic GPU kernels behind the block kernel contract.

Arrays are read and written where they lie, strided [B, T, N, H]; the running state and dQ are updated in place. Lengths
that are no multiple of 8 and head dims that the kernels' tiles do not divide are padded here, at the boundary: the copy
engine takes rows eight at a time. A ring whose shards are multiples of 128 tokens with head dim 64, 128 or 256 pays for
no padding. Of other multiples of 8 only dQ is padded: it is put in order and added after every block.

The kernels run in the Mosaic interpreter on a CPU (`plgpu.force_gpu_interpret_mode`). What it cannot do is listed in
`mosaic_gpu_primitives`.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from .contract import AttentionState, BlockMask, Blocks, Gradients, Sums
from .mosaic_gpu_backward import differentiate, in_order
from .mosaic_gpu_choices import default_backward_config, default_forward_config
from .mosaic_gpu_choices import prefers_several_blocks as prefers_several_blocks
from .mosaic_gpu_forward import attend
from .mosaic_gpu_two_pass import differentiate_keys, differentiate_queries
from .varying import match_varying

DTYPES = (jnp.bfloat16, jnp.float16)
MAX_HEAD_DIM = 256
MAX_FUSED_HEAD_DIM = 128
_ROW_MULTIPLE = 8

type _Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def unsupported_reason(compute_capability: int | None, head_dim: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why these kernels cannot serve such a device (90: Hopper), head dim and dtype, and the cure; None if they can."""
    if compute_capability is None:
        return "it needs an NVIDIA GPU"
    if compute_capability != 90:
        return (
            "it is written for Hopper (compute capability 9.0), and this GPU has "
            f"{compute_capability / 10}; 'triton' runs on Ampere and newer"
        )
    if jnp.dtype(dtype) not in [jnp.dtype(d) for d in DTYPES]:
        names = " and ".join(jnp.dtype(d).name for d in DTYPES)
        return f"it multiplies {names}, and the inputs are {jnp.dtype(dtype).name}, which 'triton' and 'xla' take"
    if head_dim > MAX_HEAD_DIM:
        return f"it supports head dims up to {MAX_HEAD_DIM}, and this one is {head_dim}, which 'xla' takes"
    return None


def forward(
    query: Float[Array, "B T N H"],
    key: Blocks,
    value: Blocks,
    state: AttentionState | None,
    mask: BlockMask,
    *,
    scale: float,
    is_last: bool = False,
) -> AttentionState:
    """Continues the online softmax of `state` over this block, in place. See `contract.BlockKernel`.

    Two runs give identical bits. Raises NotImplementedError for head dims, dtypes or scales that these kernels cannot
    serve.
    """
    _refuse(query, scale)
    num_queries, head_dim = query.shape[1], query.shape[3]
    columns = _round_up(head_dim, 32)
    query = _pad(query, columns)
    keys, values = (tuple(_pad(x, columns) for x in _as_tuple(blocks)) for blocks in (key, value))
    padded = None if state is None else AttentionState(_pad(state.output, columns), state.lse)
    config = default_forward_config(columns, has_segments=mask.q_segment_ids is not None)
    result = attend(query, keys, values, padded, mask, scale=scale, is_last=is_last, config=config)
    return AttentionState(result.output[:, :num_queries, :, :head_dim], result.lse)


def backward(
    query: Float[Array, "B T N H"],
    key: Blocks,
    value: Blocks,
    d_out: Float[Array, "B T N H"],
    lse: Float32[Array, "B N T"],
    delta: Float32[Array, "B N T"],
    dq: Float32[Array, "B T N H"],
    sums: Sums | None,
    mask: BlockMask,
    *,
    scale: float,
    is_only: bool = False,
) -> Gradients:
    """This block's gradients; its shares are added in place. See `contract.BlockKernel`.

    Up to head dim 128 one kernel computes all three. In it the copy engine adds the shares of `dq` in no fixed order:
    its last bits may differ between two runs. Raises NotImplementedError like `forward`.
    """
    if query.shape[3] > MAX_FUSED_HEAD_DIM:
        assert sums is None
        assert not isinstance(key, tuple)
        assert not isinstance(value, tuple)
        return deterministic_backward(
            query, key, value, d_out, lse, delta, dq, None, mask, scale=scale, is_only=is_only
        )
    _refuse(query, scale)
    columns = 64 if query.shape[3] <= 64 else 128
    config = default_backward_config(columns)
    # The kernel's own order of numbers would not survive that padding is cut off: there it begins anew.
    has_own_order = _has_own_order(dq.shape)
    batch, num_queries, heads, head_dim = dq.shape
    own_shape = batch, _round_up(num_queries, config.q_tile), heads, columns
    own = dq if has_own_order else match_varying(jnp.zeros(own_shape, dq.dtype), like=dq)
    if isinstance(key, tuple):
        assert isinstance(value, tuple)
        assert isinstance(sums, tuple)
        assert head_dim == columns
        given = query, key, value, d_out, lse, delta, own, sums, mask
        own, new_sums = differentiate(*given, scale=scale, is_only=is_only, config=config)
    else:
        assert not isinstance(sums, tuple)
        inputs = _pad_inputs(query, key, value, d_out, lse, delta, columns=columns)
        padded = () if sums is None else (jax.vmap(functools.partial(_pad, columns=columns), 1, 1)(sums),)
        given = inputs[0], inputs[1:2], inputs[2:3], *inputs[3:], own, padded, mask
        own, found = differentiate(*given, scale=scale, is_only=is_only, config=config)
        new_sums = jax.tree.map(lambda x: _crop(x, key), found if sums is None else found[0])
    return Gradients(own if has_own_order else dq + _crop(in_order(own, scale), dq), new_sums)


def finished_d_query(dq: Float32[Array, "B T N H"], *, scale: float) -> Float32[Array, "B T N H"]:
    """What `backward` has added up, in order and scaled. See `contract.BlockKernel`."""
    return in_order(dq, scale) if _has_own_order(dq.shape) else dq


def _has_own_order(shape: tuple[int, ...]) -> bool:
    """Whether `backward` leaves `dq` as its kernel does between blocks: the fused one, with nothing padded."""
    _, num_queries, _, head_dim = shape
    return head_dim in (64, MAX_FUSED_HEAD_DIM) and num_queries % default_backward_config(head_dim).q_tile == 0


def deterministic_backward(
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
    """Like `backward`, adding in a fixed order: two runs give identical bits. Two kernels, eight products, not five."""
    _refuse(query, scale)
    assert sums is None
    columns = _round_up(query.shape[3], 32)
    inputs = _pad_inputs(query, key, value, d_out, lse, delta, columns=columns)
    dk, dv = differentiate_keys(*inputs, mask, scale=scale)
    if is_only:
        dk, dv = dk.astype(key.dtype), dv.astype(key.dtype)
    dq = differentiate_queries(*inputs, _pad(dq, columns), mask, scale=scale)
    return Gradients(_crop(dq, query), (_crop(dk, key), _crop(dv, key)))


def _refuse(query: Float[Array, "B T N H"], scale: float) -> None:
    reason = unsupported_reason(90, query.shape[3], query.dtype)
    if reason is None and not (scale > 0 and math.isfinite(scale)):
        reason = f"it needs a finite scale above 0, got {scale}, which 'xla' takes"
    if reason is not None:
        raise NotImplementedError(f"implementation 'mosaic_gpu' cannot run this: {reason}")


def _as_tuple(blocks: Blocks) -> tuple[jax.Array, ...]:
    return blocks if isinstance(blocks, tuple) else (blocks,)


def _pad_inputs(query, key, value, d_out, lse, delta, *, columns: int) -> _Inputs:
    """What a backward kernel reads but for the mask, rows and columns padded."""
    rows = -query.shape[1] % _ROW_MULTIPLE
    if rows:
        lse, delta = (jnp.pad(x, ((0, 0), (0, 0), (0, rows))) for x in (lse, delta))
    query, key, value, d_out = (_pad(x, columns) for x in (query, key, value, d_out))
    return query, key, value, d_out, lse, delta


def _crop(x: Float[Array, "*B L N H"], like: Float[Array, "B T N columns"]) -> Float[Array, "*B T N columns"]:
    return x[..., : like.shape[1], :, : like.shape[3]]


def _pad(x: Float[Array, "B T N H"], columns: int) -> Float[Array, "B T8 N columns"]:
    rows = -x.shape[1] % _ROW_MULTIPLE
    if rows == 0 and x.shape[3] == columns:
        return x
    return jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, columns - x.shape[3])))


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
