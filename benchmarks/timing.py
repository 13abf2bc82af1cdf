"""Times of device programs: medians, and the device and versions they were measured on."""

import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

MIN_SECONDS = 0.05
REPEATS = 7


class Job(NamedTuple):
    """A function to time, and how to wait for its result."""

    run: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready


def median_seconds(jobs: Sequence[Job]) -> list[float]:
    """Median time of one `run()` of each job in seconds, over `REPEATS` samples of enough calls to fill `MIN_SECONDS`.

    The jobs take turns, a sample each, so that a clock that changes with the device's temperature changes for all of
    them. The calls of a sample are queued back to back and waited for once: launches hide under the work before them.
    """
    calls = [_calls(job) for job in jobs]
    rounds = [[_sample(job, n) for job, n in zip(jobs, calls, strict=True)] for _ in range(REPEATS)]
    return [statistics.median(samples) for samples in zip(*rounds, strict=True)]


def _calls(job: Job) -> int:
    """How many calls fill a sample, judged by the third one."""
    job.wait(job.run())
    job.wait(job.run())
    return max(1, round(MIN_SECONDS / _sample(job, 1)))


def _sample(job: Job, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls - 1):
        job.run()
    job.wait(job.run())
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
