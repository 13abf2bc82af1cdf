"""How far from the float64 oracle a result may be. The one place that knows, for every implementation's tests.

error = max|x - x64| / max|x64|, and the budget is twice the error of dense attention in one piece, computed in float32
with the probabilities rounded to the input dtype (`reference_attention(low_precision=...)`), plus a constant.
"""

import numpy as np
from jaxtyping import Shaped

from benchmarks.cases import ERROR_CONSTANTS

# "Does not grow" means: at the most shards at most this many times the error at one, plus the constant.
GROWTH = 1.25


def error(x: Shaped[np.ndarray, "..."], exact: Shaped[np.ndarray, "..."]) -> float:
    """max|x - exact| / max|exact| where `exact` is finite; infinite where the two are not infinite at the same places.

    Where `exact` is all zeros (nothing attends to anything) only zeros have no error.
    """
    x, exact = np.asarray(x).astype(np.float64), np.asarray(exact, np.float64)
    assert x.shape == exact.shape, (x.shape, exact.shape)
    finite = np.isfinite(exact)
    if not np.array_equal(x[~finite], exact[~finite]) or not np.isfinite(x[finite]).all():
        return float("inf")
    largest = np.abs(exact[finite]).max(initial=0.0)
    difference = np.abs(x[finite] - exact[finite]).max(initial=0.0)
    if largest == 0:
        return float("inf") if difference else 0.0
    return float(difference / largest)


def allowed(baseline_error: float, dtype: str) -> float:
    """The largest error allowed to a result of that dtype, given what dense attention in one piece does."""
    return 2 * baseline_error + ERROR_CONSTANTS[dtype]


def assert_within_budget(x: np.ndarray, exact: np.ndarray, baseline: np.ndarray, dtype: str, name: str) -> None:
    """Fails, naming `name`, if `x` is further from `exact` than `allowed` given the dense `baseline`."""
    got, most = error(x, exact), allowed(error(baseline, exact), dtype)
    assert got <= most, f"{name}: error {got:.3g} exceeds its budget {most:.3g}"


def assert_does_not_grow(many_shards: float, one_shard: float, dtype: str, name: str) -> None:
    """Fails, naming `name`, if the error at the most shards exceeds the one at a single shard by more than agreed."""
    most = GROWTH * one_shard + ERROR_CONSTANTS[dtype]
    assert many_shards <= most, f"{name}: error {many_shards:.3g} at the most shards exceeds {most:.3g}"
