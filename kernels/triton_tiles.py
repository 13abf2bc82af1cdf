"""Tile shapes of the Triton kernels: by compute capability, bytes per element and padded head dim.

The numbers for sm_90 were measured on an H200. Those for sm_80 and sm_86/89 follow from shared memory (163 KiB and
99 KiB per block) and from the compiler's register reports; nobody has timed them yet.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Tile:
    """One kernel's launch shape: queries and keys per tile, warps per program, stages of the load pipeline."""

    q: int
    k: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name, value in (("q", self.q), ("k", self.k)):
            if value < 16 or value & (value - 1):
                raise ValueError(f"Tile.{name} must be a power of two of at least 16, got {value}")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"Tile.num_warps must be 1, 2, 4, 8 or 16, got {self.num_warps}")
        if self.num_stages < 1:
            raise ValueError(f"Tile.num_stages must be at least 1, got {self.num_stages}")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Launch shapes of the three kernels."""

    forward: Tile
    dq: Tile
    dkv: Tile


MAX_PADDED_HEAD_DIM = 256

# Compute capabilities whose asynchronous matrix units read from shared memory: Hopper and datacenter Blackwell.
_ASYNC = (90, 100, 103)

# Largest head dim -> tiles. Ampere's A100 (sm_80): 163 KiB of shared memory per block. mma.sync keeps its operands in
# registers, so these are the largest tiles that do not spill.
_SM_80 = {
    64: Tiles(forward=Tile(128, 64, 4, 3), dq=Tile(64, 32, 4, 3), dkv=Tile(64, 128, 8, 2)),
    96: Tiles(forward=Tile(128, 32, 8, 3), dq=Tile(64, 64, 8, 2), dkv=Tile(64, 64, 8, 2)),
    128: Tiles(forward=Tile(128, 32, 8, 3), dq=Tile(64, 64, 8, 2), dkv=Tile(64, 64, 8, 2)),
    256: Tiles(forward=Tile(64, 64, 8, 2), dq=Tile(64, 32, 8, 2), dkv=Tile(32, 64, 8, 1)),
}
# Consumer and inference Ampere and Ada (sm_86, sm_89), and consumer Blackwell: 99 KiB of shared memory per block.
_SM_86 = {
    64: Tiles(forward=Tile(128, 32, 4, 3), dq=Tile(64, 32, 4, 3), dkv=Tile(64, 128, 8, 2)),
    96: _SM_80[96],
    128: Tiles(forward=Tile(128, 64, 8, 2), dq=Tile(64, 64, 8, 2), dkv=Tile(64, 64, 8, 2)),
    256: Tiles(forward=Tile(64, 32, 8, 2), dq=Tile(64, 32, 8, 1), dkv=Tile(16, 64, 8, 2)),
}
# Hopper (sm_90): 227 KiB, wgmma. Datacenter Blackwell (sm_100, sm_103) has as much shared memory. dK/dV at head dim 128
# spills 4 to 160 bytes a thread and is still the fastest: two small programs on each multiprocessor hide each other's
# softmax (689 TFLOP/s at 16K causal; the largest tile that does not spill, (32, 64), 609).
_SM_90 = {
    64: Tiles(forward=Tile(128, 64, 4, 3), dq=Tile(64, 64, 4, 3), dkv=Tile(64, 64, 4, 3)),
    128: Tiles(forward=Tile(128, 64, 8, 3), dq=Tile(128, 64, 8, 3), dkv=Tile(64, 64, 4, 2)),
    256: Tiles(forward=Tile(128, 64, 8, 2), dq=Tile(64, 64, 8, 2), dkv=Tile(64, 64, 8, 1)),
}
# True float32 products run on the ordinary arithmetic units. At head dim 128 the forward tile spills about 500 bytes a
# thread and is still 1.8 times as fast as the largest one that does not, (16, 16), on an H200.
_FLOAT32 = {
    64: Tiles(forward=Tile(32, 32, 8, 1), dq=Tile(32, 32, 8, 1), dkv=Tile(32, 32, 8, 1)),
    128: Tiles(forward=Tile(32, 32, 8, 1), dq=Tile(32, 32, 8, 1), dkv=Tile(32, 32, 8, 1)),
    256: Tiles(forward=Tile(16, 16, 8, 1), dq=Tile(32, 16, 8, 1), dkv=Tile(16, 32, 8, 1)),
}


def padded_head_dim(head_dim: int) -> int:
    """The power of two, at least 16, that a head of `head_dim` occupies inside a kernel."""
    return max(16, 1 << (head_dim - 1).bit_length())


def choose_tiles(compute_capability: int, itemsize: int, head_dim: int) -> Tiles:
    """Launch shapes for a GPU (`compute_capability` 80, 86, 89, 90, ...), bytes per input element, and head dim."""
    assert head_dim <= MAX_PADDED_HEAD_DIM
    if itemsize == 4:
        table = _FLOAT32
    elif compute_capability == 80:
        table = _SM_80
    else:
        table = _SM_90 if compute_capability in _ASYNC else _SM_86
    return table[min(limit for limit in table if head_dim <= limit)]


def use_copy_engine(compute_capability: int, itemsize: int, head_dim: int) -> bool:
    """Whether the copy engine (TMA) loads the tiles: it wants rows of whole 16-byte units.

    It fills shared memory. Products in true float32, and those of mma.sync, read their operands through registers and
    are better served by ordinary loads (consumer Blackwell, sm_120, has the engine but then spills kilobytes).
    """
    return compute_capability in _ASYNC and itemsize == 2 and head_dim * itemsize % 16 == 0
