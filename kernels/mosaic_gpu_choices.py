"""What the Hopper kernels are run with: tile sizes, heads in a program, and the order of the grid.

All of it was chosen by measuring on an H200; the runs are in `benchmarks/LOG.md`.
"""

import dataclasses

from .contract import BlockMask
from .mosaic_gpu_primitives import WARPGROUP_ROWS

BACKWARD_WARPGROUPS = 2
# Programs under a causal mask are unequal. From this many on, one head after the other is faster all the same.
_MANY_PROGRAMS = 1024
# Programs that run at a time on an H100 SXM or an H200, one for each multiprocessor.
_MULTIPROCESSORS = 132
# As many steps take about as long as what a program of the backward kernel does before its first and after its last
# one, and as many as zeros for shared gradients and putting them in their place.
_BACKWARD_OVERHEAD = 4
_SHARING_OVERHEAD = 16
# What a program of one head loses at its beginning and end is less than 1 % of the time that so many keys take.
_MANY_KEYS = 32768


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
    head_dim: int, *, num_keys: int, has_segments: bool, in_place: bool, is_all_visible: bool
) -> ForwardConfig:
    """What is used for a head dim: the fastest of those measured on an H200 whose registers are not spilled.

    `is_all_visible` says that no state and no mask is given: then every program takes equally long, and many short ones
    leave fewer SMs idle at the end than a few of several heads. So they do, masked or not, where there are many keys.
    """
    if head_dim <= 64:
        if has_segments:
            return ForwardConfig(q_tile=128, k_tile=128, stages=2, heads=4)
        return ForwardConfig(q_tile=192, k_tile=128, stages=2, heads=1 if is_all_visible else 2)
    if head_dim <= 128:
        one_head = in_place if has_segments else num_keys >= _MANY_KEYS
        heads = 1 if one_head else 2 if is_all_visible else 4
        return ForwardConfig(q_tile=128, k_tile=128, stages=2, heads=heads)
    return ForwardConfig(q_tile=128, k_tile=64, stages=2, heads=1, early_state=False)


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


@dataclasses.dataclass(frozen=True)
class BackwardSplit:
    """Key tiles of the last head, the last `key_tiles` that are seen: `pieces` programs share the steps of each."""

    key_tiles: int
    pieces: int


def backward_split(mask: BlockMask, num_heads: int, key_tiles: int, batch: int, num_steps: int) -> BackwardSplit | None:
    """How the last of equal programs are split, so that no multiprocessor rests while a few of them end.

    A program is a key tile of one of `num_heads` key heads, up to `num_steps` long. What is left over when all
    multiprocessors have had equally many is split, if that saves more than 1 % of the time. A block off the diagonal is
    half full: all keys are seen by half of the queries, or half of the keys by all of them.
    """
    if mask.has_uneven_tiles or mask.q_segment_ids is not None:
        return None
    if not mask.is_causal:
        return _split_of_equals(num_heads, key_tiles, batch, num_steps)
    of_all = _split_of_equals(num_heads, key_tiles, batch, num_steps // 2)
    of_half = _split_of_equals(num_heads, key_tiles // 2, batch, num_steps)
    if of_all is None or of_half is None:
        return of_all or of_half
    return BackwardSplit(max(of_all.key_tiles, of_half.key_tiles), max(of_all.pieces, of_half.pieces))


def _split_of_equals(num_heads: int, key_tiles: int, batch: int, num_steps: int) -> BackwardSplit | None:
    """`backward_split` where every program takes `num_steps` steps."""
    num_programs = num_heads * key_tiles * batch
    left_over = num_programs % _MULTIPROCESSORS
    tiles = -(-left_over // batch)
    if not left_over or tiles > key_tiles:
        return None

    def steps_of(pieces: int) -> float:
        """Steps that one multiprocessor after another does of the last programs, each of so many pieces."""
        rounds = -(-tiles * batch * pieces // _MULTIPROCESSORS)
        return rounds * (num_steps / pieces + _BACKWARD_OVERHEAD)

    pieces = min(range(1, 1 + max(1, min(_MULTIPROCESSORS, num_steps))), key=steps_of)
    all_steps = -(-num_programs // _MULTIPROCESSORS) * (num_steps + _BACKWARD_OVERHEAD)
    saved = steps_of(1) - steps_of(pieces) - _SHARING_OVERHEAD
    return BackwardSplit(tiles, pieces) if saved > all_steps / 100 else None


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
