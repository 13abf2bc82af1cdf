"""Block kernels in Triton, through jax-triton: NVIDIA GPUs from Ampere on.

Triton and jax-triton are imported when a kernel is first built, so the project imports without them. A kernel is
compiled for one compute capability while the program is lowered, before XLA knows the device, so that number has to
come from the caller's side: `target(...)` says it, and without it the GPU of this process decides.
"""

import contextlib
import contextvars
import dataclasses
import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32

from .contract import AttentionState, BlockMask, Gradients
from .tiles import TileRanges, key_ranges, query_ranges
from .triton_tiles import MAX_PADDED_HEAD_DIM, Tile, choose_tiles, padded_head_dim

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
    state: AttentionState,
    mask: BlockMask,
    *,
    scale: float,
) -> AttentionState:
    """Continues the online softmax of `state` over this block, in place. See `contract.BlockKernel`.

    Raises NotImplementedError for devices, head dims, dtypes or scales that these kernels cannot serve.
    """
    from . import triton_kernels

    tile = _tiles(query, scale).forward
    ranges = key_ranges(mask, tile.q, tile.k)

    def run(refs: tuple[jax.Ref, jax.Ref]) -> None:
        launch = _Launch.of(query, key, mask, ranges, scale, tile, num_tiles=_cdiv(query.shape[1], tile.q))
        launch(triton_kernels.forward_kernel, (query, key, value), refs, num_heads=query.shape[2])

    return AttentionState(*pl.run_state(run)(tuple(state)))


def backward(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    d_out: Float[Array, "B T N H"],
    lse: Float32[Array, "B N T"],
    delta: Float32[Array, "B N T"],
    dq: Float32[Array, "B T N H"],
    mask: BlockMask,
    *,
    scale: float,
) -> Gradients:
    """This block's gradients; its share of `dq` is added in place. See `contract.BlockKernel`.

    Two kernels, one per query tile and one per key tile, without atomics: two runs give identical bits. Raises
    NotImplementedError like `forward`.
    """
    from . import triton_kernels

    tiles = _tiles(query, scale)
    inputs = (query, key, value, d_out, lse, delta)
    # dK and dV come first: the ring sends them on while dQ is still being computed.
    dkv = _Launch.of(
        query, key, mask, query_ranges(mask, tiles.dkv.q, tiles.dkv.k), scale, tiles.dkv,
        num_tiles=_cdiv(key.shape[1], tiles.dkv.k),
    )  # fmt: skip
    out_type = jax.ShapeDtypeStruct(key.shape, jnp.float32)
    dk, dv = dkv(triton_kernels.dkv_kernel, inputs, (), num_heads=key.shape[2], out_type=(out_type, out_type))

    def run(refs: tuple[jax.Ref]) -> None:
        launch = _Launch.of(
            query, key, mask, key_ranges(mask, tiles.dq.q, tiles.dq.k), scale, tiles.dq,
            num_tiles=_cdiv(query.shape[1], tiles.dq.q),
        )  # fmt: skip
        launch(triton_kernels.dq_kernel, inputs, refs, num_heads=query.shape[2])

    (dq,) = pl.run_state(run)((dq,))
    return Gradients(dq, dk, dv)


@dataclasses.dataclass(frozen=True)
class _Launch:
    """What every kernel of a block is launched with, besides its arrays."""

    mask_arrays: tuple[Array | None, ...]
    scalars: dict[str, int | float]
    constants: dict[str, int | bool | str]
    num_tiles: int
    batch: int
    tile: Tile
    use_tma: bool

    @classmethod
    def of(
        cls, query: Array, key: Array, mask: BlockMask, ranges: TileRanges, scale: float, tile: Tile, num_tiles: int
    ) -> "_Launch":
        batch, num_queries, num_heads, head_dim = query.shape
        use_tma = _use_tma(_target_capability(), head_dim, query.dtype.itemsize)
        tokens = (mask.q_positions, mask.k_positions, mask.q_segment_ids, mask.k_segment_ids)
        scalars = dict(
            num_queries=num_queries,
            num_keys=key.shape[1],
            # One row of tile ranges serves the whole batch where no segment ids tell its entries apart.
            range_stride=num_tiles if ranges.start.shape[0] > 1 else 0,
            scale=float(scale),
        )
        constants = dict(
            NUM_HEADS=num_heads,
            NUM_KV_HEADS=key.shape[2],
            HEAD_DIM=head_dim,
            PADDED_DIM=padded_head_dim(head_dim),
            Q_TILE=tile.q,
            K_TILE=tile.k,
            IS_CAUSAL=mask.is_causal,
            HAS_SEGMENTS=mask.q_segment_ids is not None,
            PRECISION="ieee",
            USE_TMA=use_tma,
        )
        return cls((*tokens, *ranges), scalars, constants, num_tiles, batch, tile, use_tma)

    def __call__(
        self, kernel: Any, inputs: tuple[Array, ...], refs: tuple[jax.Ref, ...], *, num_heads: int, out_type: Any = ()
    ) -> Any:
        import jax_triton

        query, key, value, *rest = inputs
        tiled = [(query, self.tile.q), (key, self.tile.k), (value, self.tile.k)]
        if rest:
            d_out, *rest = rest
            tiled.append((d_out, self.tile.q))
        if self.use_tma:
            sources = [_descriptor(array, rows) for array, rows in tiled]
        else:
            sources = [array for array, _ in tiled]
        return jax_triton.triton_call(
            *sources,
            *rest,
            *self.mask_arrays,
            *refs,
            kernel=kernel,
            out_type=out_type,
            grid=(self.num_tiles, num_heads, self.batch),
            num_warps=self.tile.num_warps,
            num_stages=self.tile.num_stages,
            compute_capability=_target_capability(),
            backend_options=dict(ptx_version=_PTX_VERSION, enable_fp_fusion=True),
            **self.scalars,
            **self.constants,
        )


def _tiles(query: Array, scale: float) -> Any:
    capability = _target_capability()
    reason = unsupported_reason(capability, query.shape[3], query.dtype)
    if reason is None and not (scale >= 0 and math.isfinite(scale)):
        reason = f"it needs a finite scale of at least 0, got {scale}"
    if reason is not None:
        raise NotImplementedError(f"implementation 'triton' cannot run this: {reason}; 'xla' runs everywhere")
    return choose_tiles(capability, query.dtype.itemsize, query.shape[3])


def _use_tma(capability: int, head_dim: int, itemsize: int) -> bool:
    """Whether Hopper's copy engine loads the tiles: it wants rows of whole 16-byte units.

    Products in true float32 read their operands through registers and gain nothing from it.
    """
    return capability >= 90 and itemsize == 2 and head_dim * itemsize % 16 == 0


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


def _target_capability() -> int:
    capability = _target.get()
    return compute_capability(jax.devices()[0]) if capability is None else capability


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
