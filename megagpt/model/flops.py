"""Parameters, FLOPs and memory of a model by closed formulas, without building it and without torch.

Letters: L blocks, C d_model, H query heads, K key and value heads, D d_head, F d_ff, V vocabulary, s sequence length.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from megagpt.config.schema import GPT2Model, LlamaModel

ModelConfig = GPT2Model | LlamaModel
AttentionCount = Literal["full", "causal"]
Recompute = Literal["none", "selective", "full"]

PEAK_TFLOPS: dict[str, float] = {
    "V100": 125,
    "T4": 65,
    "A10": 125,
    "A40": 149.7,
    "A100": 312,
    "A800": 312,
    "L4": 121,
    "L40S": 362,
    "RTX 3090": 71,
    "RTX 4090": 165.2,
    "RTX A6000": 154.8,
    "H100": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H800": 989,
    "H200": 989,
    "H200 NVL": 835,
    "GH200": 989,
    "B200": 2250,
    "GB200": 2500,
}
"""Words of a device's name -> dense bf16 (V100, T4: fp16) tensor-core peak in TFLOP/s.

Source: NVIDIA's data sheets of each product; where they print the rate with 2:4 sparsity, half of it. GeForce and
RTX A6000: the Ampere and Ada white papers, with fp32 accumulation. Training in fp32 is measured against the same peak.
"""


def peak_tflops(device_name: str) -> float | None:
    """Dense peak of an accelerator by the name its driver gives, or None where it is not known.

    `NVIDIA H100 PCIe` is not `NVIDIA H100 80GB HBM3`: the entry with the most words in the name counts.
    """
    words = set(re.split(r"[^A-Z0-9]+", device_name.upper()))
    known = [key for key in PEAK_TFLOPS if set(key.upper().split()) <= words]
    return PEAK_TFLOPS[max(known, key=lambda key: len(key.split()))] if known else None


def parameter_count(config: ModelConfig) -> int:
    """All parameters; a tied head counts once.

    GPT-2: VC + sC + L(12 C^2 + 13 C) + 2C. Llama: VC (twice if untied) + L(2 C^2 + 2KDC + 3CF + 2C) + C, with QK-norm
    2D more a block.
    """
    V, C = config.vocab_size, config.d_model
    if isinstance(config, GPT2Model):
        return V * C + config.max_seq_len * C + config.n_layer * (_block_matmul_count(config) + 13 * C) + 2 * C
    block = _block_matmul_count(config) + 2 * C + 2 * _d_head(config) * config.qk_norm
    return V * C * (1 if config.tied_head else 2) + config.n_layer * block + C


def matmul_parameter_count(config: ModelConfig) -> int:
    """Parameters that are multiplied with every token: weights of the linear maps and the head.

    Not: the embedding's look-up, positions, norms, biases.
    """
    return config.n_layer * _block_matmul_count(config) + config.vocab_size * config.d_model


def flops_per_token(config: ModelConfig, seq_len: int, attention: AttentionCount = "full") -> float:
    """Model FLOPs of forward and backward, per token: 6N + 12 L C s, or 6N + 6 L C s counting the causal half.

    N is `matmul_parameter_count`. Published figures mostly count attention in full (PaLM, nanoGPT), newer ones the
    half that a causal mask leaves (llm.c, Megatron-LM today): name the convention beside every MFU.

    Source: Chowdhery et al. 2022, appendix B; the same as 72BsLh^2(1 + s/6h + V/12Lh) of Korthikanti et al. 2022,
    appendix A.
    """
    return 6.0 * matmul_parameter_count(config) + _attention_flops(config, seq_len, attention)


def layer_flops(config: ModelConfig, seq_len: int) -> list[float]:
    """Model FLOPs per token of each layer that a pipeline can cut between: embedding, blocks, final norm, head.

    They add up to `flops_per_token(config, seq_len, "causal")`. A look-up and a norm multiply no matrices.
    """
    block = 6.0 * _block_matmul_count(config) + _attention_flops(config, seq_len, "causal") / config.n_layer
    return [0.0, *[block] * config.n_layer, 0.0, 6.0 * config.vocab_size * config.d_model]


def hardware_flops_per_token(
    config: ModelConfig, seq_len: int, recompute: Recompute, attention: AttentionCount = "full"
) -> float:
    """FLOPs that the device really does: model FLOPs and what recompute repeats.

    `full` runs the forward (a third of the FLOPs) of every block again, not the head; `selective` that of the
    attention core. PyTorch stops a recomputation at the last tensor that backward needs, so it really leaves out the
    block's last product; the convention does not.

    Source: Narayanan et al. 2021, equation 3, for `full`: 96BsLh^2(1 + s/6h + V/16Lh).
    """
    core = _attention_flops(config, seq_len, attention) / 3
    blocks = 2.0 * config.n_layer * _block_matmul_count(config) + core
    again = {"none": 0.0, "selective": core, "full": blocks}
    return flops_per_token(config, seq_len, attention) + again[recompute]


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes on one device. Not counted: the allocator's slack, DeepSpeed's buckets, the CUDA context (a few GB)."""

    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float
    activations_bytes: float
    logits_bytes: float

    @property
    def total_bytes(self) -> float:
        """The sum."""
        return (
            self.weights_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.logits_bytes
        )


