"""The GPUs that programs can be compiled for without having one, and their compile-only devices.

A description is XLA's own (`GpuTargetConfigProto` as text): `h200.pbtxt` was dumped from a real one, the others were
edited from it by datasheet.
"""

from importlib import resources
from pathlib import Path
from typing import Any

from jax.experimental import topologies

GPUS = ("a100-80gb", "h100", "h200", "b200")


def gpu_description(gpu: str) -> str:
    """The description of a GPU of `GPUS`, or of a `.pbtxt` file of the user's own.

    Raises:
        ValueError: neither a known name nor a file; the message lists the names.
    """
    if gpu in GPUS:
        return resources.files(__package__).joinpath("descriptions", f"{gpu}.pbtxt").read_text()
    path = Path(gpu)
    if path.suffix == ".pbtxt" and path.is_file():
        return path.read_text()
    raise ValueError(f"unknown GPU {gpu!r}: choose one of {', '.join(GPUS)}, or give the path of a .pbtxt description")


def compile_only_devices(gpu: str, *, hosts: int = 1, gpus_per_host: int = 8) -> list[Any]:
    """`hosts * gpus_per_host` devices that programs can be compiled for but not run on; no GPU is needed.

    Raises:
        ValueError: unknown GPU, or a number below 1.
        RuntimeError: jax's CUDA plugin is not installed; the message names the extra.
    """
    if hosts < 1 or gpus_per_host < 1:
        raise ValueError(f"a cluster needs at least one host with one GPU, got {hosts} hosts with {gpus_per_host} GPUs")
    description = gpu_description(gpu)
    try:
        topology = topologies.get_topology_desc(
            f"{gpu} x {hosts * gpus_per_host}",
            platform="cuda",
            topology=f"1x{hosts}x{gpus_per_host}",
            target_config=description,
        )
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise RuntimeError(
            "compiling for GPUs needs jax's CUDA plugin (no GPU is needed): pip install 'ring-jax[cuda13]' or "
            f"'ring-jax[cuda12]'. jax says: {error}"
        ) from error
    return list(topology.devices)
