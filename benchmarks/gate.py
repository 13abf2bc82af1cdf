"""Whether a result is right, before it is timed: sampled rows and keys of it, at the very shape, against float64.

Output and dQ of a row need all keys and that row alone. dK and dV of a key need all rows that see it: their logsumexps
and delta are computed here in float32, chunk by chunk, by code that shares nothing with the kernels.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32, Int, Int32

from ring_jax.kernels.reference import reference_attention, visible_pairs

from .cases import ERROR_CONSTANTS, Case
from .peers import Passes
from .replay import Replay

# A row or key of each of so many equal parts, and some of the last ones of either half: kernels treat those of the last
# tiles that see anything unlike others, and in a zigzag ring these may end with the first half.
_PARTS, _LAST_SAMPLED, _LAST = 24, 8, 512
# Scores held at a time while logsumexps are computed.
_MAX_SCORES = 2**28

# Output, dQ, dK and dV, as far as there are any.
type _Results = dict[str, np.ndarray]


class Errors(NamedTuple):
    """Largest error over the largest value, that of dense attention, the limit, and which result's error it is."""

    error: float
    dense_error: float
    allowed: float
    error_of: str

    @property
    def is_allowed(self) -> bool:
        """Not for NaN."""
        return self.error <= self.allowed


@dataclasses.dataclass(frozen=True, eq=False)
class Gate:
    """The truth about one case, for all who compute it. `arrays`: queries, all shards' keys and values, cotangent.

    `rows` of the rank's queries are looked at, drawn at random if not given; of the heads, the groups of the first and
    of the last key/value head; of a batch the first entry.
    """

    case: Case
    replay: Replay
    arrays: tuple[Array, ...]
    rows: tuple[int, ...] | None = None

    def row_errors(self, passes: Passes) -> Errors:
        """Errors of output or dQ on the sampled rows. The passes must have been built from `arrays`."""
        return self._row_errors(passes.forward(), None if passes.backward is None else passes.backward())

    def _row_errors(self, output: Any, gradients: Any) -> Errors:
        found = {"output": self._rows(_first(output))}
        if gradients is not None:
            found["dq"] = self._rows(_first(gradients))
        return self._worst(found, *self._dense_rows)

    def errors(self, passes: Passes) -> Errors:
        """Errors of output or a gradient, whichever is the worst, on the sampled rows and keys.

        Each pass is run once: a replay's second run adds to the gradients of the first.
        """
        output, gradients = passes.forward(), None if passes.backward is None else passes.backward()
        errors = [self._row_errors(output, gradients)]
        if gradients is not None:
            errors.append(self.key_errors(gradients))
        return max(errors, key=_excess)

    def key_errors(self, gradients: Any) -> Errors:
        """Errors of dK or dV on the sampled keys, in what a backward pass of the rank's queries gave."""
        dk, dv = _by_owner(gradients)
        return self._worst({"dk": self._keys(dk), "dv": self._keys(dv)}, *self._dense_keys)

    def _worst(self, found: _Results, exact: _Results, dense: _Results) -> Errors:
        """The errors of that result which is the nearest to its limit, or the farthest beyond."""

        def error(x: np.ndarray, exact: np.ndarray) -> float:
            return float(np.abs(x.astype(np.float64) - exact).max() / np.abs(exact).max())

        errors = []
        for name, x in found.items():
            of_dense = error(dense[name], exact[name])
            allowed = 2 * of_dense + ERROR_CONSTANTS[self.case.dtype]
            errors.append(Errors(error(x, exact[name]), of_dense, allowed, name))
        return max(errors, key=_excess)

    @property
    def _sampled_rows(self) -> np.ndarray:
        return _sample(self.arrays[0].shape[1]) if self.rows is None else np.asarray(self.rows)

    @property
    def _sampled_keys(self) -> np.ndarray:
        """Keys, counted through the blocks of all shards."""
        return _sample(self.case.seq_len)

    @property
    def _kv_heads(self) -> list[int]:
        return sorted({0, self.case.num_kv_heads - 1})

    @property
    def _heads(self) -> list[int]:
        group = self.case.num_heads // self.case.num_kv_heads
        return [kv * group + n for kv in self._kv_heads for n in range(group)]

    @property
    def _positions(self) -> tuple[Int[np.ndarray, " T"], Int[np.ndarray, " S"]]:
        """Positions of the rank's queries, and of the keys of all shards."""
        shards = [self.replay.positions(rank, self.arrays[0].shape[1]) for rank in range(self.replay.num_shards)]
        return np.asarray(shards[self.replay.rank]), np.concatenate(shards)

    def _rows(self, x: Array) -> np.ndarray:
        return np.asarray(x[:1, self._sampled_rows][:, :, np.asarray(self._heads)])

    def _keys(self, by_owner: list[Array]) -> Float[np.ndarray, "1 keys kv_heads H"]:
        """The sampled keys of arrays for every shard's block."""
        shard_len = self.case.seq_len // self.replay.num_shards
        owners, rows = np.divmod(self._sampled_keys, shard_len)
        # The same rows of every block, lest each block's number of rows be compiled for.
        every = np.stack([np.asarray(x[0, rows]) for x in by_owner])
        return every[owners, np.arange(len(rows))][None, :, self._kv_heads]

    @functools.cached_property
    def _dense_rows(self) -> tuple[_Results, _Results]:
        """Output and dQ of the rows in float64, and by dense attention in the case's dtype."""
        query, keys, values, d_out = self.arrays
        of_queries, of_keys = self._positions
        visible = visible_pairs(of_queries[self._sampled_rows], of_keys, is_causal=self.case.is_causal)
        k, v = (
            np.concatenate(np.asarray(x[:, :1][..., np.asarray(self._kv_heads), :]), axis=1) for x in (keys, values)
        )
        q, d_o = self._rows(query), self._rows(d_out)
        exact, dense = (
            reference_attention(q, k, v, visible, d_out=d_o, low_precision=p) for p in (None, np.dtype(self.case.dtype))
        )
        return {"output": exact.output, "dq": exact.dq}, {"output": dense.output, "dq": dense.dq}

    @functools.cached_property
    def _dense_keys(self) -> tuple[_Results, _Results]:
        """dK and dV of the keys in float64, and by dense attention in the case's dtype."""
        query, keys, values, d_out = self.arrays
        of_queries, of_keys = self._positions
        q, d_o = (x[:1, :, np.asarray(self._heads)] for x in (query, d_out))
        by_owner = [[*x] for x in (keys, values)]
        all_keys, all_values = (jnp.concatenate([x[0][:, np.asarray(self._kv_heads)] for x in xs]) for xs in by_owner)
        positions = jnp.asarray(of_queries), jnp.asarray(of_keys)
        is_causal = self.case.is_causal
        statistics = row_statistics(q[0], all_keys, all_values, d_o[0], *positions, is_causal=is_causal)
        k, v = (self._keys(xs) for xs in by_owner)
        visible = visible_pairs(of_queries, of_keys[self._sampled_keys], is_causal=is_causal)
        lse, delta = (np.asarray(x)[None] for x in statistics)
        q, d_o = np.asarray(q), np.asarray(d_o)
        exact, dense = (
            reference_attention(q, k, v, visible, d_out=d_o, low_precision=p, lse=lse, delta=delta)
            for p in (None, np.dtype(self.case.dtype))
        )
        return {"dk": exact.dk, "dv": exact.dv}, {"dk": dense.dk, "dv": dense.dv}


