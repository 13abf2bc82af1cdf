"""Block kernels in Triton, through jax-triton: NVIDIA GPUs from Ampere on.

Triton and jax-triton are imported when a kernel is first built, so the project imports without them. A kernel is
compiled for one compute capability while the program is lowered, before XLA knows the device, so that number has to
come from the caller's side: `target(...)` says it, and without it the GPU of this process decides.
"""

import contextlib
import contextvars
import dataclasses
import functools
import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32

from .contract import AttentionState, BlockMask, Gradients, unchanged_d_query
from .tiles import TileRanges, key_ranges, query_ranges
from .triton_tiles import MAX_PADDED_HEAD_DIM, Tile, Tiles, choose_tiles, padded_head_dim, use_copy_engine

finished_d_query = unchanged_d_query

OLDEST_COMPUTE_CAPABILITY = 80
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
# PTX 8.7 came with CUDA 12.8: any ptxas that jax 0.11 can use accepts it, also one older than Triton's own.
_PTX_VERSION = 87

_target: contextvars.ContextVar[int | None] = contextvars.ContextVar("ring_jax_triton_target", default=None)


def compute_capability(device: Any) -> int | None:
    """Compute capability of a jax device (compile-only devices included) as major * 10 + minor; None if not NVIDIA."""
    text = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or not isinstance(text, str):
        return None
    major, _, minor = text.partition(".")
    return int(major) * 10 + int(minor) if major.isdecimal() and minor.isdecimal() else None


@contextlib.contextmanager
def target(compute_capability: int) -> Iterator[None]:
    """Kernels traced inside this context are built for `compute_capability` (80 for an A100, 90 for an H100).

    Needed wherever the GPU meant is not one of this process: compile-only topologies, `jax.export`, other hosts' GPUs.
    """
    token = _target.set(compute_capability)
    try:
        yield
    finally:
        _target.reset(token)


def unsupported_reason(compute_capability: int | None, head_dim: int, dtype: jax.typing.DTypeLike) -> str | None:
    """Why these kernels cannot serve such a device, head dim and dtype, with the cure; None if they can."""
    if compute_capability is None:
        return "it needs an NVIDIA GPU"
    if compute_capability < OLDEST_COMPUTE_CAPABILITY:
        return (
            f"it needs compute capability {OLDEST_COMPUTE_CAPABILITY / 10} (Ampere) or newer, and this GPU has "
            f"{compute_capability / 10}"
        )
    missing = [name for name in ("jax_triton", "triton") if importlib.util.find_spec(name) is None]
    if missing:
        return f"the package {missing[0].replace('_', '-')} is not installed; `pip install 'jax-triton>=0.4'` brings it"
    if padded_head_dim(head_dim) > MAX_PADDED_HEAD_DIM:
        return f"it supports head dims up to {MAX_PADDED_HEAD_DIM}, and this one is {head_dim}"
    if jnp.dtype(dtype) not in [jnp.dtype(d) for d in DTYPES]:
        names = ", ".join(jnp.dtype(d).name for d in DTYPES)
        return f"it supports {names}, and the inputs are {jnp.dtype(dtype).name}"
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
    """Continues the online softmax of `state` over this block, in place. See `contract.BlockKernel`.

    Raises NotImplementedError for devices, head dims, dtypes or scales that these kernels cannot serve.
    """
    from . import triton_kernels

    block = _Block.of(query, key, value, mask, scale)
    tile = block.tiles.forward
    ranges = key_ranges(mask, tile.q, tile.k)
    launch = functools.partial(block.launch, triton_kernels.forward_kernel, tile, ranges, query.shape[2])

    def run(refs: tuple[jax.Ref, jax.Ref]) -> None:
        launch(state=(None, None), refs=refs, HAS_STATE=True, IN_PLACE=True)

    if state is not None and not is_last:
        return AttentionState(*pl.run_state(run)(tuple(state)))
    batch, num_queries, num_heads, _ = query.shape
    new = (
        jax.ShapeDtypeStruct(query.shape, query.dtype if is_last else jnp.float32),
        jax.ShapeDtypeStruct((batch, num_heads, num_queries), jnp.float32),
    )
    given = (None, None) if state is None else tuple(state)
    return AttentionState(*launch(state=given, out_type=new, HAS_STATE=state is not None, IN_PLACE=False))


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
    """This block's gradients; its share of `dq` is added in place. See `contract.BlockKernel`.

    Two kernels, one per query tile and one per key tile, without atomics: two runs give identical bits. Raises
    NotImplementedError like `forward`.
    """
    from . import triton_kernels

    assert sums is None
    block = _Block.of(query, key, value, mask, scale)
    rows = (d_out, lse, delta)
    # dK and dV come first: the ring sends them on while dQ is still being computed.
    tile = block.tiles.dkv
    new = jax.ShapeDtypeStruct(key.shape, key.dtype if is_only else jnp.float32)
    ranges = query_ranges(mask, tile.q, tile.k)
    dk, dv = block.launch(triton_kernels.dkv_kernel, tile, ranges, key.shape[2], rows, out_type=(new, new))

    def run(refs: tuple[jax.Ref]) -> None:
        tile = block.tiles.dq
        ranges = key_ranges(mask, tile.q, tile.k)
        block.launch(triton_kernels.dq_kernel, tile, ranges, query.shape[2], rows, refs=refs)

    (dq,) = pl.run_state(run)((dq,))
    return Gradients(dq, (dk, dv))


