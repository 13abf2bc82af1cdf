"""Training steps on random tokens, to be timed."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ring_jax.data import Batch
from ring_jax.training import TrainState


def random_batch(batch: int, seq_len: int, vocab_size: int) -> Batch:
    """Rows of random tokens, each one document."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (batch, seq_len), np.int32)
    return Batch(tokens, np.roll(tokens, -1, axis=1), np.ones_like(tokens))


def median_step_seconds(run: Callable[..., Any], state: TrainState, batch: Any, *, steps: int, name: str) -> float:
    """Median seconds of a compiled training step over `steps` steps, after one that is not counted.

    Raises:
        ValueError: the loss is not finite: times and memory of such steps mean nothing. It tells the step's `name`.
    """
    seconds = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        state, metrics = run(state, batch)
        loss = float(metrics.loss)
        seconds.append(time.perf_counter() - began)
        if not math.isfinite(loss):
            raise ValueError(f"the loss of {name} is {loss}: what its step took means nothing")
    return statistics.median(seconds[1:])