# Trying out matrix products takes longer than these take.
@functools.partial(jax.jit, static_argnames="is_causal", compiler_options={"xla_gpu_autotune_level": 0})
def row_statistics(
    query: Float[Array, "T N H"],
    key: Float[Array, "S K H"],
    value: Float[Array, "S K H"],
    d_out: Float[Array, "T N H"],
    q_positions: Int32[Array, " T"],
    k_positions: Int32[Array, " S"],
    *,
    is_causal: bool,
) -> tuple[Float32[Array, "N T"], Float32[Array, "N T"]]:
    """Logsumexp of every row's scores, and its sum of output times `d_out`, in float32."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[1]
    product = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
    key, value = key.astype(jnp.float32), value.astype(jnp.float32)

    def of_row(args):
        q, d_o, position = args
        q, d_o = (x.astype(jnp.float32).reshape(num_kv_heads, -1, head_dim) for x in (q, d_o))
        scores = product("kgh,skh->kgs", q, key) * head_dim**-0.5
        scores = jnp.where(position >= k_positions, scores, -jnp.inf) if is_causal else scores
        lse = jax.nn.logsumexp(scores, axis=-1)
        output = product("kgs,skh->kgh", jnp.exp(scores - lse[..., None]), value)
        return lse.reshape(-1), jnp.sum(output * d_o, axis=-1).reshape(-1)

    at_a_time = max(1, min(num_rows, _MAX_SCORES // (num_heads * len(key))))
    lse, delta = lax.map(of_row, (query, d_out, q_positions), batch_size=at_a_time)
    return lse.T, delta.T


def _sample(count: int) -> Int[np.ndarray, " sampled"]:
    rng = np.random.default_rng(0)
    parts = [rng.integers(part * count // _PARTS, (part + 1) * count // _PARTS) for part in range(_PARTS)]
    last = [rng.integers(max(0, end - _LAST), end, _LAST_SAMPLED) for end in (count // 2, count)]
    return np.concatenate([parts, *last])


def _excess(errors: Errors) -> float:
    excess = errors.error / errors.allowed
    return math.inf if math.isnan(excess) else excess


def _first(result: Any) -> Array:
    """A pass's output or dQ: alone, or the first of several."""
    return _jax_array(result[0] if isinstance(result, (tuple, list)) else result)


def _by_owner(gradients: Any) -> tuple[list[Array], list[Array]]:
    """dK and dV for every shard's block, from what a backward pass gives: ours dQ and a list, peers three arrays."""
    shares = gradients[1] if isinstance(gradients[1], list) else [gradients[1:3]]
    pairs = [x if isinstance(x, tuple) else (x[:, 0], x[:, 1]) for x in shares]
    return [_jax_array(dk) for dk, _ in pairs], [_jax_array(dv) for _, dv in pairs]


def _jax_array(x: Any) -> Array:
    """torch's are `[B, N, T, H]` tensors."""
    return x if isinstance(x, jax.Array) else jnp.asarray(x.transpose(1, 2).float().cpu().numpy())
