"""Memory of one process by closed formulas, without building a model and without torch.

Letters as in `megagpt.model.flops`, and: P parameters that the process holds, t tensor degree, d processes over which
ZeRO shards, w bytes of a weight (4 in fp32, else 2).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from megagpt.config.schema import GPT2Model
from megagpt.model.flops import ModelConfig, Recompute

Dtype = Literal["fp32", "bf16", "fp16"]

_VOCABULARY_MULTIPLE = 8
"""As megagpt.parallel.tensor pads each share of the vocabulary; a test compares."""

_ALL_REDUCE_ELEMENTS = 500_000_000
"""Gradients that DeepSpeed flattens at once where ZeRO does not shard them: a constant of its engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroBuffers:
    """Sizes that DeepSpeed's ZeRO is told, in elements; the defaults are DeepSpeed's own."""

    reduce_bucket: int = 500_000_000
    """Gradients that are reduced at once."""
    overlap: bool = False
    """ZeRO-1 and 2: reduce while backward runs, which takes a second bucket."""
    prefetch: int = 50_000_000
    """ZeRO-3: weights that are gathered ahead."""
    max_live: int = 1_000_000_000
    """ZeRO-3: gathered weights that are kept at most. A model of fewer parameters is gathered whole in every pass."""
    persistent: int = 100_000
    """ZeRO-3: a parameter of at most so many elements stays whole on every process."""
    max_reuse_distance: int = 1_000_000_000
    """ZeRO-3: gathered weights are kept where they are used again within so many elements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLayout:
    """What one process holds and does."""

    micro_batch_size: int
    """Sequences run at once."""
    accumulation: int = 1
    """Micro-batches a step."""
    dtype: Dtype = "bf16"
    """Of weights and activations."""
    zero_stage: int = 1
    """1 shards the optimizer, 2 gradients as well, 3 weights as well."""
    zero_parallel: int = 1
    """Processes over which ZeRO shards: data x sequence."""
    tensor: int = 1
    """Processes that share each layer's weights."""
    tensor_sequence: bool = False
    """Between the cut layers each process of the tensor group holds a part of the sequence."""
    sequence: int = 1
    """Processes that share each sequence (Ulysses)."""
    parts: tuple[range, ...] | None = None
    """The layers that this process holds (as `Decoder.layers()` counts them), a stretch for each stage of a pipeline
    on it; None: all of them, without a pipeline."""
    in_flight: tuple[int, ...] = (1,)
    """For each part, the micro-batches whose activations it holds at once."""
    recompute: Recompute = "none"
    offload_activations: bool = False
    """Activations of the blocks wait in host memory."""
    offload_optimizer: bool = False
    """The optimizer's state is in host memory, and updated there. Gradients are counted on the device all the same."""
    offload_weights: bool = False
    """ZeRO-3: the process's part of the weights is in host memory."""
    fused: bool = True
    """RMSNorm is a single kernel, as on a GPU; without it it keeps intermediate results."""
    buffers: ZeroBuffers = ZeroBuffers()


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one device. Not counted: the allocator's slack, the CUDA context, kernels' and NCCL's own buffers."""

    weights_bytes: float
    """Of this process's part; without `gathered_bytes`."""
    gathered_bytes: float
    """ZeRO-3: other processes' parts of the weights that are here while they are used."""
    gradients_bytes: float
    """At the end of backward."""
    optimizer_bytes: float
    """fp32 weights (where ZeRO makes a copy) and both Adam moments."""
    activations_bytes: float
    """What the forward keeps, and the block that backward is in where it is recomputed or comes from the host."""
    logits_bytes: float
    """Logits and their gradients, where the backward of the loss peaks."""
    buffers_bytes: float
    """DeepSpeed's buckets, and the small weights that ZeRO-3 keeps whole."""
    host_bytes: float
    """Activations, optimizer and weights in host memory; in no sum."""
    phase_bytes: dict[str, float]
    """Everything that is alive at once at the peak of each phase of a step: loss (backward begins), blocks (backward
    of the last block), reduce (gradients are added up over processes), update (of the optimizer)."""

    @property
    def total_bytes(self) -> float:
        """The peak: that of the largest phase."""
        return max(self.phase_bytes.values())


