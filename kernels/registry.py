"""Which implementation computes a block: chosen by name, or from the devices of the mesh."""

import dataclasses
import functools
import importlib
import logging
import os
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from .batching import Mappable
from .contract import AttentionState, BlockKernel, Gradients, StepKernel
from .ptxas import miscompiling_reason
from .several_blocks import SeveralAsOne
from .tracing import TracedOnce
from .triton_gpu import compute_capability
from .triton_gpu import target as triton_target

_MODULES = {
    "mosaic_gpu": "mosaic_gpu",
    "mosaic_gpu_deterministic": "mosaic_gpu_deterministic",
    "triton": "triton_gpu",
    "cudnn": "cudnn",
    "xla": "xla",
}
IMPLEMENTATIONS = tuple(_MODULES)
# Best first: the first that can compute a block on a device is its default. cudnn knows only full and diagonal blocks.
_DEFAULTS = ("mosaic_gpu", "mosaic_gpu_deterministic", "triton", "xla")
_MOSAIC = ("mosaic_gpu", "mosaic_gpu_deterministic")
# Mosaic kernels take their state by reference, which `jax.shard_map` does not type yet.
_WITHOUT_CHECK_VMA = _MOSAIC
# `jax.vmap` knows neither kernels that take references nor Triton's.
_WITHOUT_VMAP = (*_MOSAIC, "triton")
# Kernels that find their block's positions and tiles in those of several blocks, see `BlockMask.block`.
_INDEXING_BLOCKS = _MOSAIC
# Kernels that take several blocks at once where they lie, and say with `prefers_several_blocks` of which shards; for
# the others these are put together.
_TAKING_SEVERAL_BLOCKS = ("mosaic_gpu",)
# XLA's options that forbid results which differ between two runs; its own attention, cuDNN's, obeys them too.
_DETERMINISTIC_OPTIONS = ("--xla_gpu_exclude_nondeterministic_ops", "--xla_gpu_deterministic_ops")

# NVIDIA's list of compute capabilities, for GPUs that a described mesh may have and this machine has not.
_COMPUTE_CAPABILITIES = {
    "A100-SXM4-80GB": 80,
    "A100-SXM4-40GB": 80,
    "A100": 80,
    "A10": 86,
    "A40": 86,
    "L4": 89,
    "L40S": 89,
}
_COMPUTE_CAPABILITIES |= {"H100": 90, "H200": 90, "GH200": 90, "B200": 100, "GB200": 100, "B300": 103, "GB300": 103}

_log = logging.getLogger("ring_jax")


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices a block will run on, as the mesh tells.

    `platform` is jax's "cpu", "gpu", "tpu"; `compute_capability` is an NVIDIA GPU's, 90 for 9.0, else None. Programs
    for devices that this process has not got can be compiled but not run.
    """

    platform: str
    device_kind: str
    compute_capability: int | None = None
    is_compile_only: bool = False

    @classmethod
    def of_device(cls, device: jax.Device) -> "Target":  # pyright: ignore[reportInvalidTypeForm]  (a variable)
        """The target that a device of the mesh is; compile-only devices included."""
        return cls(device.platform, device.device_kind, compute_capability(device), not _exists(device))

    @classmethod
    def of_kind(cls, platform: str, device_kind: str) -> "Target":
        """The target of devices that are only described, by the product name that `device_kind` begins with."""
        known = (number for name, number in _COMPUTE_CAPABILITIES.items() if name in device_kind.split())
        return cls(platform, device_kind, next(known, None) if platform == "gpu" else None, is_compile_only=True)


def _exists(device: jax.Device) -> bool:  # pyright: ignore[reportInvalidTypeForm]  (jax's stubs have it as a variable)
    """Whether the device is one of this program's processes, on any platform, and not only described."""
    try:
        return device in jax.devices(device.platform)
    except RuntimeError:
        return False


@dataclasses.dataclass(frozen=True)
class Need:
    """What a block kernel is needed for: devices, the inputs' dtype and head dim, and whether vma types are checked."""

    target: Target
    dtype: str
    head_dim: int
    check_vma: bool = False


def choose(implementation: str | None, need: Need) -> str:
    """The implementation to use: the one asked for, or the best that can do what is needed.

    Raises:
        ValueError: no implementation of that name.
        NotImplementedError: the one asked for cannot do this; the message says why and what can.
    """
    if implementation is None:
        return _default(need)
    if implementation not in _MODULES:
        raise ValueError(f"unknown implementation {implementation!r}: choose one of {', '.join(_MODULES)}, or None")
    reason = _unsupported_reason(implementation, need)
    if reason:
        able = ", ".join(name for name in _DEFAULTS if not _unsupported_reason(name, need))
        raise NotImplementedError(
            f"implementation {implementation!r} cannot run on {need.target.device_kind}: {reason}. What can: {able}; "
            f"None takes {_default(need)!r}"
        )
    return implementation


