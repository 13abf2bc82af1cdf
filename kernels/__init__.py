"""One block of attention on one device: the contract, its implementations and the oracle. No collectives here."""

from .contract import AttentionState as AttentionState
from .contract import BlockKernel as BlockKernel
from .contract import BlockMask as BlockMask
from .contract import Blocks as Blocks
from .contract import Gradients as Gradients
from .contract import StepKernel as StepKernel
from .contract import Sums as Sums
from .registry import IMPLEMENTATIONS as IMPLEMENTATIONS
from .registry import Need as Need
from .registry import Target as Target
from .registry import choose as choose
from .registry import has_fused_backward as has_fused_backward
from .registry import load as load
from .registry import prefers_several_blocks as prefers_several_blocks
from .registry import works_with_check_vma as works_with_check_vma
from .several_blocks import folded as folded
from .varying import match_varying as match_varying
