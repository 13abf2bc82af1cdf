"""One block of attention on one device: the contract, its implementations and the oracle. No collectives here."""

from .contract import AttentionState as AttentionState
from .contract import BlockKernel as BlockKernel
from .contract import BlockMask as BlockMask
from .contract import Gradients as Gradients
from .registry import IMPLEMENTATIONS as IMPLEMENTATIONS
from .registry import Target as Target
from .registry import choose as choose
from .registry import load as load
from .varying import match_varying as match_varying
