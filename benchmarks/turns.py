"""Two forms of our kernels in turns on one GPU: those of another checkout, and this one's.

    git worktree add ../before HEAD~1
    python -m benchmarks.turns ../before --only B1_T8K_N32_K8 --directions backward

Clocks and cards differ by more than most changes bring, so a change is judged in one process, a sample of each form by
turns, after the results of both were compared with float64 (`benchmarks.gate`). What is told is the rate over the one
before: of all pairs of samples the median, the lowest and the highest. Short samples run at the clock that a rested GPU
begins with, long ones at the one that its power limit leaves. A change may help in one and not in the other: both are
timed. The programs are those of `benchmarks.kernels`, whole attention and replayed rings, chosen by their names.
"""

import dataclasses
import importlib.util
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import jax
import tyro
from rich.console import Console
from rich.table import Table

from ring_jax.kernels import Target

from .gate import Gate
from .kernels import Program, draw, ours, programs
from .timing import REST_SECONDS, Job, environment, samples

_FORMS = ("before", "after")
_IMPLEMENTATION, OTHER = "mosaic_gpu", "kernels_before"


@dataclasses.dataclass(frozen=True)
class Config:
    """Time the kernels of another checkout and of this one in turns."""

    before: Annotated[Path, tyro.conf.Positional]
    """The other checkout: the folder that its `kernels` folder is in."""
    only: str = ""
    """Only programs whose name contains this."""
    directions: tuple[Literal["forward", "backward"], ...] = ("forward", "backward")
    seconds: tuple[float, ...] = (0.05, 0.15)
    """How long samples are."""
    rounds: int = 5
    """Samples of each form."""
    out: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Where to write the rows as JSON. None: print only."""


@dataclasses.dataclass(frozen=True)
class OtherProgram(Program):
    """A program by the kernels of another checkout, imported as `package`."""

    package: str = ""

    @property
    def kernels(self) -> ModuleType:
        return sys.modules[self.package]


def import_kernels(checkout: Path, package: str) -> None:
    """Imports a checkout's kernels beside this one's, under another name; within themselves they import relatively.

    What was imported as `package` before is forgotten.

    Raises:
        ValueError: there are no kernels.
    """
    path = checkout / "kernels" / "__init__.py"
    if not path.is_file():
        raise ValueError(f"{checkout} is no checkout of this project: it has no kernels/__init__.py")
    spec = importlib.util.spec_from_file_location(package, path, submodule_search_locations=[str(path.parent)])
    assert spec is not None
    assert spec.loader is not None
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        del sys.modules[name]
    sys.modules[package] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def compare(program: Program, config: Config, target: Target) -> Iterator[dict[str, Any]]:
    """A row for each direction and length of samples.

    Raises:
        ValueError: a form's result is wrong.
    """
    # Kernels without this function are given one block at a time, also those that could take two.
    knows_several = hasattr(sys.modules[OTHER], "prefers_several_blocks")
    replay = dataclasses.replace(program.replay, given_steps=program.replay.steps if knows_several else None)
    other = OtherProgram(program.implementation, program.case, replay, package=OTHER)
    arrays = draw(program)
    gate = Gate(program.case, program.replay, arrays)
    forms = [ours(form, target, None)(program.case, *arrays) for form in (other, program)]
    for name, passes in zip(_FORMS, forms, strict=True):
        errors = gate.errors(passes)
        if not errors.is_allowed:
            raise ValueError(f"{program.name}, {name}: error {errors.error:.3g} of {errors.error_of} is too large")
    for direction in config.directions:
        jobs = [Job(getattr(passes, direction), passes.wait) for passes in forms]
        flops = program.rank_flops * (1.0 if direction == "forward" else 2.5)
        for seconds in config.seconds:
            times = samples(jobs, max(REST_SECONDS, seconds), seconds=seconds, rounds=config.rounds)
            ratios = [before / after for before, after in zip(*times, strict=True)]
            row: dict[str, Any] = {"program": program.name, "direction": direction, "seconds": seconds}
            for name, of_form in zip(_FORMS, times, strict=True):
                median = statistics.median(of_form)
                row |= {f"{name}_ms": 1e3 * median, f"{name}_tflops": flops / median / 1e12}
            yield row | {"rate_over_before": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def main(args: Sequence[str] | None = None) -> int:
    """Prints a table and writes the file; returns the exit status: 0, 1 for a wrong result, 2 for what cannot be."""
    config = tyro.cli(Config, args=args)
    console = Console(highlight=False, markup=False)
    every = programs([_IMPLEMENTATION])
    chosen = [program for program in every if config.only in program.name]
    try:
        import_kernels(config.before, OTHER)
        if not chosen:
            names = "".join(f"\n{program.name}" for program in every)
            raise ValueError(f"no program's name contains {config.only!r}; there are{names}")
        if jax.default_backend() != "gpu":
            raise ValueError("benchmarks.turns needs a GPU; benchmarks.registers says what can be known without one")
    except ValueError as error:
        console.print(f"error: {error}", soft_wrap=True)
        return 2
    target = Target.of_device(jax.devices()[0])
    rows: list[dict[str, Any]] = []
    try:
        for program in chosen:
            for row in compare(program, config, target):
                rows.append(row)
                console.print(f"{row['program']} {row['direction']}: {row['rate_over_before']:.3f}", soft_wrap=True)
    except ValueError as error:
        console.print(f"error: {error}", soft_wrap=True)
        return 1
    finally:  # what was measured before something failed is worth as much
        if rows:
            _report(console, rows, config.out)
    return 0


def _report(console: Console, rows: Sequence[dict[str, Any]], out: Path | None) -> None:
    about = environment()
    table = Table(title=f"rates over before, {about['device']}", title_justify="left")
    for column in ("program", "pass", "samples, s", "before TFLOP/s", "after TFLOP/s", "rate over before"):
        table.add_column(column, justify="left" if column in ("program", "pass") else "right", overflow="fold")
    for row in rows:
        rates = (f"{row[f'{name}_tflops']:,.0f}" for name in _FORMS)
        ratio = f"{row['rate_over_before']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f})"
        table.add_row(row["program"], row["direction"], f"{row['seconds']:g}", *rates, ratio)
    console.print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"environment": about, "rows": list(rows)}, indent=1) + "\n", encoding="utf-8")
        console.print(f"wrote {out}", soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(main())
