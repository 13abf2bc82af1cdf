"""Will it fit, and how fast will it be? `python -m ring_jax.plan --help`. Needs no GPU."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.console import Console

from .kernels import IMPLEMENTATIONS
from .layouts import LAYOUTS
from .model import REMAT_MODES
from .planning import (
    Cluster,
    Plan,
    Workload,
    find_model,
    leave_gpus_alone,
    longest,
    make_plan,
    meshes,
    ranked,
    ranking,
    to_json,
    to_text,
)
from .training.config import parse_seq_len

COMMAND = "python -m ring_jax.plan"


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """Compile the actual training step for a cluster that need not be there: memory, hops, predicted time.

    Memory and schedule are exact for the compiled program; every time is predicted, with its sources.
    """

    gpu: str = "h100"
    """a100-80gb, h100, h200, b200, or the path of a GPU description (.pbtxt)."""
    mesh: str = "seq=8"
    """Mesh axes and sizes, such as seq=32 or data=2,seq=8,tensor=2; the last axis stays within a host if it can."""
    seq_len: str = "128K"
    """Tokens of one sequence, over all its shards: 131072, 128K or 1M."""
    model: str = "llama3-8b"
    """A preset, the path of a Hugging Face config.json, or attention for the bare operation."""
    batch: int = 1
    """Sequences per step, over all GPUs."""
    heads: str = "32/8"
    """Query heads/key-value heads, for --model attention."""
    head_dim: int = 128
    """Head dim, for --model attention."""
    layout: str = "zigzag"
    """How tokens are dealt to shards."""
    implementation: str | None = None
    """Attention kernel. None: the best for the GPU."""
    remat: str = "layer"
    """What the backward pass computes again: none, attention (all but attention) or layer (all but layer inputs)."""
    offload: bool = False
    """Keep what remat saves in the hosts' pinned memory."""
    hosts: int | None = None
    """Hosts of the cluster. None: as many as the mesh needs with --gpus-per-host."""
    gpus_per_host: int | None = None
    """None: 8, or the most below that the mesh divides by."""
    link: str | None = None
    """Between hosts, or between the GPUs of the only host. None: nvlink within a host, ib-400 between hosts."""
    host_memory: Annotated[float, tyro.conf.arg(metavar="GB")] = 2000.0
    """Memory of one host in GB; 2000 is that of the usual 8-GPU machine."""
    max_seq_len: bool = False
    """Find the longest sequence that fits, instead of --seq-len."""
    best_mesh: bool = False
    """Rank all meshes of as many GPUs as --mesh has."""
    json: bool = False
    """Print JSON: a plan, or with --best-mesh a list of plans, fastest first."""

    def check(self) -> None:
        """Raises ValueError for the first option that names nothing known."""
        for name, value, valid in (
            ("layout", self.layout, LAYOUTS),
            ("remat", self.remat, REMAT_MODES),
            ("implementation", self.implementation, (None, *IMPLEMENTATIONS)),
        ):
            if value not in valid:
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(str(name) for name in valid)}")
        if self.batch < 1:
            raise ValueError(f"--batch {self.batch} must be at least 1")
        if not 0 < self.host_memory < float("inf"):
            raise ValueError(f"--host-memory {self.host_memory} must be a number of GB above 0")
        if self.max_seq_len and self.best_mesh:
            raise ValueError("--max-seq-len and --best-mesh are two questions: ask one at a time")


def plan(config: PlanConfig, console: Console) -> list[Plan]:
    """The plans that `config` asks for, best first; progress goes to `console`."""
    config.check()
    cluster = Cluster.of(
        config.gpu, config.mesh, hosts=config.hosts, gpus_per_host=config.gpus_per_host, link=config.link
    )
    workload = Workload(
        name=config.model,
        model=find_model(
            config.model, heads=config.heads, head_dim=config.head_dim, remat=config.remat, offload=config.offload
        ),
        seq_len=parse_seq_len(config.seq_len),
        batch=config.batch,
        layout=config.layout,
        implementation=config.implementation,
    )
    with console.status("starting ...") as status:

        def progress(text: str) -> None:
            status.update(f"{text} ...")
            if not console.is_terminal:
                console.print(text, soft_wrap=True, highlight=False, markup=False)

        def plan_one(workload: Workload, cluster: Cluster) -> Plan:
            return make_plan(workload, cluster, host_memory=int(1e9 * config.host_memory), progress=progress)

        if config.max_seq_len:
            # Multiples of 1K tokens for each of zigzag's chunks keep every kernel's tiles whole.
            granule = 2048 * cluster.mesh["seq"]
            return [
                longest(
                    lambda length: plan_one(dataclasses.replace(workload, seq_len=length), cluster),
                    granule,
                    workload.seq_len,
                    progress,
                )
            ]
        if config.best_mesh:
            shapes = meshes(cluster.num_gpus, workload.batch, workload.heads[1])
            return ranked([plan_one(workload, dataclasses.replace(cluster, mesh=shape)) for shape in shapes])
        return [plan_one(workload, cluster)]


def main(args: Sequence[str] | None = None) -> int:
    """Prints a plan; returns the exit status: 0 even where the step does not fit, 1 if it cannot be compiled, 2 for
    the user's mistakes."""
    config = tyro.cli(PlanConfig, prog=COMMAND, args=args)
    leave_gpus_alone()
    try:
        plans = plan(config, Console(stderr=True))
    except (ValueError, NotImplementedError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    except RuntimeError as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 1
    if config.json:
        found = [to_json(plan) for plan in plans]
        print(json.dumps(found if config.best_mesh else found[0], indent=1))
    elif config.best_mesh:
        Console().print(ranking(plans), soft_wrap=True)
    else:
        Console(highlight=False).print(to_text(plans[0]), soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
