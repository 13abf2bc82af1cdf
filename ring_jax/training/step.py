"""The training step as one compiled program: what it takes, how that is sharded, what it returns."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from ..compiler import step_compiler_options
from ..data import NO_TARGET, Batch
from ..layouts import check_layout, layout_positions
from ..loss import cross_entropy
from ..model import Transformer, TransformerConfig
from .optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from .sharding import BATCH_AXIS, SEQ_AXIS, shard_weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes: float32 weights by name, the optimizer's state, and how many steps were made."""

    params: dict[str, Any]
    optimizer: optax.OptState
    step: Int32[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeviceBatch:
    """A batch in layout order, sharded over the mesh; fields as in `ring_jax.data.Batch`."""

    tokens: Int32[Array, "B T"]
    targets: Int32[Array, "B T"]
    segment_ids: Int32[Array, "B T"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """Of one step: mean loss before the update in nats per token, and the gradient's norm before clipping."""

    loss: Float32[Array, ""]
    grad_norm: Float32[Array, ""]
    learning_rate: Float32[Array, ""]


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a training step is compiled from; `steps` is the length of the learning rate's schedule.

    Raises ValueError where the batch or the sequence does not divide over the mesh.
    """

    model: TransformerConfig
    optimizer: OptimizerConfig
    mesh: Mesh
    seq_len: int
    batch: int
    steps: int

    def __post_init__(self) -> None:
        try:
            check_layout(self.model.attention.layout, self.seq_len, self.num_shards)
        except ValueError as error:
            raise ValueError(f"--seq-len {self.seq_len} does not suit --mesh and --layout: {error}") from error
        rows = self.mesh.shape.get(BATCH_AXIS, 1)
        if self.batch % rows:
            raise ValueError(
                f"batch {self.batch} does not divide over the {rows} devices of mesh axis {BATCH_AXIS!r}: "
                f"use a multiple of {rows}, or a smaller axis"
            )

    @property
    def num_shards(self) -> int:
        return self.mesh.shape[SEQ_AXIS]


class TrainStep:
    """The pieces of training, in terms of a mesh.

        step = TrainStep(config)
        state = step.init(seed)
        run = step.lower().compile()
        state, metrics = run(state, step.place(batch))  # donates the old state

    `abstract_state` and `abstract_batch` carry shapes, dtypes and shardings: enough to compile for devices that are not
    there, and to restore a checkpoint.
    """

    def __init__(self, config: StepConfig):
        self.config = config
        self._schedule = learning_rate_schedule(config.optimizer, config.steps, config.model.model_dim)
        self._optimizer = make_optimizer(config.optimizer, self._schedule)
        with jax.set_mesh(config.mesh):
            self._graph, _ = nnx.split(nnx.eval_shape(lambda: Transformer(config.model, rngs=nnx.Rngs(0))))
            shapes = jax.eval_shape(functools.partial(self._init, 0))
        self.abstract_state: TrainState = shard_weights(shapes, config.mesh)
        spec = PartitionSpec(BATCH_AXIS if BATCH_AXIS in config.mesh.shape else None, SEQ_AXIS)
        self._batch_sharding = NamedSharding(config.mesh, spec)
        shape = (config.batch, config.seq_len)
        rows: Any = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=self._batch_sharding)
        self.abstract_batch = DeviceBatch(rows, rows, rows)
        # Natural order to layout order, done on the host while the rows are still there.
        self._order = np.asarray(layout_positions(config.model.attention.layout, config.seq_len, config.num_shards))

    @property
    def num_params(self) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_state.params))

    def init(self, seed: int) -> TrainState:
        """Fresh weights, the same on every mesh but for rounding."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        with jax.set_mesh(self.config.mesh):
            return jax.jit(functools.partial(self._init, seed), out_shardings=shardings)()

    def place(self, batch: Batch) -> DeviceBatch:
        """A batch in layout order on the devices."""
        rows = (batch.tokens, batch.targets, batch.segment_ids)
        return DeviceBatch(*(jax.device_put(x[:, self._order], self._batch_sharding) for x in rows))

    def lower(self) -> jax.stages.Lowered:
        """The step from (TrainState, DeviceBatch) to (TrainState, StepMetrics), donating its state; `compile()` it.

        Raises:
            NotImplementedError: the implementation asked for cannot run on this mesh.
        """
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        options = step_compiler_options(self.config.mesh.devices.flat[0].platform, self.config.model.dtype)
        step = jax.jit(self._step, donate_argnums=0, out_shardings=(shardings, None), compiler_options=options)
        with jax.set_mesh(self.config.mesh):
            return step.lower(self.abstract_state, self.abstract_batch)

    def _init(self, seed: int) -> TrainState:
        _, params = nnx.split(Transformer(self.config.model, rngs=nnx.Rngs(seed)))
        params = nnx.to_pure_dict(params)
        return TrainState(params, self._optimizer.init(params), jnp.int32(0))

    def _loss(self, params: dict[str, Any], batch: DeviceBatch) -> Float32[Array, ""]:
        model = nnx.merge(self._graph, params)
        hidden = model.hidden(batch.tokens, segment_ids=batch.segment_ids)
        with jax.named_scope("loss"):
            operands: Any = _reduce_first(self._unembedding_sharding, hidden, model.unembedding)
            hidden, unembedding = operands
            return cross_entropy(hidden, unembedding, batch.targets, weights=batch.targets != NO_TARGET)

    @property
    def _unembedding_sharding(self) -> NamedSharding:
        params: Any = self.abstract_state.params
        if "head" in params:
            return params["head"].sharding
        table = params["embedding"]["embedding"].sharding
        return table.update(spec=PartitionSpec(*reversed((*table.spec, None, None)[:2])))

    def _step(self, state: TrainState, batch: DeviceBatch) -> tuple[TrainState, StepMetrics]:
        loss, grads = jax.value_and_grad(self._loss)(state.params, batch)
        # optax multiplies float32 moments by Python numbers and int32 counts: exempt from strict promotion, only here.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, optimizer = self._optimizer.update(grads, state.optimizer, state.params)
            params: Any = optax.apply_updates(state.params, updates)
            norm, learning_rate = optax.tree.norm(grads), jnp.asarray(self._schedule(state.step))
        return TrainState(params, optimizer, state.step + 1), StepMetrics(loss, norm, learning_rate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reduce_first(
    sharding: NamedSharding, hidden: Float[Array, "B T D"], unembedding: Float[Array, "D vocab"]
) -> tuple[Array, Array]:
    """Both unchanged; the backward pass reduces the unembedding's gradient over the devices before it goes on.

    Left to XLA, every device holds its own whole gradient, 2 GB for a vocabulary of 128K, until all layers are done.
    """
    return hidden, unembedding


def _reduce_first_forward(sharding: NamedSharding, hidden: Array, unembedding: Array):
    return (hidden, unembedding), None


def _reduce_first_backward(sharding: NamedSharding, _: None, cotangents: tuple[Array, Array]):
    d_hidden, d_unembedding = cotangents
    return jax.lax.optimization_barrier((d_hidden, jax.lax.with_sharding_constraint(d_unembedding, sharding)))


_reduce_first.defvjp(_reduce_first_forward, _reduce_first_backward)