def memory_bytes(config: ModelConfig, layout: MemoryLayout) -> MemoryEstimate:
    """Peak memory of one process for sequences of `max_seq_len` tokens.

    Weights, gradients and optimizer: `_states`. Activations: `block_elements`; a pipeline's stage holds those of
    several micro-batches. The peak is that of the largest phase, because gradients grow where activations shrink.

    Approximate: dropout of attention weights is counted as if the attention were fused, and small tensors (norm
    statistics, rotary tables, tokens) are left out.

    Source: Rajbhandari et al. 2020, section 3.1 (states); Korthikanti et al. 2022, sections 4.1 to 4.3 and equations
    1, 2, 4 and 5 (activations; 4.2.3: a stage of 1F1B holds those of as many micro-batches as stages follow it).
    """
    states = _states(config, layout)
    on_host = states.optimizer * layout.offload_optimizer + states.weights * layout.offload_weights
    if layout.offload_optimizer:
        states = replace(states, optimizer=0.0, update=0.0)
    if layout.offload_weights:
        states = replace(states, weights=0.0)
    activations = _activations(config, layout)
    lasting = states.weights + states.optimizer + states.lasting_buffers
    working = lasting + states.gathered + states.backward_buffers + activations.kept
    head_gradient = min(states.gradients, 4.0 * held_parameters(config, _head_only(config, layout), layout.tensor))
    between = states.gradients_between if layout.accumulation > 1 else states.gradients_lasting
    phases = {
        "loss": working + between + activations.logits,
        "blocks": working + max(between, states.gradients_lasting + head_gradient) + activations.block,
        "reduce": lasting + states.gradients + states.backward_buffers + states.reduce,
        "update": lasting + states.gradients_lasting + states.update,
    }
    return MemoryEstimate(
        weights_bytes=states.weights,
        gathered_bytes=states.gathered,
        gradients_bytes=states.gradients,
        optimizer_bytes=states.optimizer,
        activations_bytes=activations.kept + activations.recomputed,
        logits_bytes=activations.logits,
        buffers_bytes=states.lasting_buffers + states.backward_buffers,
        host_bytes=activations.host + on_host,
        phase_bytes=phases,
    )


def held_parameters(config: ModelConfig, layers: Iterable[int], tensor: int = 1) -> int:
    """Parameters of these layers (as `Decoder.layers()` counts them) on one process of a tensor group.

    A tied head counts where the embedding is not among them: the stage that computes the loss holds a copy. The
    vocabulary is padded so that each process has a multiple of 8 rows.
    """
    return sum(_parameter_sizes(config, layers, tensor))


