"""Takes the rates that `benchmarks.kernels` measured into the planner's table.

    python -m benchmarks.rates benchmarks/results/kernels-nvidia-h200.json --gpu h200

Rows of ring_jax's own kernels on one device replace those of the same kernel, shape and GPU; other projects' kernels
and failed rows are left out.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from ring_jax import IMPLEMENTATIONS
from ring_jax.cluster import GPUS

from .cases import KERNEL_BENCHMARKS

TABLE = Path(__file__).parent.parent / "ring_jax" / "planning" / "rates.json"
_SAME = (
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


@dataclasses.dataclass(frozen=True)
class Config:
    """Merge measured kernel rates into the planner's rates.json."""

    results: tyro.conf.Positional[Path]
    gpu: str
    """Which GPU they were measured on, one of ring_jax.cluster.GPUS."""
    table: Annotated[Path, tyro.conf.arg(metavar="FILE")] = TABLE


def measured_rates(results: dict[str, Any], gpu: str) -> list[dict[str, Any]]:
    """The rows of rates.json that a file of `benchmarks.kernels` gives."""
    about = results["environment"]
    cases = {case.label: case for case in KERNEL_BENCHMARKS}
    rates = []
    for row in results["rows"]:
        case = cases.get(row["case"])
        if case is None or row["implementation"] not in IMPLEMENTATIONS or row["shards"] != 1 or "failed" in row:
            continue
        shape = {
            "dtype": case.dtype,
            "batch": case.batch,
            "tokens": case.seq_len,
            "num_heads": case.num_heads,
            "num_kv_heads": case.num_kv_heads,
            "head_dim": case.head_dim,
            "is_causal": case.is_causal,
        }
        for direction in ("forward", "backward"):
            if tflops := row.get(f"{direction}_tflops"):
                kernel = dict(operation="attention", direction=direction, implementation=row["implementation"], gpu=gpu)
                source = dict(date=about["date"], versions=f"jax {about['jax']}", source="benchmarks.kernels")
                rates.append(kernel | shape | {"tflops": round(tflops, 1)} | source)
    return rates


def merge(table: dict[str, Any], rates: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`table` with `rates`, each in the place of the row it measures again."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in _SAME)

    new = {key(row) for row in rates}
    return table | {"rates": [row for row in table["rates"] if key(row) not in new] + list(rates)}


def write(table: dict[str, Any], path: Path) -> None:
    """One row a line, so that a change shows as one."""
    lists = [f' "{name}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in table[name]) + "\n ]" for name in table]
    path.write_text("{\n" + ",\n".join(lists) + "\n}\n", encoding="utf-8")


def main(args: Sequence[str] | None = None) -> None:
    """Merges and says how many rates were taken."""
    config = tyro.cli(Config, args=args)
    if config.gpu not in GPUS:
        raise SystemExit(f"error: unknown GPU {config.gpu!r}: choose one of {', '.join(GPUS)}")
    rates = measured_rates(json.loads(config.results.read_text(encoding="utf-8")), config.gpu)
    write(merge(json.loads(config.table.read_text(encoding="utf-8")), rates), config.table)
    print(f"{len(rates)} rates taken into {config.table.name}")


if __name__ == "__main__":
    main()
