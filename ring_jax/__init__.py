"""Exact ring attention for JAX: long sequences sharded over devices."""

from .attention import STRATEGIES as STRATEGIES
from .attention import ring_attention as ring_attention
from .attention import ring_attention_shard as ring_attention_shard
from .compiler import compiler_options as compiler_options
from .flax_attention import attention_fn as attention_fn
from .kernels import IMPLEMENTATIONS as IMPLEMENTATIONS
from .layouts import LAYOUTS as LAYOUTS
from .layouts import from_layout as from_layout
from .layouts import layout_positions as layout_positions
from .layouts import to_layout as to_layout
from .loss import cross_entropy as cross_entropy
from .model import Transformer as Transformer
from .model import TransformerConfig as TransformerConfig
from .modules import AttentionOptions as AttentionOptions
from .modules import BlockwiseMLP as BlockwiseMLP
from .modules import RingAttention as RingAttention
from .ring import SAVED_NAMES as SAVED_NAMES
