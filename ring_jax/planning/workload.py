"""What is planned: the training step of a model, or the bare attention operation, lowered for a described cluster."""

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .. import kernels
from ..attention import ring_attention
from ..cluster import compile_only_devices
from ..compiler import compiler_options
from ..kernels import Target
from ..layouts import check_layout
from ..model import TransformerConfig
from ..modules import AttentionOptions
from ..presets import PRESETS, find_preset
from ..training.optimizer import OptimizerConfig
from ..training.step import StepConfig, TrainStep
from .hardware import Cluster
from .memory import StepShapes, sorted_dims

ATTENTION = "attention"
MODELS = (ATTENTION, *PRESETS)
_DTYPE = "bfloat16"
_HF_MODELS = ("llama", "mistral", "qwen3")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """The bare operation in bfloat16: from Q, K, V and the output's cotangent to their gradients, forward included."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, heads: str, head_dim: int) -> "AttentionShape":
        """From `heads` such as "32/8", query heads / key-value heads, or "32". Raises ValueError."""
        parts = heads.split("/")
        if len(parts) > 2 or not all(part.isdecimal() and int(part) for part in parts):
            raise ValueError(f"--heads {heads!r}: write query heads/key-value heads, such as 32/8")
        num_heads, num_kv_heads = int(parts[0]), int(parts[-1])
        if num_heads % num_kv_heads:
            raise ValueError(f"--heads {heads!r}: the {num_kv_heads} key-value heads must divide the query heads")
        if head_dim < 1:
            raise ValueError(f"--head-dim {head_dim} must be at least 1")
        return cls(num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """One step of a model or of attention, on sequences of `seq_len` tokens in all."""

    name: str
    model: TransformerConfig | AttentionShape
    seq_len: int
    batch: int = 1
    layout: str = "zigzag"
    implementation: str | None = None

    @property
    def is_attention(self) -> bool:
        return isinstance(self.model, AttentionShape)

    @property
    def num_layers(self) -> int:
        return 1 if isinstance(self.model, AttentionShape) else self.model.num_layers

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key-value heads and head dim."""
        model = self.model
        assert model.num_kv_heads is not None
        assert model.head_dim is not None
        return model.num_heads, model.num_kv_heads, model.head_dim

    @property
    def runs_forward_twice(self) -> bool:
        """Whether the backward pass runs the forward ring again."""
        return isinstance(self.model, TransformerConfig) and self.model.remat == "layer"

    def local_tokens(self, cluster: Cluster) -> int:
        """Tokens of one device."""
        return self.batch * self.seq_len // (cluster.mesh.get("data", 1) * cluster.mesh["seq"])

    def chosen_implementation(self, cluster: Cluster) -> str:
        """The kernel that will run. Raises NotImplementedError if the one asked for cannot."""
        device = compile_only_devices(cluster.gpu, gpus_per_host=1)[0]
        return kernels.choose(self.implementation, kernels.Need(Target.of_device(device), _DTYPE, self.heads[2]))


def find_model(
    name: str, *, heads: str, head_dim: int, remat: str, offload: bool
) -> TransformerConfig | AttentionShape:
    """The model of a preset's name, of a Hugging Face `config.json`, or `attention`.

    Raises:
        ValueError: unknown; the message lists the names.
        NotImplementedError: a Hugging Face model of a kind that ring_jax has not got.
    """
    if name == ATTENTION:
        return AttentionShape.of(heads, head_dim)
    path = Path(name)
    if path.suffix == ".json" and path.is_file():
        config = read_hf_config(path)
    elif name in PRESETS:
        config = find_preset(name)
    else:
        raise ValueError(
            f"unknown model {name!r}: choose one of {', '.join(MODELS)}, or give the path of a Hugging Face config.json"
        )
    return dataclasses.replace(config, dtype=_DTYPE, remat=remat, offload=offload)


