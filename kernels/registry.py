"""Which implementation computes a block: chosen by name, or from the devices of the mesh."""

import dataclasses
import functools
import importlib
import logging
from types import ModuleType

import jax.numpy as jnp

from .contract import BlockKernel

IMPLEMENTATIONS = ("xla",)

_log = logging.getLogger("ring_jax")


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices a block will run on, as the mesh tells: `platform` "cpu", "cuda", ..., and jax's `device_kind`."""

    platform: str
    device_kind: str


def load(implementation: str) -> BlockKernel:
    """The module of an implementation; imported when first asked for, so that optional packages stay optional."""
    return _module(implementation)  # pyright: ignore[reportReturnType]  (a module as the protocol)


def choose(implementation: str | None, target: Target, dtype: jnp.dtype, head_dim: int) -> str:
    """The implementation to use on `target`: the one asked for, or the best that takes this dtype and head dim.

    Raises:
        ValueError: no implementation of that name.
        NotImplementedError: the one asked for cannot run this here; the message says why and what can.
    """
    if implementation is None:
        return _default(target, dtype, head_dim)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"unknown implementation {implementation!r}: choose one of {', '.join(IMPLEMENTATIONS)} or None"
        )
    reason = _module(implementation).unsupported_reason(dtype, head_dim)
    if reason:
        raise NotImplementedError(f"implementation {implementation!r} cannot compute this: {reason}")
    return implementation


@functools.cache
def _default(target: Target, dtype: jnp.dtype, head_dim: int) -> str:
    del dtype, head_dim
    _log.info("attention blocks on %s (%s) are computed by implementation 'xla'", target.platform, target.device_kind)
    return "xla"


def _module(implementation: str) -> ModuleType:
    return importlib.import_module(f".{implementation}", __package__)
