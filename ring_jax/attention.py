"""`ring_attention`: exact attention over a sequence that is sharded over devices. Checks, placement, `shard_map`."""

import dataclasses
import functools
from collections.abc import Hashable
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from . import kernels, ring
from .collectives import AxisName
from .layouts import check_layout

STRATEGIES = ("ring",)
DTYPES = ("float32", "bfloat16", "float16")


@overload
def ring_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    segment_ids: Int32[Array, "B T"] | None = ...,
    layout: str = ...,
    strategy: str = ...,
    mesh: Mesh | AbstractMesh | None = ...,
    seq_axis: AxisName = ...,
    batch_axis: AxisName | None = ...,
    head_axis: AxisName | None = ...,
    implementation: str | None = ...,
    return_lse: Literal[False] = ...,
) -> Float[Array, "B T N H"]: ...


@overload
def ring_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    is_causal: bool = ...,
    scale: float | None = ...,
    segment_ids: Int32[Array, "B T"] | None = ...,
    layout: str = ...,
    strategy: str = ...,
    mesh: Mesh | AbstractMesh | None = ...,
    seq_axis: AxisName = ...,
    batch_axis: AxisName | None = ...,
    head_axis: AxisName | None = ...,
    implementation: str | None = ...,
    return_lse: Literal[True],
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B N T"]]: ...


