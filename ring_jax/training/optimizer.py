"""The optimizer: AdamW, linear warmup, cosine decay, and a limit on the gradient's norm."""

import dataclasses
from typing import Annotated

import jax
import optax
import tyro

_LEARNING_RATE = tyro.conf.arg(metavar="FLOAT", help_behavior_hint="(default: 1 / the model's width)")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (arXiv:1711.05101) with linear warmup, then cosine decay."""

    learning_rate: Annotated[float | None, _LEARNING_RATE] = None
    """Peak learning rate. The default is 8e-3 for tiny and 2.4e-4 for llama3-8b."""
    warmup: int = 10
    """Steps until the learning rate has risen to its peak; at most half of all steps."""
    min_learning_rate: float = 0.1
    """Learning rate of the last step, as a fraction of the peak."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms have none."""
    beta1: float = 0.9
    """Decay of the running mean of gradients."""
    beta2: float = 0.95
    """Decay of the running mean of squared gradients."""
    clip: float = 1.0
    """Largest norm of the whole gradient; a larger one is scaled down to it."""

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{_flag(name)} {value} must be a finite number of at least 0")
        for name in ("beta1", "beta2", "min_learning_rate"):
            if getattr(self, name) > 1 or (name != "min_learning_rate" and getattr(self, name) == 1):
                raise ValueError(f"{_flag(name)} {getattr(self, name)} must be below 1")
        for name in ("learning_rate", "clip"):
            if getattr(self, name) == 0:
                raise ValueError(f"{_flag(name)} must be above 0, or nothing is learnt")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def learning_rate_schedule(config: OptimizerConfig, steps: int, model_dim: int) -> optax.Schedule:
    """The learning rate of step 0 to `steps - 1` for a model of this width: above 0 in warmup, so no step is wasted."""
    warmup = min(config.warmup, steps // 2)
    peak = 1 / model_dim if config.learning_rate is None else config.learning_rate
    return optax.schedules.join_schedules(
        [
            optax.schedules.linear_schedule(peak / (warmup + 1), peak, warmup),
            optax.schedules.cosine_decay_schedule(peak, max(steps - warmup - 1, 1), alpha=config.min_learning_rate),
        ],
        [warmup],
    )


def make_optimizer(config: OptimizerConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optax transformation; its state has the weights' shapes."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=lambda params: jax.tree.map_with_path(lambda path, _: path[-1].key != "scale", params),
        ),
    )
