"""Device meshes from text: `data=2,seq=4`, and virtual CPU devices to try them on."""

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "seq", "tensor")
"""Mesh axes the trainer knows: batch rows, shards of the sequence, attention heads and feed-forward columns."""

DEFAULT_CPU_DEVICES = 4
MAX_AUTOMATIC_CPU_DEVICES = 8


def parse_mesh(text: str) -> dict[str, int]:
    """The axis sizes in `text`, such as `data=2,seq=4`, in the order given.

    Raises:
        ValueError: a part that is not `axis=size`, an unknown or repeated axis, a size below 1, or no `seq` axis.
    """
    shape: dict[str, int] = {}
    for part in text.split(","):
        axis, equals, size = (piece.strip() for piece in part.partition("="))
        if not equals or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"mesh {text!r}: {part!r} is not axis=size; write it like data=2,seq=4")
        if axis not in AXES:
            raise ValueError(f"mesh {text!r}: unknown axis {axis!r}; choose from {', '.join(AXES)}")
        if axis in shape:
            raise ValueError(f"mesh {text!r} names axis {axis!r} twice")
        shape[axis] = int(size)
    if "seq" not in shape:
        raise ValueError(f"mesh {text!r} has no axis 'seq' for the sequence; add seq=1 to leave sequences whole")
    return shape


def format_mesh(shape: Mapping[str, int]) -> str:
    """The text that `parse_mesh` reads back as `shape`."""
    return ",".join(f"{axis}={size}" for axis, size in shape.items())


def request_cpu_devices(count: int) -> None:
    """Asks jax for virtual CPU devices; must run before the first jax computation. GPUs are not affected.

    A count in XLA_FLAGS (`--xla_force_host_platform_device_count`) has been asked for already and is left alone.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", count)


def default_cpu_devices(mesh_text: str | None) -> int:
    """As many virtual CPU devices as the mesh needs, up to 8; 4 for larger meshes and without one."""
    wanted = math.prod(parse_mesh(mesh_text).values()) if mesh_text else DEFAULT_CPU_DEVICES
    return wanted if wanted <= MAX_AUTOMATIC_CPU_DEVICES else DEFAULT_CPU_DEVICES


def quiet_cuda_plugin() -> None:
    """Where there is no NVIDIA driver at all, jax's installed CUDA plugin need not log a traceback about it."""
    if not any(Path(path).exists() for path in ("/proc/driver/nvidia", "/dev/dxg")):
        logging.getLogger("jax._src.xla_bridge").addFilter(
            lambda record: "jax_plugins.xla_cuda" not in record.getMessage()
        )


def make_mesh(shape: Mapping[str, int] | None = None) -> Mesh:
    """A mesh of the first devices of jax's default platform; without a shape, all of them on `seq`.

    Raises:
        ValueError: the shape needs more devices than there are.
    """
    devices = jax.devices()
    if shape is None:
        shape = {"seq": len(devices)}
    needed = math.prod(shape.values())
    if needed > len(devices):
        kind = "virtual CPU" if devices[0].platform == "cpu" else devices[0].device_kind
        cure = f", or make more of them with --cpu-devices {needed}" if devices[0].platform == "cpu" else ""
        raise ValueError(
            f"mesh {format_mesh(shape)!r} needs {needed} devices, but there are {len(devices)} ({kind}): "
            f"choose axis sizes whose product is at most {len(devices)}{cure}"
        )
    return jax.make_mesh(
        tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape), devices=devices[:needed]
    )