def ring_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    is_causal: bool = False,
    scale: float | None = None,
    segment_ids: Int32[Array, "B T"] | None = None,
    layout: str = "contiguous",
    strategy: str = "ring",
    mesh: Mesh | AbstractMesh | None = None,
    seq_axis: AxisName = "seq",
    batch_axis: AxisName | None = "data",
    head_axis: AxisName | None = "tensor",
    implementation: str | None = None,
    return_lse: bool = False,
) -> Float[Array, "B T N H"] | tuple[Float[Array, "B T N H"], Float32[Array, "B N T"]]:
    """Exact softmax attention over a sequence sharded over a mesh axis (Ring Attention, arXiv:2310.01889).

    Works under `jit`, `grad`, `vmap`, `jax.checkpoint` and `scan`, on meshes of Auto, Explicit and mixed axes. Inputs
    may be sharded, replicated or, outside `jit`, on one device. Forward-mode differentiation (`jvp`) is refused.

    Args:
        query: global array `[B, T, N, H]`, float32, bfloat16 or float16, tokens in `layout` order.
        key, value: global arrays `[B, T, K, H]` of the query's dtype; K divides N (grouped-query attention).
        is_causal: whether a token sees only tokens at its own and earlier positions.
        scale: factor on query-key products; `H ** -0.5` if None.
        segment_ids: int32 `[B, T]`: tokens see only tokens with the same id, and id 0 is padding, which sees nothing
            and is not seen; the output there is 0.
        layout: the order of the tokens, one of `ring_jax.LAYOUTS`; see `ring_jax.to_layout`.
        strategy: how shards exchange data, one of `ring_jax.STRATEGIES`.
        mesh: the mesh; if None, the one of `jax.set_mesh`.
        seq_axis: mesh axis, or tuple of axes, that T is sharded over.
        batch_axis, head_axis: the same for B, and for N and K; None, or axes the mesh lacks, leave a dim whole.
        implementation: the kernel, one of `ring_jax.IMPLEMENTATIONS`; if None, the best for the mesh's devices. With
            `--xla_gpu_exclude_nondeterministic_ops` in XLA_FLAGS, the best that gives the same bits in every run.
        return_lse: whether to return the logsumexp of every row too (natural logarithm; -inf where nothing is seen).

    Returns:
        The output, with the query's shape and dtype; with `return_lse` also the float32 logsumexp `[B, N, T]`.

    Raises:
        ValueError: an argument is wrong; the message names the value and the cure.
        NotImplementedError: the implementation cannot compute this here; the message names what can.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}: choose one of {', '.join(STRATEGIES)}")
    query, key, value = (x if isinstance(x, jax.Array) else jnp.asarray(x) for x in (query, key, value))
    _check_mesh(mesh, query)
    axes = _find_axes(_untyped(mesh, query, key, value), seq_axis, batch_axis, head_axis)
    _check_arrays(query, key, value, segment_ids)
    check_layout(layout, query.shape[1], axes.size(axes.seq))
    _check_divisible(axes, query, key)
    options = ring.RingOptions(
        axis_name=axes.seq,
        implementation=kernels.choose(implementation, kernels.Need(axes.target, query.dtype.name, query.shape[3])),
        target=axes.target,
        scale=_default_scale(scale, query.shape[3]),
        is_causal=bool(is_causal),
        layout=layout,
        is_in_one_process=axes.is_in_one_process,
    )
    array_spec = PartitionSpec(axes.batch, axes.seq, axes.head)
    token_spec = PartitionSpec(axes.batch, axes.seq)
    specs = (array_spec, array_spec, array_spec, token_spec)
    arrays = tuple(axes.place(x, spec) for x, spec in zip((query, key, value, segment_ids), specs, strict=True))
    output, lse = _attend_sharded(options, axes, specs)(*arrays)
    return (output, lse) if return_lse else output


def ring_attention_shard(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    axis_name: AxisName,
    positions: Int32[Array, " T"],
    segment_ids: Int32[Array, "B T"] | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """`ring_attention` for code already inside `jax.shard_map`: arguments are the device's own shards.

    Args:
        query: this device's queries `[B, T, N, H]`, float32, bfloat16 or float16.
        key, value: this device's keys and values `[B, T, K, H]` of the query's dtype; K divides N.
        axis_name: the manual mesh axis, or tuple of axes, that the sequence is sharded over.
        positions: int32 `[T]`, the global position of each of this device's tokens (any layout): a causal mask
            compares them. `ring_jax.layout_positions` gives those of a layout.
        segment_ids: int32 `[B, T]` or None; as in `ring_attention`.
        is_causal, scale, implementation: as in `ring_attention`.

    Returns:
        This device's output `[B, T, N, H]`, in the query's dtype.

    Raises:
        ValueError: an argument is wrong, or the call is not inside `shard_map` over `axis_name`.
        NotImplementedError: the implementation cannot compute this here; the message names the cure.
    """
    try:
        lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"ring_attention_shard must be called inside jax.shard_map over axis_name={axis_name!r}; "
            "for global arrays call ring_jax.ring_attention"
        ) from None
    _check_arrays(query, key, value, segment_ids)
    if positions.shape != query.shape[1:2] or positions.dtype != jnp.int32:
        raise ValueError(
            f"positions must be int32 of shape {query.shape[1:2]}, one for each of this device's tokens; "
            f"got {positions.dtype} {positions.shape}"
        )
    target = _target(jax.sharding.get_abstract_mesh())
    # Under check_vma=True the rank's type says that it varies over the axis; otherwise types say nothing.
    check_vma = bool(jax.typeof(lax.axis_index(axis_name)).mat.varying)
    need = kernels.Need(target, query.dtype.name, query.shape[3], check_vma)
    options = ring.RingOptions(
        axis_name=axis_name,
        implementation=kernels.choose(implementation, need),
        target=target,
        scale=_default_scale(scale, query.shape[3]),
        is_causal=bool(is_causal),
        layout=None,
        is_in_one_process=jax.process_count() == 1 and not target.is_compile_only,
    )
    return ring.attend(query, key, value, segment_ids, positions, options)[0]


@dataclasses.dataclass(frozen=True)
class _Axes:
    """The mesh of a call, and the axes of it that each dim is sharded over (empty: the dim stays whole)."""

    mesh: Mesh | AbstractMesh
    is_context: bool
    seq: tuple[Hashable, ...]
    batch: tuple[Hashable, ...]
    head: tuple[Hashable, ...]

    def size(self, axes: tuple[Hashable, ...]) -> int:
        size = 1
        for axis in axes:
            size *= self.mesh.shape[axis]
        return size

    @property
    def target(self) -> kernels.Target:
        return _target(self.mesh)

    @property
    def is_in_one_process(self) -> bool:
        """Whether the devices of each ring surely belong to one process."""
        if not isinstance(self.mesh, Mesh):
            return jax.process_count() == 1 and not self.target.is_compile_only
        processes = np.vectorize(lambda device: device.process_index)(self.mesh.devices)
        ring_dims = tuple(self.mesh.axis_names.index(axis) for axis in self.seq)
        return bool((processes == processes.min(ring_dims, keepdims=True)).all())

    def place(self, x: Array | None, spec: PartitionSpec) -> Array | None:
        """`x` laid out by `spec`: moved to the mesh if it is elsewhere, resharded where its type says how it lies."""
        if x is None:
            return None
        on_mesh = jax.typeof(x).sharding.mesh
        if on_mesh.empty or not isinstance(x, Tracer):
            x = _move(x, spec if self.is_context else NamedSharding(self.mesh, spec))
        on_mesh = self.mesh.abstract_mesh if isinstance(self.mesh, Mesh) else self.mesh
        explicit = _explicit_axes(on_mesh)
        if not explicit or not isinstance(x, Tracer):
            return x
        # Explicit axes are part of the array's type, which only `reshard` gives back to its cotangent.
        named = [tuple(axis for axis in _names(names) if axis in explicit) or None for names in spec]
        return jax.sharding.reshard(x, NamedSharding(on_mesh, PartitionSpec(*named)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _move(x: Array, sharding: NamedSharding | PartitionSpec) -> Array:
    """Moves an array from outside `jit` to the mesh; inside, `shard_map` says how it must lie.

    As a `custom_vjp` it sees the array itself under `jax.grad` too, and `jax.vmap` need not know what `sharding` means
    for its dim.
    """
    return x if isinstance(x, Tracer) else jax.device_put(x, sharding)


def _move_forward(x: Array, sharding: NamedSharding | PartitionSpec) -> tuple[Array, Array | None]:
    has_device = isinstance(x, jax.Array) and not isinstance(x, Tracer)
    return _move(x, sharding), x if has_device else None


def _move_backward(sharding: NamedSharding | PartitionSpec, x: Array | None, cotangent: Array) -> tuple[Array]:
    del sharding
    # An array that nobody placed is free to meet arrays on the mesh, and so must its gradient be; not so where the mesh
    # is part of the type.
    if x is None or not (x.committed or _explicit_axes(jax.typeof(cotangent).sharding.mesh)):
        return (cotangent,)
    return (jax.device_put(cotangent, x.sharding),)


_move.defvjp(_move_forward, _move_backward)


@functools.lru_cache(maxsize=256)
def _attend_sharded(options: ring.RingOptions, axes: _Axes, specs: tuple[PartitionSpec, ...]):
    """The ring inside `shard_map`, compiled once for each set of options where it is called outside `jit`."""
    sharded = jax.shard_map(
        functools.partial(_attend_by_layout, options),
        mesh=None if axes.is_context else axes.mesh,
        in_specs=specs,
        out_specs=(specs[0], PartitionSpec(axes.batch, axes.head, axes.seq)),
        axis_names={*axes.seq, *axes.batch, *axes.head},
        check_vma=kernels.works_with_check_vma(options.implementation),
    )
    return jax.jit(sharded)


def _attend_by_layout(
    options: ring.RingOptions, query: Array, key: Array, value: Array, segment_ids: Array | None
) -> tuple[Array, Array]:
    return ring.attend(query, key, value, segment_ids, None, options)


def _find_axes(
    mesh: Mesh | AbstractMesh | None, seq_axis: AxisName, batch_axis: AxisName | None, head_axis: AxisName | None
) -> _Axes:
    context = jax.sharding.get_abstract_mesh()
    if mesh is None and context.empty:
        raise ValueError("no mesh: pass mesh=... or call inside `with jax.set_mesh(mesh):`")
    # Inside a surrounding shard_map only the context knows which axes are already manual.
    is_context = mesh is None or (
        not context.empty and context.axis_names == mesh.axis_names and bool(context.manual_axes)
    )
    used = context if is_context or mesh is None else mesh
    seq = _names(seq_axis)
    for axis in seq:
        if axis not in used.axis_names:
            raise ValueError(
                f"the mesh has no sequence axis {axis!r}: its axes are {tuple(used.axis_names)}; "
                "pass seq_axis=... or make a mesh with that axis"
            )
        if axis in _manual_axes(used):
            raise ValueError(
                f"axis {axis!r} is already manual: inside jax.shard_map call ring_jax.ring_attention_shard instead"
            )
    if not seq:
        raise ValueError(f"seq_axis must name at least one mesh axis, got {seq_axis!r}")
    batch, head = (
        tuple(a for a in _names(axis) if a in used.axis_names and a not in _manual_axes(used))
        for axis in (batch_axis, head_axis)
    )
    if len({*seq, *batch, *head}) < len(seq) + len(batch) + len(head):
        raise ValueError(f"seq_axis={seq_axis!r}, batch_axis={batch_axis!r} and head_axis={head_axis!r} share an axis")
    return _Axes(used, is_context, seq, batch, head)


def _untyped(mesh: Mesh | AbstractMesh | None, *arrays: Array) -> Mesh | AbstractMesh | None:
    """A given mesh without its Explicit axis types where no array has them, so that gradients get the arrays' types."""
    if mesh is None or any(_explicit_axes(jax.typeof(x).sharding.mesh) for x in arrays):
        return mesh
    auto = (AxisType.Auto,) * len(mesh.axis_names)
    if isinstance(mesh, Mesh):
        return Mesh(mesh.devices, mesh.axis_names, axis_types=auto)
    return mesh if mesh.manual_axes else AbstractMesh(mesh.axis_sizes, mesh.axis_names, auto)


