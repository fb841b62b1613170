"""Configuration and mesh -> an engine with its initial weights: what each kind of parallelism does to the model."""

from __future__ import annotations

from megagpt.config.schema import GPT2Model, TrainingRun
from megagpt.engine.engine import TORCH_DTYPES, Engine
from megagpt.engine.pipeline import PipelinedEngine
from megagpt.engine.sharded import hollow
from megagpt.model.attention import ChosenAttention, Sizes, choose_attention
from megagpt.model.compile import compile_blocks
from megagpt.model.decoder import Decoder, use_attention
from megagpt.model.init import init_weights
from megagpt.model.recompute import apply_recompute
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.plan import BatchPlan
from megagpt.parallel.share import meta_share
from megagpt.train.optim import parameter_groups


def build_engine(config: TrainingRun, plan: BatchPlan, mesh: Mesh) -> Engine:
    """The engine of this process. Every process of the world calls it."""
    model = build_share(config, mesh)
    use_attention(model, attention_of(config, mesh.device.type))
    compile_and_recompute(model, config)
    engine = PipelinedEngine if mesh.pipeline > 1 else Engine
    return engine(model, parameter_groups(model, config.optim.weight_decay), config, plan, mesh)


def attention_of(config: TrainingRun, device_type: str) -> ChosenAttention:
    """What `train.attention` means for this run on such a device.

    Raises:
        ConfigError: it cannot be used there; says why.
    """
    sizes = Sizes(
        device_type=device_type,
        dtype=TORCH_DTYPES[config.train.dtype],
        d_head=config.model.d_model // config.model.n_head,
        dropout=config.model.dropout if isinstance(config.model, GPT2Model) else 0.0,
    )
    return choose_attention(config.train.attention, sizes, packed=config.data.isolate_documents)


def build_share(config: TrainingRun, mesh: Mesh) -> Decoder:
    """What this process holds of the model, with its initial weights, on the CPU.

    It is cut while it is on the meta device, so that no process ever holds a weight that it does not need. Under ZeRO-3
    that is nearly all of them: the engine makes the weights, and keeps its parts.
    """
    model = meta_share(config, mesh)
    if config.parallel.zero_stage == 3:
        return hollow(model)
    model = model.to_empty(device="cpu")
    init_weights(model, config.run.seed)
    return model


def compile_and_recompute(model: Decoder, config: TrainingRun) -> None:
    """What is done to a model's blocks without changing what they compute."""
    if config.train.compile:
        compile_blocks(model)
    apply_recompute(model, config.train.recompute, offload=config.train.offload_activations)