def _parameter_sizes(config: ModelConfig, layers: Iterable[int], t: int) -> list[int]:
    """Elements of each parameter of these layers on one process of a tensor group."""
    held, C = set(layers), config.d_model
    rows = -(-config.vocab_size // (t * _VOCABULARY_MULTIPLE)) * _VOCABULARY_MULTIPLE if t > 1 else config.vocab_size
    gpt2 = isinstance(config, GPT2Model)
    tied = isinstance(config, GPT2Model) or config.tied_head
    sizes = sum(1 <= layer <= config.n_layer for layer in held) * _block_parameter_sizes(config, t)
    if 0 in held:
        sizes += [rows * C, config.max_seq_len * C] if gpt2 else [rows * C]
    if config.n_layer + 1 in held:
        sizes += [C, C] if gpt2 else [C]
    if config.n_layer + 2 in held and not (tied and 0 in held):
        sizes.append(rows * C)
    return sizes


def _block_parameter_sizes(config: ModelConfig, t: int) -> list[int]:
    """Of one block: matrices are cut, norms and the biases of what leaves a region are whole."""
    C = config.d_model
    if isinstance(config, GPT2Model):
        matrices, biases = [3 * C * C // t, C * C // t, 4 * C * C // t, 4 * C * C // t], [3 * C // t, C, 4 * C // t, C]
        return [*matrices, *biases, C, C, C, C]
    D = C // config.n_head
    matrices = [(C + 2 * config.n_kv_head * D) * C // t, C * C // t, 2 * config.d_ff * C // t, config.d_ff * C // t]
    return [*matrices, C, C, *[D, D] * config.qk_norm]


def block_elements(config: ModelConfig, layout: MemoryLayout) -> float:
    """Elements a token of a sequence that one block's forward keeps for its backward.

    Fused attention never stores the matrix of scores, so that the term 5as/h of the source is not there (and selective
    recompute, which is that term, saves nothing; that fused attention is found is an assumption). GPT-2: 4C at the
    norms' inputs and outputs and 12C inside the tensor regions. Llama by the same way of counting: norms and
    projections keep their input, the rotation nothing, attention q, k, v and its output, SwiGLU gate, up, silu(gate)
    and the product; QK-norm the product that it norms, and the normed q and k. With the sequence cut over the tensor
    group, the norms' inputs are cut; their outputs are kept whole as the regions gather them.

    Source: Korthikanti et al. 2022, equations 1, 2 and 4.
    """
    C, t = config.d_model, layout.tensor
    norms = 2 * C / (t if layout.tensor_sequence else 1)
    if isinstance(config, GPT2Model):
        return norms + 2 * C + 12 * C / t
    kv = max(config.n_kv_head / t, 1) * (C // config.n_head)
    inside = 2 * C / t + 2 * kv + 4 * config.d_ff / t + (2 * C / t + 3 * kv) * config.qk_norm
    normed = 0.0 if layout.fused else norms  # the norm's steps one by one keep their results as well
    return norms + normed + 2 * C + inside


@dataclass(frozen=True, slots=True)
class _States:
    """Bytes of weights, optimizer and gradients, and of what DeepSpeed needs beside them."""

    weights: float
    gathered: float
    optimizer: float
    gradients: float
    gradients_between: float  # those that are there between micro-batches
    gradients_lasting: float  # those that are there between steps
    lasting_buffers: float
    backward_buffers: float
    reduce: float  # temporary, beside gradients
    update: float  # temporary, beside lasting gradients


def _states(config: ModelConfig, layout: MemoryLayout) -> _States:
    """As the class that DeepSpeed chooses for a stage and a precision keeps them.

    Source: Rajbhandari et al. 2020, section 3.1; DeepSpeed 0.19.8, runtime/zero/stage_1_and_2.py, stage3.py,
    bf16_optimizer.py and engine.py (`allreduce_bucket`). The paper counts 2-byte gradients; here they are in fp32.
    """
    sizes = _parameter_sizes(config, _layers(config, layout), layout.tensor)
    P, largest = sum(sizes), max(sizes)
    d, w, stage = layout.zero_parallel, 4 if layout.dtype == "fp32" else 2, layout.zero_stage
    bucket = layout.buffers.reduce_bucket
    if stage == 0:
        reduce = 4 * min(P, _ALL_REDUCE_ELEMENTS)
        return _States(w * P, 0, 8 * P, 4 * P, 4 * P, 0, 0, 0, reduce, 4 * P)
    optimizer = 12 * P / d
    if stage == 3:
        return _zero3_states(sizes, layout)
    if stage == 2:
        double = 2 if layout.dtype == "fp32" and layout.accumulation > 1 else 1  # the new ones and their sum
        update = 12 if layout.dtype == "fp32" else 4
        buffers = w * bucket * (2 if layout.buffers.overlap else 1)
        return _States(
            w * P, 0, optimizer, 4 * P * double / d, 4 * P / d, 0, 0, buffers, 3 * w * largest, update * P / d
        )
    if layout.dtype == "bf16":  # BF16_Optimizer: fp32 sums last; the bf16 gradients stay until the update is done
        reduce = 6 * min(P, _ALL_REDUCE_ELEMENTS)
        return _States(w * P, 0, optimizer, 6 * P, 6 * P, 4 * P, 0, 0, reduce, 2 * P)
    reduce = 4 * min(P, bucket)
    return _States(w * P, 0, optimizer, 4 * P, 4 * P, 0, 0, 0, reduce, 8 * P / d)


def _zero3_states(sizes: list[int], layout: MemoryLayout) -> _States:
    P, d, w, buffers = sum(sizes), layout.zero_parallel, 4 if layout.dtype == "fp32" else 2, layout.buffers
    small = sum(size for size in sizes if size <= buffers.persistent)
    kept = min(P - small, buffers.max_live, buffers.max_reuse_distance) if d > 1 else 0
    # A gather goes through one buffer for all that it brings, from which the weights are copied out.
    gathering = w * min(P, buffers.prefetch + max(sizes)) if d > 1 else 0
    return _States(
        weights=w * P / d,
        gathered=w * kept,
        optimizer=12 * P / d,
        gradients=4 * P / d,
        gradients_between=4 * P / d,
        gradients_lasting=4 * P / d,
        lasting_buffers=w * (buffers.reduce_bucket + (small if d > 1 else 0)),  # small weights stay whole
        backward_buffers=0,
        reduce=max(w * kept + gathering, 4 * w * max(sizes)),
        update=4 * P / d,
    )


@dataclass(frozen=True, slots=True)
class _Activations:
    """Bytes of activations."""

    kept: float
    recomputed: float
    block: float  # all that the backward of the last block adds to what is kept
    logits: float
    host: float


def _activations(config: ModelConfig, layout: MemoryLayout) -> _Activations:
    C, w = config.d_model, 4 if layout.dtype == "fp32" else 2
    tokens = layout.micro_batch_size * config.max_seq_len / layout.sequence
    residual = C / (layout.tensor if layout.tensor_sequence else 1)  # of the stream between the regions
    masks = _dropout_mask_bytes(config)
    block = tokens * (w * block_elements(config, layout) + 2 * masks * residual)
    at_rest = tokens * w * residual if layout.recompute == "full" else block
    parts = layout.parts if layout.parts is not None else (range(config.n_layer + 3),)
    last = any(config.n_layer + 2 in part for part in parts)
    kept = host = 0.0
    for part, in_flight in zip(parts, layout.in_flight, strict=True):
        blocks = sum(1 <= layer <= config.n_layer for layer in part)
        others = w * (2 * C if config.n_layer + 2 in part else residual if layout.parts is not None else 0)
        others += masks * residual * (0 in part)
        in_host = blocks * at_rest if layout.offload_activations else 0.0
        host += in_flight * in_host
        kept += in_flight * (blocks * at_rest - in_host + tokens * others)
    if layout.parts is not None:  # DeepSpeed's pipeline keeps what it sent and received until a buffer is used again
        kept += tokens * w * 2 * residual
    recomputed = block if layout.recompute == "full" or layout.offload_activations else 0.0
    wide = 2 * 4 * C if isinstance(config, GPT2Model) else 5 * config.d_ff
    gradients = tokens * w * (wide / layout.tensor + C)
    logits = tokens * _logit_bytes(layout) * config.vocab_size / layout.tensor if last else 0.0
    return _Activations(kept, recomputed, recomputed + gradients, logits, host)


def _logit_bytes(layout: MemoryLayout) -> int:
    """Bytes a token and word of the vocabulary where the backward of the loss peaks.

    A logit and its gradient, both in the model's type: the loss works on a few rows at a time. Over a cut vocabulary:
    probabilities and their gradient in fp32, and that in the model's type. A pipeline keeps the logits of two
    micro-batches.
    """
    w = 4 if layout.dtype == "fp32" else 2
    whole = 2 * w if layout.tensor == 1 else 8 + (0 if w == 4 else w)
    return whole + (2 * w if layout.parts is not None else 0)


def _layers(config: ModelConfig, layout: MemoryLayout) -> list[int]:
    parts = layout.parts if layout.parts is not None else (range(config.n_layer + 3),)
    return [layer for part in parts for layer in part]


def _head_only(config: ModelConfig, layout: MemoryLayout) -> list[int]:
    return [layer for layer in _layers(config, layout) if layer == config.n_layer + 2]


def _dropout_mask_bytes(config: ModelConfig) -> int:
    """Bytes of an element of a dropout mask; two residual branches a block have one, and the embedding."""
    return 1 if isinstance(config, GPT2Model) and config.dropout > 0 else 0
