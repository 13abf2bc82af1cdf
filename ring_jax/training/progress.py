"""What the user sees while it trains: a bar on a terminal, a line now and then in a file or a pipe."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

_SECONDS_BETWEEN_LINES = 10.0
_ETA_SECONDS = 120.0


class TrainProgress:
    """Shows steps as they are made: loss, tokens/s, step time and time left.

    with TrainProgress(console, first=0, steps=100) as progress:
        progress.step(metrics)
    """

    def __init__(self, console: Console, *, first: int, steps: int):
        self._console = console
        self._steps = steps
        self._last_line = -float("inf")
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(),
            _Metrics(table_column=Column(no_wrap=True)),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,
            speed_estimate_period=_ETA_SECONDS,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("training", total=steps, completed=first)
        self._first = first
        self._seconds = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def step(self, metrics: dict[str, Any]) -> None:
        """Shows one entry of metrics.jsonl."""
        done = metrics["step"]
        self._seconds += metrics["step_seconds"]
        self._bar.update(self._task, completed=done, metrics=format_metrics(metrics))
        if self._console.is_terminal:
            return
        now = time.monotonic()
        if done in (self._first + 1, self._steps) or now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = (self._steps - done) * self._seconds / (done - self._first)
            self.say(
                f"step {done}/{self._steps}  {format_metrics(metrics)}  ETA {int(left) // 60}:{int(left) % 60:02d}"
            )

    def say(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)


class _Metrics(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(task.fields.get("metrics", ""), style="cyan")


def format_metrics(metrics: dict[str, Any]) -> str:
    """Loss, speed and step time in a few words."""
    return (
        f"loss {metrics['loss']:.3f}  {format_count(metrics['tokens_per_second'])} tokens/s  "
        f"{metrics['step_seconds']:.2f} s/step"
    )


def format_count(number: float) -> str:
    """Three digits and a unit: 410K, 8.03B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
