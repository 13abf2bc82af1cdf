"""What the Hopper kernels are run with: tile sizes, heads in a program, and the order of the grid.

All of it was chosen by measuring on an H200; the runs are in `benchmarks/LOG.md`.
"""

import dataclasses

from .contract import BlockMask
from .mosaic_gpu_primitives import WARPGROUP_ROWS
from .mosaic_gpu_split import Split, SplitCosts, split_of

BACKWARD_WARPGROUPS = 2
# Programs under a causal mask are unequal. From this many on, one head after the other is faster all the same.
_MANY_PROGRAMS = 1024
# For shared gradients zeros are made, and they are put in their place. Shared outputs are merged piece by piece.
_BACKWARD_COSTS = SplitCosts(program=4, sharing=16)
_FORWARD_COSTS = SplitCosts(program=4, sharing=4, piece=0.5)
# From so many keys on the last of equal programs can be split, if each takes one head. What one of one head loses at
# its beginning and end is less than 1 % of the time that twice as many keys take: no other program takes more there.
_MANY_KEYS, _VERY_MANY_KEYS = 16384, 32768


@dataclasses.dataclass(frozen=True)
class ForwardConfig:
    """Tile sizes of the forward kernel.

    `q_tile` queries per program, 64 for each compute warpgroup; `k_tile` keys per step; `stages` key and value tiles in
    shared memory. A program takes up to `heads` query heads in turn. `early_state` gives the running output shared
    memory of its own, so that it is copied while keys are still computed with.
    """

    q_tile: int
    k_tile: int
    stages: int
    heads: int = 4
    early_state: bool = True

    def __post_init__(self):
        if self.q_tile not in (128, 192):
            raise ValueError(f"q_tile must be 128 or 192 (64 rows for each of 2 or 3 warpgroups), got {self.q_tile}")
        if self.k_tile % 16 or not 16 <= self.k_tile <= 256:
            raise ValueError(f"k_tile must be a multiple of 16 up to 256, got {self.k_tile}")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2, got {self.stages}")
        if self.heads < 1 or (self.heads > 1 and not self.early_state):
            raise ValueError(f"heads must be at least 1, and 1 without early_state, got {self.heads}")

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


def default_forward_config(
    mask: BlockMask, head_dim: int, *, num_keys: int, has_state: bool, in_place: bool
) -> ForwardConfig:
    """What is used for a block: the fastest of those measured on an H200 whose registers are not spilled.

    `has_state` says that earlier blocks have been attended to, `in_place` that later ones will be too. Where every
    program takes equally long, many short ones leave fewer SMs idle at the end than a few of several heads.
    """
    has_segments = mask.q_segment_ids is not None
    is_all_visible = not has_state and not has_segments and not mask.is_causal
    if head_dim <= 64:
        if has_segments:
            return ForwardConfig(q_tile=128, k_tile=128, stages=2, heads=4)
        return ForwardConfig(q_tile=192, k_tile=128, stages=2, heads=1 if is_all_visible else 2)
    if head_dim <= 128:
        heads = _heads_of_a_program(mask, num_keys, in_place=in_place, is_all_visible=is_all_visible)
        return ForwardConfig(q_tile=128, k_tile=128, stages=2, heads=heads)
    return ForwardConfig(q_tile=128, k_tile=64, stages=2, heads=1, early_state=False)


def _heads_of_a_program(mask: BlockMask, num_keys: int, *, in_place: bool, is_all_visible: bool) -> int:
    """How many heads a program takes at most, for head dims from 65 to 128."""
    if mask.q_segment_ids is not None:
        return 1 if in_place else 4
    if is_all_visible or (in_place and not mask.has_uneven_tiles):
        return 1 if num_keys >= _MANY_KEYS else 2
    return 1 if num_keys >= _VERY_MANY_KEYS else 4


def forward_split(
    mask: BlockMask, config: ForwardConfig, num_heads: int, row_tiles: int, batch: int, num_steps: int
) -> Split | None:
    """How the last programs of the forward kernel are split: query tiles of `num_heads` heads, one head a program."""
    if config.heads > 1 or not config.can_round_merged:
        return None
    return split_of(mask, num_heads, row_tiles, batch, num_steps, _FORWARD_COSTS)


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


def backward_split(mask: BlockMask, num_heads: int, key_tiles: int, batch: int, num_steps: int) -> Split | None:
    """How the last programs of the backward kernel are split: key tiles of `num_heads` key heads."""
    return split_of(mask, num_heads, key_tiles, batch, num_steps, _BACKWARD_COSTS)


def default_backward_config(head_dim: int) -> BackwardConfig:
    """What is used for a head dim of 64 or 128."""
    return BackwardConfig(q_tile=128 if head_dim == 64 else 64)


def forward_grid_order(is_uneven: bool, head_dim: int, num_programs: int) -> tuple[str, str, str]:
    """The grid's dims, the slowest first.

    Programs of one head side by side read the same keys and values, which then stay in the L2 cache however long they
    are. But on the diagonal of a causal mask programs are of unequal length, and the longest of the last head would end
    late: those of all heads go first if there are few programs, and for small head dims always.
    """
    if is_uneven and (head_dim <= 64 or num_programs < _MANY_PROGRAMS):
        return "row_tiles", "heads", "batch"
    return "heads", "row_tiles", "batch"


def backward_grid_order(is_uneven: bool, num_programs: int) -> tuple[str, str, str]:
    """The grid's dims, the slowest first.

    Programs of one head side by side share what they read. But on the diagonal of a causal mask, where programs are of
    unequal length, the last head ends late if there are few of them.
    """
    if not is_uneven or num_programs >= _MANY_PROGRAMS:
        return "kv_heads", "key_tiles", "batch"
    return "key_tiles", "kv_heads", "batch"


def backward_tiles_apart(mask: BlockMask, num_steps: int) -> int:
    """How many query tiles each program begins its full ones later than the one before it.

    The farther apart, the rarer two programs add to one tile of dQ at once, but the more of the queries is in use at a
    time: once that is more than the L2 cache holds, it costs more than it saves. `num_steps` are the query tiles of a
    program, those of all its heads together; 2 to 6 apart were within 1 % where there are few of them.
    """
    if mask.has_uneven_tiles:
        return 1 if num_steps >= 1024 else 4
    if mask.is_causal:
        return 2
    return 8 if num_steps >= 1024 else 4
