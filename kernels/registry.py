"""Which implementation computes a block: chosen by name, or from the devices of the mesh."""

import dataclasses
import functools
import importlib
import logging
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from .contract import AttentionState, BlockKernel, Gradients
from .triton_gpu import target as triton_target

# Module of each implementation, best first: the first that can compute a block on a device is its default.
_MODULES = {"triton": "triton_gpu", "xla": "xla"}
IMPLEMENTATIONS = tuple(_MODULES)

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

    `platform` is jax's "cpu", "gpu", "tpu"; `compute_capability` is an NVIDIA GPU's, 90 for 9.0, else None.
    """

    platform: str
    device_kind: str
    compute_capability: int | None = None

    @classmethod
    def of_device(cls, device: jax.Device) -> "Target":
        """The target that a device of the mesh is; compile-only devices included."""
        text = getattr(device, "compute_capability", None)
        if device.platform != "gpu" or not isinstance(text, str):
            return cls(device.platform, device.device_kind)
        major, minor = text.split(".")
        return cls(device.platform, device.device_kind, 10 * int(major) + int(minor))

    @classmethod
    def of_kind(cls, platform: str, device_kind: str) -> "Target":
        """The target of devices that are only described, by the product name that `device_kind` begins with."""
        known = (number for name, number in _COMPUTE_CAPABILITIES.items() if name in device_kind.split())
        return cls(platform, device_kind, next(known, None) if platform == "gpu" else None)


def choose(implementation: str | None, target: Target, dtype: jnp.dtype, head_dim: int) -> str:
    """The implementation to use on `target`: the one asked for, or the best that takes this dtype and head dim.

    Raises:
        ValueError: no implementation of that name.
        NotImplementedError: the one asked for cannot compute this here; the message says why and what can.
    """
    if implementation is None:
        return _default(target, jnp.dtype(dtype), head_dim)
    if implementation not in _MODULES:
        raise ValueError(f"unknown implementation {implementation!r}: choose one of {', '.join(_MODULES)}, or None")
    reason = _unsupported_reason(implementation, target, dtype, head_dim)
    if reason:
        able = [name for name in _MODULES if not _unsupported_reason(name, target, dtype, head_dim)]
        raise NotImplementedError(
            f"implementation {implementation!r} cannot run on {target.device_kind}: {reason}. "
            f"What can: {', '.join(able)}; None takes {_default(target, jnp.dtype(dtype), head_dim)!r}"
        )
    return implementation


def load(implementation: str, target: Target) -> BlockKernel:
    """The block kernel of an implementation for `target`; its module is imported when first asked for."""
    kernel: BlockKernel = _module(implementation)  # pyright: ignore[reportAssignmentType]  (the module has its functions)
    if implementation == "triton":
        assert target.compute_capability is not None
        return _TritonFor(kernel, target.compute_capability)
    return kernel


@dataclasses.dataclass(frozen=True)
class _TritonFor:
    """The Triton kernels, built for the GPUs of the mesh: those of this process may be others, or none."""

    kernel: BlockKernel
    compute_capability: int

    def forward(self, *args: Any, scale: float) -> AttentionState:
        with triton_target(self.compute_capability):
            return self.kernel.forward(*args, scale=scale)

    def backward(self, *args: Any, scale: float) -> Gradients:
        with triton_target(self.compute_capability):
            return self.kernel.backward(*args, scale=scale)


@functools.cache
def _default(target: Target, dtype: jnp.dtype, head_dim: int) -> str:
    for name in _MODULES:
        reason = _unsupported_reason(name, target, dtype, head_dim)
        if reason is None:
            _log.info("attention on %s is computed by implementation %r", target.device_kind, name)
            return name
        if target.platform == "gpu":
            _log.info("attention on %s: not by implementation %r: %s", target.device_kind, name, reason)
    raise AssertionError("xla computes everything")


def _unsupported_reason(implementation: str, target: Target, dtype: jnp.dtype, head_dim: int) -> str | None:
    return _module(implementation).unsupported_reason(target.compute_capability, head_dim, dtype)


def _module(implementation: str) -> ModuleType:
    return importlib.import_module(f".{_MODULES[implementation]}", __package__)
