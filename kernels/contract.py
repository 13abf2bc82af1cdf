"""The block kernel contract: what every implementation computes, and the names it uses.

One block is the attention of one device's queries with one shard of keys and values. A forward kernel folds the block
into running state; a backward kernel gives that block's share of the gradients. Shapes use the letters of
`jax.nn.dot_product_attention`: B batch, T queries, S keys, N query heads, K key/value heads (K divides N), H head dim.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from .varying import match_varying


class AttentionState(NamedTuple):
    """Running result of attention over the keys seen so far (FlashAttention-2, arXiv:2307.08691, algorithm 1).

    The output is normalised: `output = sum_s exp(scores_s - lse) value_s` over the keys seen. A row that has seen no
    key has `output = 0` and `lse = -inf`. `lse` is the natural logarithm of the sum of exponentiated scaled scores.
    The output is float32 while blocks are still to come, and in the query's dtype after the last one.
    """

    output: Float[Array, "B T N H"]
    lse: Float32[Array, "B N T"]

    @classmethod
    def before_any_key(cls, query: Float[Array, "B T N H"]) -> "AttentionState":
        """The state that `None` stands for, for implementations that need it as arrays."""
        batch, num_queries, num_heads, _ = query.shape
        lse = jnp.full((batch, num_heads, num_queries), -jnp.inf, jnp.float32)
        return cls(*match_varying((jnp.zeros(query.shape, jnp.float32), lse), like=query))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMask:
    """Which query-key pairs of one block attend, said by positions and segment ids and never by a dense matrix.

    A pair is visible when `not is_causal or q_position >= k_position`, and, if segment ids are given, when both ids are
    equal and not 0 (0 is padding). Segment ids are given for both sides or for neither.

    With `block` the key positions are those of several blocks, of which this is one. Masks of one such stack differ in
    a number only: XLA sees what kernels compute from the positions as the same for all, and computes it once. Such a
    mask has no segment ids. Only implementations that `registry` says can index blocks are given one.

    `is_even` says that queries that see any key see about as many as others do, and keys likewise; of several blocks
    taken at once, queries of each half of the shard. It changes results by rounding only: kernels choose by it in what
    order and by how many programs their tiles are taken.
    """

    q_positions: Int32[Array, " T"]
    k_positions: Int32[Array, " S"] | Int32[Array, "blocks S"]
    q_segment_ids: Int32[Array, "B T"] | None
    k_segment_ids: Int32[Array, "B S"] | None
    is_causal: bool = dataclasses.field(metadata=dict(static=True))
    block: Int32[Array, ""] | None = None
    is_even: bool = dataclasses.field(default=False, metadata=dict(static=True))

    @property
    def has_uneven_tiles(self) -> bool:
        """Whether tiles of one side may see more of the other side than others do, documents apart."""
        return self.is_causal and not self.is_even

    def alone(self) -> "BlockMask":
        """This mask with the key positions of its own block only."""
        if self.block is None:
            return self
        k_positions = lax.dynamic_index_in_dim(self.k_positions, self.block, keepdims=False)
        return dataclasses.replace(self, k_positions=k_positions, block=None)

    def without(self, hidden_keys: Bool[Array, " S"]) -> "BlockMask":
        """This mask with some of the keys hidden from every query, so that a kernel skips their tiles."""
        assert self.block is None
        never = jnp.iinfo(jnp.int32).max
        if self.is_causal:
            return dataclasses.replace(self, k_positions=jnp.where(hidden_keys, never, self.k_positions))
        k_positions = jnp.where(hidden_keys, never, jnp.zeros_like(self.k_positions))
        return dataclasses.replace(
            self, q_positions=jnp.zeros_like(self.q_positions), k_positions=k_positions, is_causal=True
        )


# The keys or the values of a step: of one block, or of several that are taken at once.
type Blocks = Float[Array, "B S K H"] | tuple[Float[Array, "B S K H"], ...]
# Sums of dK and dV, of each of the step's blocks.
type Sums = Float32[Array, "B 2 S K H"] | tuple[Float32[Array, "B 2 S K H"], ...]


class Gradients(NamedTuple):
    """Gradients after one block: `dq` is the given `dq` plus this block's share, and `sums` the given `sums` plus its.

    `sums` holds dK and dV, of several blocks those of each. Where none were given they are a new pair of this block's:
    float32, or in the key's dtype if the block is the only one.
    """

    dq: Float32[Array, "B T N H"]
    sums: Sums | tuple[Float[Array, "B S K H"], Float[Array, "B S K H"]]

    @property
    def dk(self) -> Float[Array, "B S K H"]:
        """The gradient of the keys of one block, or their sum so far."""
        return self.sums[0] if isinstance(self.sums, tuple) else self.sums[:, 0]

    @property
    def dv(self) -> Float[Array, "B S K H"]:
        """The gradient of the values, likewise."""
        return self.sums[1] if isinstance(self.sums, tuple) else self.sums[:, 1]


class BlockKernel(Protocol):
    """What a module in this folder offers to be an implementation.

    `scale` multiplies query-key products. Inputs `query`, `key`, `value`, `d_out` share one dtype (float32, bfloat16,
    float16); all statistics and accumulators are float32, and float32 inputs are multiplied in float32, never TF32.
    Rows with nothing to attend to keep `output = 0`, `lse = -inf` and get zero, finite gradients.
    """

    def forward(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        state: AttentionState | None,
        mask: BlockMask,
        *,
        scale: float,
        is_last: bool = False,
    ) -> AttentionState:
        """Continues the online softmax of `state` over this block; an implementation updates `state` in place.

        `state` is None for the first block. After the last one (`is_last`) the output comes in the query's dtype: an
        implementation then need not write the float32 one.
        """
        ...

    def backward(
        self,
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K H"],
        d_out: Float[Array, "B T N H"],
        lse: Float32[Array, "B N T"],
        delta: Float32[Array, "B N T"],
        dq: Float32[Array, "B T N H"],
        sums: Float32[Array, "B 2 S K H"] | None,
        mask: BlockMask,
        *,
        scale: float,
        is_only: bool = False,
    ) -> Gradients:
        """This block's gradients from the final `lse` of the whole ring and `delta = rowsum(d_out * output) - d_lse`.

        The shares are added to the given `dq` and `sums`, in place where the implementation can. They begin as zeros,
        and the numbers of `dq` may lie in an order and have a scale that only the implementation knows:
        `finished_d_query` makes the gradient of it. `sums` are given where one kernel computes all gradients
        (`registry.has_fused_backward`). If the block is the only one (`is_only`), nothing will be added to its dK and
        dV, and they come in the key's dtype: an implementation then need not write the float32 ones.
        """
        ...

    def finished_d_query(self, dq: Float32[Array, "B T N H"], *, scale: float) -> Float32[Array, "B T N H"]:
        """The gradient of the queries, from the `dq` that `backward` has added the shares of all blocks to."""
        ...


class StepKernel(Protocol):
    """A block kernel that takes several blocks at once too, as steps of some rings do: what `registry.load` gives.

    Keys, values and sums are then tuples, and the mask has no segment ids and the key positions of all of the blocks,
    in the order of `several_blocks.folded`. `registry.prefers_several_blocks` says where that is faster.
    """

    def forward(
        self,
        query: Float[Array, "B T N H"],
        key: Blocks,
        value: Blocks,
        state: AttentionState | None,
        mask: BlockMask,
        *,
        scale: float,
        is_last: bool = False,
    ) -> AttentionState:
        """Like `BlockKernel.forward`."""
        ...

    def backward(
        self,
        query: Float[Array, "B T N H"],
        key: Blocks,
        value: Blocks,
        d_out: Float[Array, "B T N H"],
        lse: Float32[Array, "B N T"],
        delta: Float32[Array, "B N T"],
        dq: Float32[Array, "B T N H"],
        sums: Sums | None,
        mask: BlockMask,
        *,
        scale: float,
        is_only: bool = False,
    ) -> Gradients:
        """Like `BlockKernel.backward`. Of several blocks `sums` are given."""
        ...

    def finished_d_query(self, dq: Float32[Array, "B T N H"], *, scale: float) -> Float32[Array, "B T N H"]:
        """Like `BlockKernel.finished_d_query`."""
        ...


def unchanged_d_query(dq: Float32[Array, "B T N H"], *, scale: float) -> Float32[Array, "B T N H"]:
    """`BlockKernel.finished_d_query` of implementations whose `backward` adds to the gradient itself."""
    del scale
    return dq
