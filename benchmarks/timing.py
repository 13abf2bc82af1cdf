"""Times of device programs: medians, and the device and versions they were measured on."""

import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

MIN_SECONDS = 0.05
REPEATS = 5
# A GPU at its power limit lowers its clock within a tenth of a second, the more the hotter the sample before was.
REST_SECONDS = 0.25


class Job(NamedTuple):
    """A function to time, and how to wait for its result."""

    run: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready


def median_seconds(jobs: Sequence[Job], rest: float = 0.0) -> list[float]:
    """Median time of one `run()` of each job in seconds, over `REPEATS` samples of `MIN_SECONDS`; see `samples`."""
    return [statistics.median(of_job) for of_job in samples(jobs, rest, seconds=MIN_SECONDS, rounds=REPEATS)]


def samples(jobs: Sequence[Job], rest: float, *, seconds: float, rounds: int) -> list[list[float]]:
    """Times of one `run()` of each job in seconds, in as many samples.

    The jobs take turns, a sample each. All samples are about equally long, `seconds` or one call of the slowest, and
    before each the device rests, `rest` seconds and at least as long as a sample: so a clock that falls with power and
    temperature falls for all of them alike. The calls of a sample are queued back to back and waited for once: launches
    hide under the work before them.
    """
    once = [_one_call(job) for job in jobs]
    seconds = max([seconds, *once])
    calls = [max(1, round(seconds / one)) for one in once]
    pause = max(rest, seconds) if rest else 0.0
    turns = [[_sample(job, n, pause) for job, n in zip(jobs, calls, strict=True)] for _ in range(rounds)]
    return [list(of_job) for of_job in zip(*turns, strict=True)]


def _one_call(job: Job) -> float:
    """Seconds of the third call."""
    job.wait(job.run())
    job.wait(job.run())
    return _sample(job, 1, 0.0)


def _sample(job: Job, calls: int, pause: float) -> float:
    time.sleep(pause)
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