def _explicit_axes(mesh: Mesh | AbstractMesh) -> set[Hashable]:
    return {a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit}


def _names(axis: AxisName | None) -> tuple[Hashable, ...]:
    if axis is None:
        return ()
    return axis if isinstance(axis, tuple) else (axis,)


def _manual_axes(mesh: Mesh | AbstractMesh) -> set[Hashable]:
    return {a for a, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Manual}


def _target(mesh: Mesh | AbstractMesh) -> kernels.Target:
    if isinstance(mesh, Mesh):
        return kernels.Target.of_device(mesh.devices.flat[0])
    # The mesh of `jax.set_mesh`, seen inside `jit`, tells the kind of its devices but not the devices.
    described = mesh.abstract_device
    same_kind = [d for d in jax.devices() if described is None or d.device_kind == described.device_kind]
    if same_kind:
        return kernels.Target.of_device(same_kind[0])
    assert described is not None
    return kernels.Target.of_kind(described.platform or "gpu", described.device_kind)


def _default_scale(scale: float | None, head_dim: int) -> float:
    if isinstance(scale, Array):
        raise ValueError("scale must be a Python number, not an array: multiply the query by it instead")
    return float(head_dim**-0.5 if scale is None else scale)


def _check_mesh(mesh: Mesh | AbstractMesh | None, query: Array) -> None:
    if not isinstance(mesh, Mesh | AbstractMesh | None):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}: make one with jax.make_mesh")
    if mesh is None or isinstance(query, Tracer):
        return
    if isinstance(mesh, Mesh):
        described = kernels.Target.of_device(mesh.devices.flat[0]).is_compile_only
    else:
        described = not mesh.manual_axes
    if described:
        raise ValueError(
            f"mesh {mesh} describes {mesh.size} devices but has none, so nothing can run on it: "
            f"make a mesh of real ones with jax.make_mesh (there are {jax.device_count()}), or only compile, under jit"
        )