def works_with_check_vma(implementation: str) -> bool:
    """Whether the implementation can stand inside `jax.shard_map(check_vma=True)`."""
    return implementation not in _WITHOUT_CHECK_VMA


def has_fused_backward(implementation: str, head_dim: int) -> bool:
    """Whether one kernel computes dQ, dK and dV, so that dK and dV are there no sooner than dQ.

    Then the ring must leave a part of a device's own block for last, to have something to hide its last hop. Such a
    kernel adds shares of dQ in no fixed order, and those of dK and dV to sums that it is given.
    """
    return implementation == "mosaic_gpu" and head_dim <= _module(implementation).MAX_FUSED_HEAD_DIM


def prefers_several_blocks(implementation: str, head_dim: int, shard_len: int) -> bool:
    """Whether an implementation takes several blocks of such shards where they lie, and is faster so.

    Backward they are two. See `several_blocks`.
    """
    if implementation not in _TAKING_SEVERAL_BLOCKS:
        return False
    return _module(implementation).prefers_several_blocks(head_dim, shard_len)


def load(implementation: str, target: Target) -> StepKernel:
    """The block kernel of an implementation for `target`; its module is imported when first asked for."""
    kernel: BlockKernel = _module(implementation)  # pyright: ignore[reportAssignmentType]  (the module has its functions)
    if implementation == "triton":
        assert target.compute_capability is not None
        kernel = _TritonFor(kernel, target.compute_capability)
    kernel = kernel if implementation in _TAKING_SEVERAL_BLOCKS else SeveralAsOne(kernel)
    kernel = Mappable(kernel) if implementation in _WITHOUT_VMAP else kernel
    return TracedOnce(kernel, can_index_blocks=implementation in _INDEXING_BLOCKS)


@dataclasses.dataclass(frozen=True)
class _TritonFor:
    """The Triton kernels, built for the GPUs of the mesh: those of this process may be others, or none."""

    kernel: BlockKernel
    compute_capability: int

    def forward(self, *args: Any, **options: Any) -> AttentionState:
        with triton_target(self.compute_capability):
            return self.kernel.forward(*args, **options)

    def backward(self, *args: Any, **options: Any) -> Gradients:
        with triton_target(self.compute_capability):
            return self.kernel.backward(*args, **options)

    def finished_d_query(self, dq: jax.Array, *, scale: float) -> jax.Array:
        return self.kernel.finished_d_query(dq, scale=scale)


@functools.cache
def _default(need: Need) -> str:
    reasons: dict[str, str] = {}
    for name in _DEFAULTS:
        reason = _unsupported_reason(name, need)
        if reason is None:
            _log.info("attention on %s is computed by implementation %r", need.target.device_kind, name)
            return name
        if need.target.platform == "gpu" and reason not in reasons.values():
            _log.warning("attention on %s: not by implementation %r: %s", need.target.device_kind, name, reason)
        reasons[name] = reason
    raise AssertionError(f"xla computes everything: {reasons}")


def _unsupported_reason(implementation: str, need: Need) -> str | None:
    module = _module(implementation)
    reason = module.unsupported_reason(need.target.compute_capability, need.head_dim, jnp.dtype(need.dtype))
    if reason is None and need.check_vma and not works_with_check_vma(implementation):
        return "it cannot stand inside jax.shard_map(check_vma=True): pass check_vma=False there"
    if reason is None and has_fused_backward(implementation, need.head_dim) and _wants_determinism():
        return "XLA_FLAGS forbids results that differ between two runs, and its backward pass adds in no fixed order"
    if reason is None and implementation in _MOSAIC and not need.target.is_compile_only:
        return miscompiling_reason()
    return reason


def _wants_determinism() -> bool:
    """Whether the user told XLA to compute the same bits in every run. The last word on an option counts."""
    words = (word.partition("=") for word in os.environ.get("XLA_FLAGS", "").split())
    given = {option: value.lower() in ("", "true", "1") for option, _, value in words}
    return any(given.get(option, False) for option in _DETERMINISTIC_OPTIONS)


def _module(implementation: str) -> ModuleType:
    return importlib.import_module(f".{_MODULES[implementation]}", __package__)
