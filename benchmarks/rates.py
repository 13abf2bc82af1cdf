"""Takes the rates that `benchmarks.kernels` measured into the planner's table, and checks the time model by them.

    python -m benchmarks.rates benchmarks/results/kernels-nvidia-h200-unrested.json --gpu h200

A training step gives the GPU no rest, so the rates to take are those of `benchmarks.kernels --rest 0`.
Rows of ring_jax's own kernels on one device replace those of the same kernel, shape and GPU; other projects' kernels
and failed rows are left out. Then every measurement in the table is printed beside what the time model says without it.
"""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from ring_jax import IMPLEMENTATIONS
from ring_jax.cluster import GPUS
from ring_jax.planning.rates import Check, check_rates

from .cases import KERNEL_BENCHMARKS, REPLAYS, Case

TABLE = Path(__file__).parent.parent / "ring_jax" / "planning" / "rates.json"
_SAME_KERNEL = (
    "operation",
    "direction",
    "implementation",
    "gpu",
    "tokens",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "is_causal",
)
_SAME_REPLAY = (
    "direction",
    "implementation",
    "gpu",
    "num_shards",
    "rank",
    "tokens_per_gpu",
    "num_heads",
    "num_kv_heads",
    "head_dim",
)
_DIRECTIONS = ("forward", "backward")


@dataclasses.dataclass(frozen=True)
class Config:
    """Merge measured kernel rates into the planner's rates.json."""

    results: tyro.conf.Positional[Path]
    gpu: str
    """Which GPU they were measured on, one of ring_jax.cluster.GPUS."""
    table: Annotated[Path, tyro.conf.arg(metavar="FILE")] = TABLE


def measured_rates(results: dict[str, Any], gpu: str) -> list[dict[str, Any]]:
    """The rows of rates.json's "rates" that a file of `benchmarks.kernels` gives."""
    found = []
    for row, case in _own_rows(results, KERNEL_BENCHMARKS):
        shape = {
            "dtype": case.dtype,
            "batch": case.batch,
            "tokens": case.seq_len,
            "num_heads": case.num_heads,
            "num_kv_heads": case.num_kv_heads,
            "head_dim": case.head_dim,
            "is_causal": case.is_causal,
        }
        for direction in _DIRECTIONS:
            if row["shards"] == 1 and f"{direction}_tflops" in row:
                found.append({"operation": "attention"} | _rate(results, row, direction, gpu, shape))
    return found


def measured_replays(results: dict[str, Any], gpu: str) -> list[dict[str, Any]]:
    """The rows of rates.json's "replays" that a file of `benchmarks.kernels` gives."""
    found = []
    for row, case in _own_rows(results, [case for case, _ in REPLAYS]):
        shape = {
            "num_shards": row["shards"],
            "rank": row["rank"],
            "tokens_per_gpu": case.seq_len // row["shards"],
            "num_heads": case.num_heads,
            "num_kv_heads": case.num_kv_heads,
            "head_dim": case.head_dim,
        }
        for direction in _DIRECTIONS:
            if row["shards"] > 1 and f"{direction}_tflops" in row:
                found.append(_rate(results, row, direction, gpu, shape))
    return found


def _own_rows(results: dict[str, Any], cases: Sequence[Case]) -> list[tuple[dict[str, Any], Case]]:
    """Rows of these cases by our kernels that did not fail."""
    by_label = {case.label: case for case in cases}
    rows = (row for row in results["rows"] if row["implementation"] in IMPLEMENTATIONS and "failed" not in row)
    return [(row, by_label[row["case"]]) for row in rows if row["case"] in by_label]


def _rate(
    results: dict[str, Any], row: dict[str, Any], direction: str, gpu: str, shape: dict[str, Any]
) -> dict[str, Any]:
    about = results["environment"]
    kernel = dict(direction=direction, implementation=row["implementation"], gpu=gpu)
    source = dict(date=about["date"], versions=f"jax {about['jax']}", source="benchmarks.kernels")
    return kernel | shape | {"tflops": round(row[f"{direction}_tflops"], 1)} | source


def merge(
    table: dict[str, Any], rates: Sequence[dict[str, Any]], replays: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """`table` with new rows, each in the place of the row it measures again."""

    def merged(name: str, rows: Sequence[dict[str, Any]], same: Sequence[str]) -> list[dict[str, Any]]:
        new = {tuple(row.get(key) for key in same) for row in rows}
        return [row for row in table[name] if tuple(row.get(key) for key in same) not in new] + list(rows)

    kernels, whole = ("rates", rates, _SAME_KERNEL), ("replays", replays, _SAME_REPLAY)
    return table | {found[0]: merged(*found) for found in (kernels, whole)}


def write(table: dict[str, Any], path: Path) -> None:
    """One row a line, so that a change shows as one."""
    lists = [f' "{name}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in table[name]) + "\n ]" for name in table]
    path.write_text("{\n" + ",\n".join(lists) + "\n}\n", encoding="utf-8")


def main(args: Sequence[str] | None = None) -> None:
    """Merges, says how many rows were taken, and prints the time model's errors."""
    config = tyro.cli(Config, args=args)
    if config.gpu not in GPUS:
        raise SystemExit(f"error: unknown GPU {config.gpu!r}: choose one of {', '.join(GPUS)}")
    results = json.loads(config.results.read_text(encoding="utf-8"))
    rates, replays = measured_rates(results, config.gpu), measured_replays(results, config.gpu)
    write(merge(json.loads(config.table.read_text(encoding="utf-8")), rates, replays), config.table)
    print(f"{len(rates)} rates and {len(replays)} replays taken into {config.table.name}")
    if config.table == TABLE:
        Console(highlight=False).print(_check_table(check_rates()), soft_wrap=True)


def _check_table(checks: Sequence[Check]) -> Table:
    """Every measurement beside what the time model says of it, the worst last."""
    errors = [abs(check.error) for check in checks]
    title = f"time model against {len(checks)} measurements: median error {statistics.median(errors):.1%}"
    table = Table(title=title, title_justify="left")
    table.add_column("measurement, TFLOP/s unless it says so")
    for column in ("predicted", "measured", "error"):
        table.add_column(column, justify="right")
    for check in sorted(checks, key=lambda check: abs(check.error)):
        table.add_row(check.what, f"{check.predicted:.3g}", f"{check.measured:.3g}", f"{check.error:+.1%}")
    return table


if __name__ == "__main__":
    main()