def _check_arrays(query: Array, key: Array, value: Array, segment_ids: Array | None) -> None:
    for name, x, letters in (
        ("query", query, "[B, T, N, H]"),
        ("key", key, "[B, T, K, H]"),
        ("value", value, "[B, T, K, H]"),
    ):
        if x.ndim != 4:
            raise ValueError(f"{name} must have shape {letters}, got {x.shape}")
        if x.dtype.name not in DTYPES:
            raise ValueError(f"{name} has dtype {x.dtype.name}: cast it to one of {', '.join(DTYPES)}")
        if 0 in x.shape:
            raise ValueError(f"{name} is empty: shape {x.shape}")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(
            "query, key and value must share one dtype: cast them; "
            f"got {query.dtype.name}, {key.dtype.name} and {value.dtype.name}"
        )
    if key.shape != value.shape:
        raise ValueError(f"key and value must have the same shape, got {key.shape} and {value.shape}")
    batch, num_tokens, num_heads, head_dim = query.shape
    if (batch, num_tokens, head_dim) != (key.shape[0], key.shape[1], key.shape[3]):
        raise ValueError(
            f"query {query.shape} and key {key.shape} must agree in batch, tokens and head dim (all but dim 2): "
            "ring attention is self-attention over one sequence"
        )
    if num_heads % key.shape[2]:
        raise ValueError(f"the {key.shape[2]} key/value heads must divide the {num_heads} query heads")
    if segment_ids is None:
        return
    if not hasattr(segment_ids, "dtype"):
        raise ValueError(f"segment_ids must be an int32 array, not a {type(segment_ids).__name__}: use jnp.asarray")
    if segment_ids.shape != (batch, num_tokens):
        raise ValueError(f"segment_ids must have shape [B, T] = {(batch, num_tokens)}, got {segment_ids.shape}")
    if segment_ids.dtype != jnp.int32:
        raise ValueError(f"segment_ids must be int32, got {segment_ids.dtype}: cast with .astype(jnp.int32)")


def _check_divisible(axes: _Axes, query: Array, key: Array) -> None:
    for what, size, names, argument in (
        ("batch", query.shape[0], axes.batch, "batch_axis"),
        ("number of query heads", query.shape[2], axes.head, "head_axis"),
        ("number of key/value heads", key.shape[2], axes.head, "head_axis"),
    ):
        parts = axes.size(names)
        if size % parts:
            raise ValueError(
                f"the {what} {size} does not divide over mesh axes {names} of size {parts}: "
                f"change it, or pass {argument}=None to keep it whole on every device"
            )
