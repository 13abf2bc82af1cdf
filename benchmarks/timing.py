"""Times of device programs: medians, and the device and versions they were measured on."""

import datetime
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

MIN_SECONDS = 0.05
REPEATS = 7


def median_seconds(run: Callable[[], Any], *, wait: Callable[[Any], Any] = jax.block_until_ready) -> float:
    """Median time of one `run()` in seconds, over `REPEATS` samples of enough calls to fill `MIN_SECONDS` each.

    Calls are queued back to back and waited for once per sample, so that launches hide under the work before them.
    """
    wait(run())
    wait(run())
    start = time.perf_counter()
    wait(run())
    calls = max(1, round(MIN_SECONDS / (time.perf_counter() - start)))
    return statistics.median(_sample(run, wait, calls) for _ in range(REPEATS))


def _sample(run: Callable[[], Any], wait: Callable[[Any], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls - 1):
        run()
    wait(run())
    return (time.perf_counter() - start) / calls


def environment() -> dict[str, str]:
    """The device, the versions and the date, to stand beside every measurement."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "backend": device.client.platform_version.splitlines()[0],
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
