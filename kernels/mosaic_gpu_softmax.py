"""The online softmax of a warpgroup's rows, in registers (FlashAttention-2, arXiv:2307.08691, algorithm 1)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .mosaic_gpu_inline import exponents_below, sums_of_parts
from .mosaic_gpu_primitives import ROWS, across_columns, full

LOG2_E = math.log2(math.e)
# Weights up to 2^8 are as exact as weights up to 1, in float16 too: sums need not be rescaled for every new maximum.
_SLACK = 8.0
_LN_2 = math.log(2.0)


class TileWeights(NamedTuple):
    """What a key tile's values count: `weights`, beside earlier sums times `decay`.

    `early_sums`, over every eighth key, are those of the first 3/4 of the weights.
    """

    decay: Float[Array, " rows"]
    weights: Float[Array, "rows keys"]
    early_sums: Float[Array, "rows 8"]


class Softmax(NamedTuple):
    """What is kept of the scores: the largest of a row, in powers of two, and the sum of the weights."""

    maximum: Float[Array, " rows"]
    total: Float[Array, " rows"]

    def merged(self, other: "Softmax") -> tuple["Softmax", jax.Array, jax.Array]:
        """The state after the scores of both, and what to multiply either's sums with so that they add up."""
        maximum = jnp.maximum(self.maximum, other.maximum)
        base = jnp.where(maximum == -jnp.inf, 0.0, maximum)
        own, others = jnp.exp2(self.maximum - base), jnp.exp2(other.maximum - base)
        return Softmax(maximum, self.total * own + other.total * others), own, others


class RunningSoftmax(NamedTuple):
    """A `Softmax` of the scores so far. The total is in parts, of every eighth key each, lest threads exchange them."""

    maximum: Float[Array, " rows"]
    parts: Float[Array, "rows 8"]

    @classmethod
    def of_nothing(cls, rows: int) -> "RunningSoftmax":
        return cls(full((rows,), -jnp.inf, ROWS), full((rows, 8), 0))

    def update(
        self, products: jax.Array, mask: jax.Array | None, exponent_scale: float
    ) -> tuple["RunningSoftmax", TileWeights]:
        """The state after one key tile, and the tile's weights."""
        if mask is not None:
            products = jnp.where(mask, products, -jnp.inf)
        maximum = jnp.maximum(self.maximum, products.max(axis=1) * exponent_scale)
        # A row without any visible key so far has the maximum -inf: subtract zero there instead.
        base = jnp.where(maximum == -jnp.inf, 0.0, maximum)
        decay = jnp.exp2(self.maximum - base)
        return self._after(maximum, decay, products * exponent_scale - across_columns(base, products.shape))

    def update_visible(self, products: jax.Array, exponent_scale: float) -> tuple["RunningSoftmax", TileWeights]:
        """`update` with a tile without a mask. The maximum may stay below the true one, by no more than `_SLACK`."""
        exponents, maximum, decay = exponents_below(products, self.maximum, exponent_scale, limit=_SLACK)
        return self._after(maximum, decay, exponents)

    def _after(
        self, maximum: jax.Array, decay: jax.Array, exponents: jax.Array
    ) -> tuple["RunningSoftmax", TileWeights]:
        weights = jnp.exp2(exponents)
        early_sums, parts = sums_of_parts(weights)
        parts += self.parts * across_columns(decay, parts.shape)
        return RunningSoftmax(maximum, parts), TileWeights(decay, weights, early_sums)

    def whole(self) -> Softmax:
        """The softmax, by adding the parts."""
        return Softmax(self.maximum, self.parts.sum(axis=1))


def merge_weights(softmax: Softmax, old_lse: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What to multiply a block's own sums and the running output with so that they add up, and the new lse."""
    old = old_lse * LOG2_E
    maximum = jnp.maximum(softmax.maximum, old)
    base = jnp.where(maximum == -jnp.inf, 0.0, maximum)
    new_weight, old_weight = jnp.exp2(softmax.maximum - base), jnp.exp2(old - base)
    total = softmax.total * new_weight + old_weight
    norm = 1.0 / jnp.where(total == 0.0, 1.0, total)
    return new_weight * norm, old_weight * norm, (base + jnp.log2(total)) * _LN_2


def normalizer(softmax: Softmax) -> tuple[jax.Array, jax.Array]:
    """What to multiply the sums of a block alone with, and its lse."""
    norm = 1.0 / jnp.where(softmax.total == 0.0, 1.0, softmax.total)
    return norm, (softmax.maximum + jnp.log2(softmax.total)) * _LN_2