def memory_bytes(
    config: ModelConfig,
    *,
    micro_batch_size: int,
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16",
    zero_stage: int = 1,
    data_parallel: int = 1,
    recompute: Recompute = "none",
    gradient_bytes: int = 4,
) -> MemoryEstimate:
    """Estimate of one device's memory for sequences of `max_seq_len` tokens.

    Args:
        config: the model.
        micro_batch_size: sequences run at once.
        dtype: of weights and activations.
        zero_stage: 1 shards the optimizer over `data_parallel`, 2 gradients as well, 3 weights as well.
        data_parallel: processes that share a copy of the optimizer.
        recompute: what backward recomputes.
        gradient_bytes: 4 where gradients are accumulated in fp32, as megagpt has DeepSpeed do; 2 in the ZeRO paper.

    Source: Rajbhandari et al. 2020, section 3.1: with 2-byte weights the optimizer holds fp32 weights and two moments
    (12 bytes), in fp32 the moments alone (8). Activations: `_activation_elements`. Approximate: a pipeline, tensor
    parallelism, offloading and the buckets of ZeRO are not in it, and ZeRO-3's gathered block counts as one block.
    """
    parameters = parameter_count(config)
    weight_bytes = 4 if dtype == "fp32" else 2
    optimizer_bytes = 8 if dtype == "fp32" else 12
    tokens = micro_batch_size * config.max_seq_len
    gathered = _block_matmul_count(config) * weight_bytes if zero_stage >= 3 else 0
    return MemoryEstimate(
        weights_bytes=parameters * weight_bytes / (data_parallel if zero_stage >= 3 else 1) + gathered,
        gradients_bytes=parameters * gradient_bytes / (data_parallel if zero_stage >= 2 else 1),
        optimizer_bytes=parameters * optimizer_bytes / (data_parallel if zero_stage >= 1 else 1),
        activations_bytes=tokens * _activation_elements(config, recompute) * weight_bytes
        + tokens * _dropout_mask_bytes(config, recompute),
        logits_bytes=float(tokens * config.vocab_size * _LOGIT_BYTES[dtype]),
    )


def muon_state_bytes(config: ModelConfig) -> int:
    """Bytes that Muon keeps on all processes together, whatever `train.dtype` is.

    fp32 weights, one momentum for each matrix of the blocks, and two moments for everything else.
    """
    matrices = config.n_layer * _block_matmul_count(config)
    return 8 * matrices + 12 * (parameter_count(config) - matrices)


_LOGIT_BYTES = {"fp32": 8, "bf16": 4, "fp16": 4}
"""A logit and its gradient, both in the model's type: the loss works on a few rows at a time."""


def _d_head(config: ModelConfig) -> int:
    return config.d_model // config.n_head


def _block_matmul_count(config: ModelConfig) -> int:
    """Weights of a block's linear maps. GPT-2: 12 C^2; Llama: 2 C^2 + 2KDC + 3CF."""
    C = config.d_model
    if isinstance(config, GPT2Model):
        return 12 * C * C
    return 2 * C * C + 2 * config.n_kv_head * _d_head(config) * C + 3 * C * config.d_ff


def _attention_flops(config: ModelConfig, seq_len: int, attention: AttentionCount) -> float:
    """Two products (q k^T, weights v) of 2 HDs FLOPs a token, three times for forward and backward: 12 L C s."""
    full = 12.0 * config.n_layer * config.d_model * seq_len
    return full / 2 if attention == "causal" else full


def _activation_elements(config: ModelConfig, recompute: Recompute) -> int:
    """Elements a token that the forward keeps for the backward, the embedding's and the final norm's output included.

    Source: Korthikanti et al. 2022, equation 1, without its term 5as/h: fused attention never stores the matrix of
    scores (so selective recompute, which is that term, saves nothing here; that fused attention is found is an
    assumption). Llama by the same way of counting: norms and projections keep their input, the rotation nothing, the
    fused attention q, k, v and its output, SwiGLU gate, up, silu(gate) and the product; QK-norm the product that it
    norms, and the normed q and k.
    """
    C = config.d_model
    if isinstance(config, GPT2Model):
        block = 16 * C
    else:
        kv = config.n_kv_head * _d_head(config)
        block = 6 * C + 2 * kv + 4 * config.d_ff + (2 * C + 3 * kv) * config.qk_norm
    stored = C * config.n_layer + block if recompute == "full" else block * config.n_layer
    return stored + 2 * C


def _dropout_mask_bytes(config: ModelConfig, recompute: Recompute) -> int:
    """Bytes a token of the dropout masks, one byte an element: two residual branches a block, and the embedding."""
    if not isinstance(config, GPT2Model) or config.dropout == 0:
        return 0
    blocks = 1 if recompute == "full" else config.n_layer
    return (2 * blocks + 1) * config.d_model
