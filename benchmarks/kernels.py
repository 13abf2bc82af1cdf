"""Speed of the block kernels on one GPU, beside other projects' attention in the same run.

    python -m benchmarks.kernels --out benchmarks/results
    python -m benchmarks.kernels --export FOLDER --gpu h200     (here: compiles the Triton kernels for another machine)
    python -m benchmarks.kernels --artifacts FOLDER ...         (there: runs them without a matching Triton)

Nothing is timed before output and gradients were compared with float64, on rows and keys drawn at random at the very
shape that is timed (`benchmarks.gate`; `pytest -m gpu` compares everything, on smaller shapes). TFLOP/s count 4 B T^2 N
H operations forward, half of it when causal, and 2.5 times that backward. Gradients are in the inputs' dtype, as users
get them. A replayed ring takes turns with one block of `cases.ONE_BLOCK`, whose rate is its ideal.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ring_jax import kernels
from ring_jax.kernels.registry import Target
from ring_jax.ring_steps import RingSteps

from .cases import GRID_BENCHMARKS, KERNEL_BENCHMARKS, ONE_BLOCK, PRECISION, REPLAYS, Case
from .gate import Gate
from .peers import PEERS, Passes
from .replay import Replay, replay_backward, replay_forward
from .timing import REST_SECONDS, Job, environment, median_seconds


@dataclasses.dataclass(frozen=True)
class Program:
    """One implementation's forward and backward of one case and replay, as functions of arrays."""

    implementation: str
    case: Case
    replay: Replay

    @property
    def name(self) -> str:
        parts = (self.implementation, self.case.label, f"{self.replay.num_shards} shards rank {self.replay.rank}")
        return "-".join(parts).replace(" ", "_")

    @property
    def kernels(self) -> ModuleType:
        """The package of kernels that computes it."""
        return kernels

    def forward(self, target: Target) -> Callable:
        return functools.partial(replay_forward, self.kernels.load(self.implementation, target), self.replay)

    def backward(self, target: Target) -> Callable:
        kernel = self.kernels.load(self.implementation, target)
        return functools.partial(replay_backward, kernel, self.replay, in_place=self.adds_in_place)

    @property
    def adds_in_place(self) -> bool:
        """Whether the kernel adds dK and dV to their sums."""
        return self.kernels.has_fused_backward(self.implementation, self.case.head_dim)

    def arriving(self, of_array: Callable[[jax.ShapeDtypeStruct], Any]) -> list[Any]:
        """What `backward` takes last: by owner, what its steps add to, but for those that begin sums.

        In a loop all begin some.
        """
        if self.replay.is_loop:
            return [None] * self.replay.num_shards
        shape = self.shapes()["sums"]
        begun = self.replay.begun if self.adds_in_place else self.replay.owners[:1]
        half = jax.ShapeDtypeStruct((shape.shape[0], *shape.shape[2:]), shape.dtype)
        each = (lambda: of_array(shape)) if self.adds_in_place else (lambda: (of_array(half), of_array(half)))
        return [None if owner in begun else each() for owner in range(self.replay.num_shards)]

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        case, shards = self.case, self.replay.num_shards
        query = (case.batch, case.seq_len // shards, case.num_heads, case.head_dim)
        block = (case.batch, case.seq_len // shards, case.num_kv_heads, case.head_dim)
        dtype = jnp.dtype(case.dtype)
        return {
            "query": jax.ShapeDtypeStruct(query, dtype),
            "blocks": jax.ShapeDtypeStruct((shards, *block), dtype),
            "lse": jax.ShapeDtypeStruct((query[0], query[2], query[1]), jnp.float32),
            "sums": jax.ShapeDtypeStruct((block[0], 2, *block[1:]), jnp.float32),
        }

    @property
    def rank_flops(self) -> float:
        """Forward operations of this rank: the pairs its queries see, counted exactly."""
        case, shards = self.case, self.replay.num_shards
        pairs = float(case.seq_len) * (case.seq_len // shards)
        if case.is_causal:
            own = np.asarray(self.replay.positions(self.replay.rank, case.seq_len // shards), np.float64)
            pairs = float(own.sum() + own.size)
        return 4 * case.batch * pairs * case.num_heads * case.head_dim


def whole(implementation: str, case: Case) -> Program:
    """Attention in one block."""
    return Program(implementation, case, Replay(layout="contiguous", is_causal=case.is_causal))


def of_rank(implementation: str, case: Case, replay: Replay) -> Program:
    """What a rank of a ring on one host computes, with as many blocks a step as that ring takes."""
    shard_len = case.seq_len // replay.num_shards
    shapes = [(case.batch, shard_len, heads, case.head_dim) for heads in (case.num_heads, case.num_kv_heads)]
    steps = RingSteps.of(
        *(implementation, *shapes),
        size=replay.num_shards,
        layout=replay.layout,
        is_causal=case.is_causal,
        has_segments=case.segments != "none",
        is_in_one_process=True,
    )
    return Program(implementation, case, dataclasses.replace(replay, given_steps=steps))


def programs(implementations: list[str]) -> list[Program]:
    """Everything of ours that is timed: whole attention, and each rank's replay named in `cases.REPLAYS`."""
    plain = [whole(i, case) for case in KERNEL_BENCHMARKS for i in implementations]
    replays = [
        of_rank(i, case, Replay(shards, rank, "zigzag", case.is_causal))
        for case, shards in REPLAYS
        for rank in (0, shards // 2, shards - 1)
        for i in implementations
    ]
    return plain + replays + [whole(i, c) for c in GRID_BENCHMARKS for i in implementations if i == "mosaic_gpu"]


def precision_programs(implementations: list[str]) -> list[Program]:
    """The last rank of contiguous rings, as `cases.PRECISION` says: what `tests/gpu` looks at for drift."""
    return [
        Program(i, case, Replay(shards, shards - 1, "contiguous", case.is_causal))
        for case, shards in PRECISION
        for i in implementations
    ]


def export_programs(folder: Path, target: Target, implementations: list[str], only: str) -> None:
    """Compiles programs to files that run on a GPU machine whose Triton jax-triton does not know."""
    folder.mkdir(parents=True, exist_ok=True)
    for program in programs(implementations) + precision_programs(implementations):
        if only not in program.name:
            continue
        s = program.shapes()
        forward_args = (s["query"], s["blocks"], s["blocks"])
        backward_args = (*forward_args, s["query"], s["lse"], s["query"], program.arriving(lambda shape: shape))
        for kind, fn, args in (
            ("forward", program.forward(target), forward_args),
            ("backward", program.backward(target), backward_args),
        ):
            # A Triton kernel is a custom call that jax cannot promise to read back years later; this run will.
            unchecked = [jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi")]
            exported = jax.export.export(jax.jit(fn), platforms=["cuda"], disabled_checks=unchecked)(*args)
            (folder / f"{program.name}-{kind}.bin").write_bytes(exported.serialize())
            print("exported", program.name, kind, flush=True)


def ours(program: Program, target: Target, artifacts: Path | None) -> Callable[..., Passes]:
    """A builder like those of `PEERS` for one of our programs, from an artifact if it has one."""

    def load(kind: str, fn: Callable) -> Callable:
        path = artifacts / f"{program.name}-{kind}.bin" if artifacts else None
        if path is not None and path.exists():
            return jax.export.deserialize(bytearray(path.read_bytes())).call
        return fn

    def build(case: Case, query: Array, keys: Array, values: Array, d_out: Array) -> Passes:
        forward = jax.jit(load("forward", program.forward(target)))
        backward = _Repeated.jit(load("backward", program.backward(target)))
        output, lse = forward(query, keys, values)
        return Passes(
            lambda: forward(query, keys, values),
            _Repeated(program, functools.partial(backward, query, keys, values, output, lse, d_out)),
        )

    return build


class _Repeated:
    """A backward pass whose sums of dK and dV arrive, as in a ring, in arrays that it may write into.

    They are zeros the first time, and then those that it gave the last time, so that they grow with every run.
    """

    def __init__(self, program: Program, backward: Callable[[list[Any]], tuple[Array, list[Any], list[Any]]]):
        self._backward = backward
        self._arriving = program.arriving(lambda sums: jnp.zeros(sums.shape, sums.dtype))

    @staticmethod
    def jit(backward: Callable[..., tuple[Array, list[Any]]]) -> Callable[..., tuple[Array, list[Any], list[Any]]]:
        """`backward`, donated what arrives; its shares in two lists of all owners: what arrived, and what it began.

        jax gives each argument's memory to the first result left of its shape, and XLA copies what is to lie in
        another's. So what arrives comes back first, in the same order.
        """

        def run(*args: Any) -> tuple[Array, list[Any], list[Any]]:
            dq, shares = backward(*args)
            arrives = [x is not None for x in args[-1]]
            arrived, begun = (
                [x if a == is_first else None for a, x in zip(arrives, shares, strict=True)]
                for is_first in (True, False)
            )
            return dq, arrived, begun

        return jax.jit(run, donate_argnums=6)

    def __call__(self) -> tuple[Array, list[Any]]:
        dq, self._arriving, begun = self._backward(self._arriving)
        return dq, [b if x is None else x for x, b in zip(self._arriving, begun, strict=True)]


def draw(program: Program) -> tuple[Array, ...]:
    """Random arrays of a program: queries, all shards' keys and values, and a cotangent."""
    s = program.shapes()
    seeds = jax.random.split(jax.random.key(0), 4)
    shapes = (s["query"], s["blocks"], s["blocks"], s["query"])
    return tuple(jax.random.normal(seed, x.shape, x.dtype) for seed, x in zip(seeds, shapes, strict=True))


class Candidate(NamedTuple):
    """One row to be: whose kernel, of which program, built how, from which arrays."""

    program: Program
    name: str
    build: Callable[..., Passes]
    arrays: tuple[Array, ...]
    gate: Gate


def measure(candidates: list[Candidate], rest: float = 0.0) -> list[dict[str, Any]]:
    """A row each: errors first, then times, the candidates taking turns. A failure is a row that says why."""
    rows, jobs = [], []
    for program, name, build, arrays, gate in candidates:
        case, replay = program.case, program.replay
        row: dict[str, Any] = {"implementation": name, "case": case.label}
        row |= {"shards": replay.num_shards, "rank": replay.rank}
        rows.append(row)
        try:
            passes = build(case, *arrays)
            errors = gate.errors(passes)
            row |= errors._asdict()
            if not errors.is_allowed:
                wrong = f"error {errors.error:.3g} of {errors.error_of} exceeds {errors.allowed:.3g}"
                raise ValueError(f"wrong result: {wrong}")
        except Exception as error:  # whatever a peer raises becomes its row
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            continue
        jobs.append((row, "forward", program.rank_flops, Job(passes.forward, passes.wait)))
        if passes.backward is not None:
            jobs.append((row, "backward", 2.5 * program.rank_flops, Job(passes.backward, passes.wait)))
    times = median_seconds([job for *_, job in jobs], rest)
    for (row, kind, flops, _), seconds in zip(jobs, times, strict=True):
        row |= {f"{kind}_ms": 1e3 * seconds, f"{kind}_tflops": flops / seconds / 1e12}
    return rows


def run(
    implementations: list[str], peers: list[str], artifacts: Path | None, only: str, rest: float
) -> Iterator[list[dict[str, Any]]]:
    """All rows, as they come: those of one case, which took turns, together."""
    target = Target.of_device(jax.devices()[0])

    def candidates_of(programs: list[Program], arrays: tuple[Array, ...], gate: Gate) -> list[Candidate]:
        return [Candidate(p, p.implementation, ours(p, target, artifacts), arrays, gate) for p in programs]

    chosen = [program for program in programs(implementations) if only in program.name]
    for (case, replay), group in itertools.groupby(chosen, key=lambda program: (program.case, program.replay)):
        group = list(group)
        arrays = draw(group[0])
        gate = Gate(case, replay, arrays)
        candidates = candidates_of(group, arrays, gate)
        if replay.num_shards == 1:
            # Peers take one block and no leading dim.
            flat = (arrays[0], arrays[1][0], arrays[2][0], arrays[3])
            beside = [name for name in peers if case not in GRID_BENCHMARKS or name == "jax cuDNN"]
            peers_of_case = [Candidate(group[0], peer, PEERS[peer], flat, gate) for peer in beside]
            yield measure(peers_of_case + candidates, rest)
        else:
            blocks = [whole(program.implementation, ONE_BLOCK) for program in group]
            drawn = draw(blocks[0])
            of_blocks = Gate(ONE_BLOCK, blocks[0].replay, drawn)
            rows = measure(candidates + candidates_of(blocks, drawn, of_blocks), rest)
            yield [_beside_one_block(*pair) for pair in zip(rows[: len(group)], rows[len(group) :], strict=True)]


def _beside_one_block(ring: dict[str, Any], block: dict[str, Any]) -> dict[str, Any]:
    """A replay's row with the rates of one block, measured in turns with it, and its own as a fraction of those."""
    for kind in ("forward", "backward"):
        rate, ideal = ring.get(f"{kind}_tflops"), block.get(f"{kind}_tflops")
        if rate and ideal:
            ring |= {f"one_block_{kind}_tflops": ideal, f"{kind}_of_ideal": rate / ideal}
    return ring


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Beside every row, its rate over jax cuDNN's of the same case, and of both passes together."""
    by_case = {(r["implementation"], r["case"]): r for r in rows if r["shards"] == 1}
    for row in rows:
        for kind in ("forward", "backward"):
            rate = row.get(f"{kind}_tflops")
            base = by_case.get(("jax cuDNN", row["case"]), {}).get(f"{kind}_tflops")
            if rate and base and row["shards"] == 1:
                row[f"{kind}_over_cudnn"] = rate / base
        base = by_case.get(("jax cuDNN", row["case"]), {})
        if row["shards"] == 1 and "backward_ms" in row and "backward_ms" in base:
            ours, theirs = (r["forward_ms"] + r["backward_ms"] for r in (row, base))
            row["together_over_cudnn"] = theirs / ours


def draw_chart(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """A bar per implementation and case, forward and backward."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    everyones = {case.label for case in KERNEL_BENCHMARKS}
    rows = [row for row in rows if row["shards"] == 1 and row["case"] in everyones and "failed" not in row]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    figure, panels = plt.subplots(2, 1, figsize=(2 + 2.2 * len(cases), 8), sharex=True, layout="constrained")
    for panel, kind in zip(panels, ("forward", "backward"), strict=True):
        for n, name in enumerate(names):
            rates = {r["case"]: r.get(f"{kind}_tflops", math.nan) for r in rows if r["implementation"] == name}
            places = np.arange(len(cases)) + (n - (len(names) - 1) / 2) * 0.8 / len(names)
            panel.bar(places, [rates.get(c, math.nan) for c in cases], 0.8 / len(names), label=name)
        panel.set_ylabel(f"{kind}, TFLOP/s")
        panel.grid(axis="y", alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_title(title, loc="left")
    panels[0].legend(ncols=4, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.02))
    panels[1].set_xticks(range(len(cases)), [c.replace(" bfloat16", "").replace(" ", "\n", 2) for c in cases])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--implementations", nargs="+", default=None, choices=kernels.IMPLEMENTATIONS)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for JSON and chart")
    rest_help = "seconds before each sample; with 0 at the clock that the power limit leaves, as in training"
    parser.add_argument("--rest", type=float, default=REST_SECONDS, help=rest_help)
    parser.add_argument("--artifacts", type=Path, help="folder of exported programs to use where there is one")
    parser.add_argument("--export", type=Path, help="write the programs to this folder instead of running them")
    parser.add_argument("--gpu", default="h200", help="the GPU to export for, one of ring_jax.cluster.GPUS")
    parser.add_argument("--only", default="", help="only programs whose name contains this")
    options = parser.parse_args()
    if options.export:
        from ring_jax.cluster import compile_only_devices

        jax.config.update("jax_platforms", "cpu")
        target = Target.of_device(compile_only_devices(options.gpu, gpus_per_host=1)[0])
        export_programs(options.export, target, options.implementations or ["triton"], options.only)
        return
    if jax.devices()[0].platform != "gpu":
        raise SystemExit("benchmarks.kernels needs a GPU; benchmarks.schedule says what can be known without one")
    about = environment()
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"kernels-{about['device'].lower().replace(' ', '-')}"
    path = options.out / (name if options.rest else f"{name}-unrested")
    rows: list[dict[str, Any]] = []
    implementations = options.implementations or [i for i in kernels.IMPLEMENTATIONS if i != "xla"]
    for new in run(implementations, options.peers, options.artifacts, options.only, options.rest):
        rows += new
        add_ratios(rows)
        # After every case: whoever runs out of time keeps what was measured.
        path.with_suffix(".json").write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")
        for row in new:
            print(json.dumps(row), flush=True)
    draw_chart(rows, f"{about['device']}, jax {about['jax']}, {about['date']}", path.with_suffix(".png"))
    print("wrote", path.with_suffix(".json"), "and", path.with_suffix(".png"))


if __name__ == "__main__":
    main()
