"""Model shapes by name. The first four read bytes, the others have the vocabulary of the models they are named for."""

from .data import VOCAB_SIZE
from .model import TransformerConfig

PRESETS = {
    # For two CPU cores. At 16K tokens of context a step's time is that of attention, so it has one layer and one head.
    "tiny": TransformerConfig(
        vocab_size=VOCAB_SIZE, model_dim=128, num_layers=1, num_heads=1, head_dim=64, mlp_dim=384
    ),
    "small": TransformerConfig(
        vocab_size=VOCAB_SIZE, model_dim=512, num_layers=8, num_heads=8, num_kv_heads=2, mlp_dim=1536
    ),
    "medium": TransformerConfig(
        vocab_size=VOCAB_SIZE, model_dim=1024, num_layers=24, num_heads=8, num_kv_heads=2, mlp_dim=2816
    ),
    "large": TransformerConfig(
        vocab_size=VOCAB_SIZE, model_dim=2048, num_layers=24, num_heads=16, num_kv_heads=4, mlp_dim=5632
    ),
    "llama3-8b": TransformerConfig(
        vocab_size=128_256,
        model_dim=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        mlp_dim=14_336,
        rope_theta=500_000.0,
    ),
    "llama3-70b": TransformerConfig(
        vocab_size=128_256,
        model_dim=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        mlp_dim=28_672,
        rope_theta=500_000.0,
    ),
    "qwen3-8b": TransformerConfig(
        vocab_size=151_936,
        model_dim=4096,
        num_layers=36,
        num_heads=32,
        num_kv_heads=8,
        mlp_dim=12_288,
        rope_theta=1_000_000.0,
        norm_eps=1e-6,
        qk_norm=True,
    ),
}


def find_preset(name: str) -> TransformerConfig:
    """The preset of that name: float32, contiguous layout; `dataclasses.replace` changes what a run needs.

    Raises:
        ValueError: no preset of that name; the message lists them.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown model {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
