"""What the Hopper kernels are run with: tile sizes, what programs share, and the order of their work.

All of it was chosen by measuring on an H200; the runs are in `benchmarks/LOG.md`.
"""

import dataclasses

from jaxtyping import Array, Float

from .contract import BlockMask
from .mosaic_gpu_primitives import WARPGROUP_ROWS
from .mosaic_gpu_split import MULTIPROCESSORS, SplitCosts, Splits

BACKWARD_WARPGROUPS = 2
# Programs of unequal length for each multiprocessor: of a head where heads come one after the other, else of those that
# are taken together.
_ENOUGH_OF_A_HEAD, _ENOUGH_TOGETHER = 0.95, 1.9
_BACKWARD_COSTS = SplitCosts(program=4, sharing=1)
# The queries of a stretch, and the fewest steps of programs that go through a head's stretch by stretch.
_STRETCH_LEN, _STEPS_FOR_STRETCHES = 2048, 4096
# Shards of up to so many tokens are taken several at a time.
_SHORT_SHARD = 8192
# Of the 50 MB of an H100's and an H200's L2 cache, what keys and values find there again.
_L2_BYTES = 20 << 20


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """Tile sizes of the forward kernel.

    `q_tile` queries at a time, 64 for each compute warpgroup; `k_tile` keys per step; `stages` key and value tiles in
    shared memory. `early_state` gives the running output shared memory of its own, so that it is copied while keys are
    still computed with; without, a program takes one query tile only.
    """

    q_tile: int
    k_tile: int
    stages: int
    early_state: bool = True

    def __post_init__(self):
        if self.q_tile not in (128, 192):
            raise ValueError(f"q_tile must be 128 or 192 (64 rows for each of 2 or 3 warpgroups), got {self.q_tile}")
        if self.k_tile % 16 or not 16 <= self.k_tile <= 256:
            raise ValueError(f"k_tile must be a multiple of 16 up to 256, got {self.k_tile}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2, got {self.stages}")

    @property
    def compute_warpgroups(self) -> int:
        return self.q_tile // WARPGROUP_ROWS

    @property
    def can_round_merged(self) -> bool:
        """Whether an output merged with the running one can leave in the query's dtype, through the queries' place.

        Without `early_state` that is where the running output lies, and three warpgroups are short of registers.
        """
        return self.early_state and self.compute_warpgroups == 2

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread of the producer and of the compute warpgroups: they share 64 Ki."""
        return {2: (40, 232), 3: (32, 160)}[self.compute_warpgroups]


def default_forward_config(head_dim: int, *, has_segments: bool) -> ForwardConfig:
    """What is used for a block: the fastest of those measured on an H200 whose registers are not spilled."""
    if head_dim <= 64:
        return ForwardConfig(q_tile=128 if has_segments else 192, k_tile=128, stages=2)
    if head_dim <= 128:
        return ForwardConfig(q_tile=128, k_tile=128, stages=2)
    return ForwardConfig(q_tile=128, k_tile=64, stages=2, early_state=False)


def forward_has_ranges(mask: BlockMask, config: ForwardConfig) -> bool:
    """Whether query tiles that see anything take equally long or are of two lengths: the last ones' steps are shared.

    Three warpgroups are short of registers for it.
    """
    if mask.has_uneven_tiles or mask.q_segment_ids is not None:
        return False
    return config.early_state and config.compute_warpgroups == 2


def forward_waves(*, is_last: bool) -> int:
    """How many programs a multiprocessor runs one after the other, where one could take all that it has time for.

    While more blocks are to come, kernels that fetch them may wait for multiprocessors, and begin where a program ends.
    """
    return 1 if is_last else 2


def forward_heads_together(mask: BlockMask, query: Float[Array, "B T N H"], key: Float[Array, "B S K H"]) -> int:
    """How many heads' query tiles are taken side by side, the last tiles of all of them first.

    Tiles of one head side by side read the same keys and values, which then stay in the L2 cache. But on the diagonal
    of a causal mask tiles are of unequal length, and the longest of the last head would end late: as many heads are
    taken together as the cache holds the keys and values of, and for small head dims all of them.
    """
    if not mask.has_uneven_tiles:
        return 1
    batch, _, num_heads, head_dim = query.shape
    _, num_keys, kv_heads, _ = key.shape
    all_heads = batch * num_heads
    if head_dim <= 64:
        return all_heads
    in_cache = _L2_BYTES // (2 * num_keys * head_dim * key.dtype.itemsize) * (num_heads // kv_heads)
    # A smaller last group would end late.
    return max(heads for heads in range(1, all_heads + 1) if all_heads % heads == 0 and heads <= max(in_cache, 1))


def prefers_several_blocks(head_dim: int, shard_len: int) -> bool:
    """Whether several blocks of such shards are better taken at once: in short ones the state is much of a step.

    Half of a block must be whole tiles of keys.
    """
    k_tiles = default_forward_config(head_dim, has_segments=False).k_tile, default_backward_config(head_dim).k_tile
    return head_dim == 128 and shard_len <= _SHORT_SHARD and shard_len % (2 * max(k_tiles)) == 0


@dataclasses.dataclass(frozen=True)
class BackwardConfig:
    """Tile sizes of the backward kernel: `q_tile` queries per step, `stages` of them in shared memory."""

    q_tile: int = 64
    stages: int = 2

    def __post_init__(self):
        if self.q_tile not in (64, 128):
            raise ValueError(f"q_tile must be 64 or 128, got {self.q_tile}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2, got {self.stages}")

    @property
    def k_tile(self) -> int:
        return BACKWARD_WARPGROUPS * WARPGROUP_ROWS


def backward_splits(mask: BlockMask, num_heads: int, key_tiles: int, batch: int, num_steps: int) -> Splits | None:
    """How the last programs of the backward kernel are shared: key tiles of `num_heads` key heads."""
    return Splits.of(mask, num_heads, key_tiles, batch, num_steps, _BACKWARD_COSTS)


def default_backward_config(head_dim: int) -> BackwardConfig:
    """What is used for a head dim of 64 or 128."""
    return BackwardConfig(q_tile=128 if head_dim == 64 else 64)


def backward_grid(mask: BlockMask, kv_heads: int, key_tiles: int, batch: int, config: BackwardConfig) -> dict[str, int]:
    """The grid's dims, the slowest first: programs of how many heads are taken side by side, key tile by key tile.

    Programs of one head side by side share what they read. But on the diagonal of a causal mask they are of unequal
    length, the longest first and twice as long as they are on average: where one head's are too few for all
    multiprocessors, the last head would end late, and as many heads are taken together as have enough. Where registers
    are short, for documents and for tiles of 128 queries, these are all heads.
    """
    of_head = key_tiles * batch
    if not mask.has_uneven_tiles or of_head >= _ENOUGH_OF_A_HEAD * MULTIPROCESSORS:
        return {"kv_heads": kv_heads, "key_tiles": key_tiles, "batch": batch}
    if config.q_tile == WARPGROUP_ROWS and mask.q_segment_ids is None:
        for together in range(2, kv_heads):
            if kv_heads % together == 0 and together * of_head >= _ENOUGH_TOGETHER * MULTIPROCESSORS:
                groups = kv_heads // together
                return {"kv_groups": groups, "key_tiles": key_tiles, "kv_heads": together, "batch": batch}
    return {"key_tiles": key_tiles, "kv_heads": kv_heads, "batch": batch}


def backward_tiles_apart(mask: BlockMask, num_steps: int, stretches: int) -> int:
    """How many query tiles each program begins its full ones later than the one before it.

    The farther apart, the rarer two programs add to one tile of dQ at once, but the more of the queries is in use at a
    time. `num_steps` are the query tiles of a program, those of all its heads together; 2 to 6 apart were within 1 %
    where there are few of them. A stretch of the queries is short enough for one place after the other.
    """
    if stretches > 1:
        return 1
    if num_steps < 1024:
        return 4
    return 1 if mask.has_uneven_tiles else 8


def backward_stretches(mask: BlockMask, num_steps: int, num_queries: int, config: BackwardConfig) -> int:
    """In how many stretches, one after the other, programs go through a head's queries.

    Without a mask all programs of a head, which run side by side, are in the same stretch at about the same time: few
    of its queries are in use at a time, though each program begins with other ones. At 64K tokens stretches of 16K were
    2 % slower than none to 1 % faster, of 8K 1 to 2 % faster, of 4K and 2K 3 %. Fewer steps than there have not been
    measured, nor tiles of 128 queries. Stretches are of equally many tiles that are not cut off.
    """
    if mask.is_causal or mask.q_segment_ids is not None or config.q_tile != WARPGROUP_ROWS:
        return 1
    if num_steps < _STEPS_FOR_STRETCHES or num_queries % _STRETCH_LEN:
        return 1
    return num_queries // _STRETCH_LEN
