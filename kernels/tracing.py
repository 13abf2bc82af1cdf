"""Block kernels that are traced and lowered once, however many steps of a ring call them.

A ring of eight devices calls its kernel up to eight times forward and more often backward, mostly with arrays of the
same shapes. Inside `jax.jit` those calls share one trace and one function of the lowered module. XLA inlines it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from .contract import AttentionState, BlockKernel, BlockMask, Gradients


@dataclasses.dataclass(frozen=True)
class TracedOnce:
    """A block kernel whose calls with the same shapes and options are traced once.

    A kernel that cannot index blocks is given the mask of a block alone.
    """

    kernel: BlockKernel
    can_index_blocks: bool = False

    def forward(self, *args: Any, **options: Any) -> AttentionState:
        return _shared(self.kernel, "forward", *options.items())(*args[:-1], self._mask(args[-1]))

    def backward(self, *args: Any, **options: Any) -> Gradients:
        return _shared(self.kernel, "backward", *options.items())(*args[:-1], self._mask(args[-1]))

    def finished_d_query(self, dq: jax.Array, *, scale: float) -> jax.Array:
        return self.kernel.finished_d_query(dq, scale=scale)

    def _mask(self, mask: BlockMask) -> BlockMask:
        return diagonal_as_none(mask if self.can_index_blocks else mask.alone())


@functools.cache
def _shared(kernel: BlockKernel, name: str, *options: tuple[str, Any]) -> Callable[..., Any]:
    """A kernel's function with its options fixed; the same one every time, for jax remembers traces by function."""

    def block(*args: Any) -> Any:
        return getattr(kernel, name)(*args[:-1], with_key_positions(args[-1]), **dict(options))

    block.__name__ = f"attention_{name}"
    return jax.jit(block)


def diagonal_as_none(mask: BlockMask) -> BlockMask:
    """The mask with `k_positions=None` if they are the very same array as the queries'.

    A kernel may ask whether both sides are the same tokens, and would not see it in two traced arrays.
    """
    # The type is left as it is: no kernel ever sees such a mask.
    none: Any = None
    return dataclasses.replace(mask, k_positions=none) if mask.k_positions is mask.q_positions else mask


def with_key_positions(mask: BlockMask) -> BlockMask:
    """What `diagonal_as_none` was given."""
    return mask if mask.k_positions is not None else dataclasses.replace(mask, k_positions=mask.q_positions)
