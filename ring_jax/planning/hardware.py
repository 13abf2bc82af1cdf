"""The described cluster: GPUs by datasheet, links, which mesh axes leave a host."""

import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from ..cluster import GPUS, gpu_description
from ..mesh import format_mesh, parse_mesh

MAX_GPUS_PER_HOST = 8
# Left free on every GPU: NCCL's buffers, the CUDA context, fragmentation.
RESERVED_FRACTION = 0.06


@dataclasses.dataclass(frozen=True)
class Datasheet:
    """NVIDIA's figures for one GPU: dense bfloat16 FLOP/s, and bytes per second each way to its neighbours and host."""

    name: str
    bf16_flops: float
    nvlink: float
    pcie: float


# SXM parts. NVLink and PCIe are half of the "bidirectional" figures that the datasheets print.
DATASHEETS = {
    "a100-80gb": Datasheet("NVIDIA A100 SXM 80GB", 312e12, 300e9, 32e9),
    "h100": Datasheet("NVIDIA H100 SXM", 989e12, 450e9, 64e9),
    "h200": Datasheet("NVIDIA H200 SXM", 989e12, 450e9, 64e9),
    "b200": Datasheet("NVIDIA B200 SXM", 2250e12, 900e9, 64e9),
}


@dataclasses.dataclass(frozen=True)
class Link:
    """A link between two GPUs: bytes per second each way, seconds until the first byte arrives.

    Bandwidths are those of the datasheets; the latencies are assumed: those of a point-to-point transfer of NCCL.
    """

    name: str
    bandwidth: float
    latency: float

    def seconds(self, num_bytes: float) -> float:
        """The time one transfer takes."""
        return self.latency + num_bytes / self.bandwidth


# One network card per GPU. "nvlink" is that of the GPU.
NETWORKS = {
    "ib-800": Link("ib-800", 100e9, 20e-6),
    "ib-400": Link("ib-400", 50e9, 20e-6),
    "ib-200": Link("ib-200", 25e9, 20e-6),
    "ib-100": Link("ib-100", 12.5e9, 20e-6),
    "pcie-5": Link("pcie-5", 64e9, 15e-6),
    "pcie-4": Link("pcie-4", 32e9, 15e-6),
}
LINKS = ("nvlink", *NETWORKS)
NVLINK_LATENCY = 10e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cluster:
    """GPUs of one kind as hosts x GPUs per host, and the mesh laid over them.

    Devices fill the mesh in order, its last axis innermost, so the last axes stay within a host where they can.

    Raises ValueError where the names are unknown or the mesh does not have hosts x GPUs per host devices.
    """

    gpu: str
    mesh: Mapping[str, int]
    hosts: int
    gpus_per_host: int
    link: str | None = None
    """Between hosts, or between all GPUs of one host; None: NVLink within a host, ib-400 between hosts."""

    def __post_init__(self) -> None:
        gpu_description(self.gpu)
        if self.link is not None and self.link not in LINKS:
            raise ValueError(f"unknown link {self.link!r}: choose one of {', '.join(LINKS)}")
        if self.hosts < 1 or self.gpus_per_host < 1 or self.hosts * self.gpus_per_host != self.num_gpus:
            raise ValueError(
                f"mesh {format_mesh(self.mesh)} needs {self.num_gpus} GPUs, but {self.hosts} hosts x "
                f"{self.gpus_per_host} GPUs are {self.hosts * self.gpus_per_host}: change --mesh, --hosts or "
                "--gpus-per-host so that they agree"
            )

    @classmethod
    def of(
        cls, gpu: str, mesh: str, *, hosts: int | None = None, gpus_per_host: int | None = None, link: str | None = None
    ) -> "Cluster":
        """The cluster of a mesh such as `seq=32`; hosts have 8 GPUs, or the most below 8 that the mesh divides by."""
        shape = parse_mesh(mesh)
        total = math.prod(shape.values())
        if gpus_per_host is None:
            most = MAX_GPUS_PER_HOST if hosts is None else -(-total // max(hosts, 1))
            gpus_per_host = next(n for n in range(min(total, most), 0, -1) if total % n == 0)
        return cls(
            gpu=gpu,
            mesh=shape,
            hosts=total // gpus_per_host if hosts is None else hosts,
            gpus_per_host=gpus_per_host,
            link=link,
        )

    @property
    def num_gpus(self) -> int:
        return math.prod(self.mesh.values())

    @property
    def device_memory(self) -> int:
        """Bytes of one GPU."""
        return int(self._described("device_memory_size"))

    @property
    def usable_memory(self) -> int:
        """Bytes of one GPU that a program may use."""
        return int((1 - RESERVED_FRACTION) * self.device_memory)

    @property
    def memory_bandwidth(self) -> float:
        """Bytes per second of one GPU's memory."""
        return self._described("memory_bandwidth")

    @property
    def datasheet(self) -> Datasheet:
        """The GPU's; one given as a file of one's own has that of the GPU of `GPUS` with the same device name."""
        if self.gpu in DATASHEETS:
            return DATASHEETS[self.gpu]
        named = re.search(r'device_description_str: "([^"]*)"', gpu_description(self.gpu))
        for name in GPUS:
            if named and f'"{named[1]}"' in gpu_description(name):
                return DATASHEETS[name]
        raise ValueError(
            f"{self.gpu!r} describes {named[1] if named else 'a GPU without a name'}, whose speed and links are not "
            f"known: copy the device_description_str of one of {', '.join(GPUS)}"
        )

    def crosses_hosts(self, axis: str) -> bool:
        """Whether neighbours along a mesh axis can be on different hosts."""
        if axis not in self.mesh:
            return False
        host = np.arange(self.num_gpus).reshape(tuple(self.mesh.values())) // self.gpus_per_host
        return bool(np.any(np.diff(host, axis=list(self.mesh).index(axis))))

    def link_along(self, axis: str) -> Link:
        """The slowest link on the way round an axis: a ring moves at its pace."""
        nvlink = Link("nvlink", self.datasheet.nvlink, NVLINK_LATENCY)
        if self.crosses_hosts(axis):
            name = "ib-400" if self.link is None else self.link
        else:
            name = "nvlink" if self.link is None or self.hosts > 1 else self.link
        return nvlink if name == "nvlink" else NETWORKS[name]

    def gather_bandwidth(self) -> float:
        """Bytes per second at which each GPU receives in an all-gather over all GPUs: every host uses all its cards."""
        axes = list(self.mesh)
        slowest = min((self.link_along(axis) for axis in axes), key=lambda link: link.bandwidth)
        if self.hosts == 1:
            return slowest.bandwidth
        return min(self.datasheet.nvlink, self.gpus_per_host * slowest.bandwidth)

    def _described(self, field: str) -> float:
        found = re.search(rf"\b{field}: (\d+)", gpu_description(self.gpu))
        if found is None:
            raise ValueError(f"the description {self.gpu!r} has no {field}")
        return float(found[1])