@dataclasses.dataclass(frozen=True)
class _Block:
    """What all kernels of a block are launched on, and for which GPU."""

    query: Float[Array, "B T N H"]
    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    mask: BlockMask
    scale: float
    compute_capability: int

    @classmethod
    def of(cls, query: Array, key: Array, value: Array, mask: BlockMask, scale: float) -> "_Block":
        capability = _target.get()
        if capability is None:
            capability = compute_capability(jax.devices()[0])
        reason = unsupported_reason(capability, query.shape[3], query.dtype)
        if reason is None and not (scale >= 0 and math.isfinite(scale)):
            reason = f"it needs a finite scale of at least 0, got {scale}"
        if reason is not None:
            raise NotImplementedError(f"implementation 'triton' cannot run this: {reason}; 'xla' runs everywhere")
        assert capability is not None
        return cls(query, key, value, mask, scale, capability)

    @property
    def tiles(self) -> Tiles:
        return choose_tiles(self.compute_capability, self.query.dtype.itemsize, self.query.shape[3])

    def launch(
        self,
        kernel: Any,
        tile: Tile,
        ranges: TileRanges,
        num_heads: int,
        rows: tuple[Array, ...] = (),
        *,
        state: tuple[Any, ...] = (),
        refs: tuple[jax.Ref, ...] = (),
        out_type: Any = (),
        **flags: bool,
    ) -> Any:
        """Runs one program per tile of `ranges`, head and batch entry.

        `rows` are the query-side inputs of a backward kernel: d_out, lse, delta; `state` is what a forward kernel
        continues, if not `refs`. The kernel updates `refs` in place and returns new arrays of `out_type`.
        """
        import jax_triton

        mask, (batch, num_queries, _, head_dim) = self.mask, self.query.shape
        sources = [(self.query, tile.q), (self.key, tile.k), (self.value, tile.k), *((x, tile.q) for x in rows[:1])]
        use_tma = use_copy_engine(self.compute_capability, self.query.dtype.itemsize, head_dim)
        num_tiles = ranges.start.shape[1]
        arguments: dict[str, Any] = dict(
            num_queries=num_queries,
            num_keys=self.key.shape[1],
            # One row of tile ranges serves the whole batch where no segment ids tell its entries apart.
            range_stride=num_tiles if ranges.start.shape[0] > 1 else 0,
            scale=float(self.scale),
            NUM_HEADS=self.query.shape[2],
            NUM_KV_HEADS=self.key.shape[2],
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_head_dim(head_dim),
            Q_TILE=tile.q,
            K_TILE=tile.k,
            IS_CAUSAL=mask.is_causal,
            HAS_SEGMENTS=mask.q_segment_ids is not None,
            PRECISION="ieee",
            USE_TMA=use_tma,
            **flags,
        )
        tokens: list[Any] = [mask.q_positions, mask.k_positions, mask.q_segment_ids, mask.k_segment_ids]
        return jax_triton.triton_call(
            *(_descriptor(array, count) if use_tma else array for array, count in sources),
            *rows[1:],
            *tokens,
            *ranges,
            *state,
            *refs,
            kernel=kernel,
            out_type=out_type,
            grid=(num_tiles, num_heads, batch),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            compute_capability=self.compute_capability,
            backend_options=dict(ptx_version=_PTX_VERSION, enable_fp_fusion=True),
            **arguments,
        )


def _descriptor(array: Array, rows: int) -> Any:
    """What the copy engine needs to load `rows` tokens of one head: the array seen as `[B, heads, tokens, H]`."""
    import jax_triton

    batch, tokens, heads, head_dim = array.shape
    return jax_triton.TensorDescriptor(
        array,
        shape=(batch, heads, tokens, head_dim),
        strides=(tokens * heads * head_dim, head_dim, heads * head_dim, 1),
        block_shape=(1, 1, rows, padded_head_dim(head_dim)),
    )
