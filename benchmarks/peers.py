"""Attention of other projects, measured beside ours: each peer is a name and how to build its forward and backward.

A peer gets `[B, T, N, H]` arrays of a `Case` and gives back functions to time; one that is not installed, or refuses
the case, raises, and becomes a row that says why.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from .cases import Case


class Passes(NamedTuple):
    """What to time: each call returns its results; `backward` is None where the peer has none for this case."""

    forward: Callable[[], Any]
    backward: Callable[[], Any] | None
    wait: Callable[[Any], Any] = jax.block_until_ready


def jax_cudnn(case: Case, query: Array, key: Array, value: Array, d_out: Array) -> Passes:
    """`jax.nn.dot_product_attention(implementation="cudnn")`."""
    attend = functools.partial(jax.nn.dot_product_attention, is_causal=case.is_causal, implementation="cudnn")
    return _differentiable(attend, query, key, value, d_out)


def jax_attention_mgpu(case: Case, query: Array, key: Array, value: Array, d_out: Array) -> Passes:
    """jax's own Mosaic GPU attention; it has no backward for causal masks."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    tuning = attention_mgpu.TuningConfig(
        block_q=64, block_kv=128, max_concurrent_steps=2, use_schedule_barrier=True, causal=case.is_causal
    )
    query, key, value = (x.astype(jnp.float16) for x in (query, key, value))
    forward = jax.jit(functools.partial(attention_mgpu.attention, config=tuning))
    return Passes(lambda: forward(query * case.head_dim**-0.5, key, value), None)


def pallas_triton(case: Case, query: Array, key: Array, value: Array, d_out: Array) -> Passes:
    """jax's Pallas Triton attention, deprecated in jax 0.11; it has no grouped heads."""
    from jax.experimental.pallas.ops.gpu import attention

    if case.num_kv_heads != case.num_heads:
        raise NotImplementedError("grouped heads are not supported by jax.experimental.pallas.ops.gpu.attention")
    attend = functools.partial(attention.mha, segment_ids=None, sm_scale=case.head_dim**-0.5, causal=case.is_causal)
    return _differentiable(attend, query, key, value, d_out)


def ringattention(case: Case, query: Array, key: Array, value: Array, d_out: Array) -> Passes:
    """The PyPI package `ringattention`, as a ring of one; on GPUs it has no kernel, only this blockwise jnp code.

    Its last release, 0.1.2, imports `jax.lib.xla_bridge`, which jax 0.11 has not got: the row says so.
    """
    ring: Any = importlib.import_module("ringattention")
    if case.num_kv_heads != case.num_heads:
        raise NotImplementedError("grouped heads are not supported by ringattention")
    blockwise = dict(
        causal_block_size=1 if case.is_causal else None,
        query_chunk_size=min(case.seq_len, 1024),
        key_chunk_size=min(case.seq_len, 1024),
        deterministic=True,
        dropout_rng=None,
        attn_pdrop=0.0,
        dtype=jnp.float32,
        policy=jax.checkpoint_policies.nothing_saveable,
        precision=None,
        prevent_cse=True,
    )

    def shard(query: Array, key: Array, value: Array) -> Array:
        # No bias, segment ids or cache; logits in float32.
        return ring.ringattention_jax(query, key, value, None, None, None, "seq", True, blockwise)

    mesh = jax.make_mesh((1,), ("seq",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    spec = PartitionSpec(None, "seq")
    attend = jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return _differentiable(attend, query, key, value, d_out)


def kvax(case: Case, query: Array, key: Array, value: Array, d_out: Array) -> Passes:
    """kvax's Triton attention on one device; its mask is causal only.

    Its last release, 0.1.0, takes names from `jax.experimental.shard_map` that jax 0.11 has not got: the row says so.
    """
    ops: Any = importlib.import_module("kvax.ops")
    utils: Any = importlib.import_module("kvax.utils")
    if not case.is_causal:
        raise NotImplementedError("attention that is not causal is not supported by kvax")
    positions = jnp.broadcast_to(jnp.arange(case.seq_len, dtype=jnp.int32), (case.batch, case.seq_len))
    tokens = (positions, jnp.zeros_like(positions)) * 2  # positions and segment ids, of queries and of keys
    mesh = jax.make_mesh((1, 1), ("data", "context"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])
    specs = ("data", "context", None, None), ("data", None, None, None)
    with utils.attention_specs(*specs):
        mask = ops.create_attention_mask(*tokens, calc_bwd_mask=True, mesh=mesh)

    def attend(query: Array, key: Array, value: Array) -> Array:
        with utils.attention_specs(*specs):
            return ops.flash_attention(
                *(query, key, value, *tokens),
                mask=mask,
                scale=case.head_dim**-0.5,
                assume_sequential_positions=True,
                mesh=mesh,
            )

    return _differentiable(attend, query, key, value, d_out)


def tokamax_mosaic(case: Case, query: Array, key: Array, value: Array, d_out: Array) -> Passes:
    """tokamax's Mosaic GPU kernel, by name: left to choose, it may end at XLA's quadratic attention."""
    tokamax: Any = importlib.import_module("tokamax")
    attend = functools.partial(tokamax.dot_product_attention, is_causal=case.is_causal, implementation="mosaic")
    return _differentiable(attend, query, key, value, d_out)


def torch_cudnn(case: Case, query: Array, key: Array, value: Array, d_out: Array) -> Passes:
    """PyTorch's scaled_dot_product_attention, cuDNN backend."""
    return _torch(case, (query, key, value, d_out), "CUDNN_ATTENTION")


def torch_flash(case: Case, query: Array, key: Array, value: Array, d_out: Array) -> Passes:
    """PyTorch's scaled_dot_product_attention, FlashAttention-2 backend."""
    return _torch(case, (query, key, value, d_out), "FLASH_ATTENTION")


PEERS = {
    "jax cuDNN": jax_cudnn,
    "jax attention_mgpu (float16)": jax_attention_mgpu,
    "jax Pallas Triton": pallas_triton,
    "tokamax mosaic": tokamax_mosaic,
    "kvax": kvax,
    "ringattention": ringattention,
    "torch cuDNN": torch_cudnn,
    "torch FlashAttention-2": torch_flash,
}


def _differentiable(attend: Callable[..., Array], query: Array, key: Array, value: Array, d_out: Array) -> Passes:
    forward = jax.jit(attend)
    _, vjp = jax.jit(lambda *args: jax.vjp(attend, *args))(query, key, value)
    backward = jax.jit(lambda vjp, d_out: vjp(d_out))
    return Passes(lambda: forward(query, key, value), lambda: backward(vjp, d_out))


def _torch(case: Case, arrays: tuple[Array, ...], backend: str) -> Passes:
    torch: Any = importlib.import_module("torch")
    attention: Any = importlib.import_module("torch.nn.attention")

    query, key, value, d_out = (torch.from_dlpack(x).transpose(1, 2) for x in arrays)
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in (query, key, value)]

    def forward() -> Any:
        with attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(
                *leaves, is_causal=case.is_causal, enable_gqa=case.num_heads != case.num_kv_heads
            )

    output = forward()
    return Passes(
        lambda: forward().detach(),
        lambda: torch.autograd.grad(output, leaves, d_out, retain_graph=True),
        lambda _: torch.cuda.synchronize(),
    )