def read_hf_config(path: Path) -> TransformerConfig:
    """The shape of a Hugging Face model from its `config.json`.

    Raises:
        ValueError: not such a file.
        NotImplementedError: a kind of model that ring_jax has not got.
    """
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        kind = fields["model_type"]
        if kind not in _HF_MODELS:
            raise NotImplementedError(f"{path}: model_type {kind!r} is not one of {', '.join(_HF_MODELS)}")
        theta = fields.get("rope_theta") or fields.get("rope_parameters", {}).get("rope_theta", 10_000.0)
        return TransformerConfig(
            vocab_size=fields["vocab_size"],
            model_dim=fields["hidden_size"],
            num_layers=fields["num_hidden_layers"],
            num_heads=fields["num_attention_heads"],
            num_kv_heads=fields.get("num_key_value_heads"),
            head_dim=fields.get("head_dim"),
            mlp_dim=fields["intermediate_size"],
            rope_theta=theta,
            norm_eps=fields.get("rms_norm_eps", 1e-6),
            qk_norm=kind == "qwen3",
            tie_embeddings=fields.get("tie_word_embeddings", False),
        )
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not the config.json of a Hugging Face model: {error!r}") from error


def lower(workload: Workload, cluster: Cluster) -> tuple[jax.stages.Lowered, StepShapes]:
    """The step lowered for the cluster, and the shapes by which its buffers are told apart.

    Raises:
        ValueError: the workload does not divide over the mesh.
        NotImplementedError: the implementation asked for cannot run there.
    """
    mesh = _mesh(cluster)
    if isinstance(workload.model, AttentionShape):
        return _lower_attention(workload, workload.model, mesh), StepShapes(None, workload.local_tokens(cluster))
    step = train_step(workload, mesh)
    params: list[Any] = jax.tree.leaves(step.abstract_state.params)
    local = [leaf.sharding.shard_shape(leaf.shape) for leaf in params]
    whole = [leaf.shape for leaf in params]
    shards = frozenset(map(sorted_dims, local))
    # A layer's matrices are gathered one layer at a time.
    matrices = frozenset(sorted_dims(shape) for full in whole for shape in (full, full[1:]) if len(shape) > 1)
    shapes = StepShapes(workload.num_layers, workload.local_tokens(cluster), shards, matrices - shards)
    return step.lower(), shapes


def train_step(workload: Workload, mesh: Mesh) -> TrainStep:
    """The training step of a model on a mesh, of devices that are there or not: the one that is planned.

    Raises ValueError where the batch or the sequence does not divide over the mesh.
    """
    assert isinstance(workload.model, TransformerConfig)
    attention = AttentionOptions(layout=workload.layout, implementation=workload.implementation)
    model = dataclasses.replace(workload.model, attention=attention)
    return TrainStep(StepConfig(model, OptimizerConfig(), mesh, workload.seq_len, workload.batch, steps=100))


def _lower_attention(workload: Workload, shape: AttentionShape, mesh: Mesh) -> jax.stages.Lowered:
    check_layout(workload.layout, workload.seq_len, mesh.shape["seq"])
    spec = PartitionSpec("data" if "data" in mesh.shape else None, "seq", "tensor" if "tensor" in mesh.shape else None)
    attend = functools.partial(
        ring_attention, is_causal=True, layout=workload.layout, mesh=mesh, implementation=workload.implementation
    )

    def gradients(query, key, value, d_out):
        return jax.vjp(attend, query, key, value)[1](d_out)

    def array(num_heads: int) -> jax.ShapeDtypeStruct:
        dims = (workload.batch, workload.seq_len, num_heads, shape.head_dim)
        return jax.ShapeDtypeStruct(dims, jnp.dtype(_DTYPE), sharding=NamedSharding(mesh, spec))

    query, key = array(shape.num_heads), array(shape.num_kv_heads)
    # Donated: in a model these are intermediate results, which nothing holds longer than the operation does.
    step = jax.jit(gradients, donate_argnums=(0, 1, 2), compiler_options=compiler_options("gpu"))
    return step.lower(query, key, key, query)


def _mesh(cluster: Cluster) -> Mesh:
    devices = compile_only_devices(cluster.gpu, hosts=cluster.hosts, gpus_per_host=cluster.gpus_per_host)
    shape = tuple(cluster.mesh.values())
    assert math.prod(shape) == len(devices)
    return Mesh(np.array(devices).reshape(shape), tuple(cluster.mesh), axis_types=(AxisType.Auto,) * len(shape))
