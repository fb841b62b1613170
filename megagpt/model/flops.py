"""Parameters and FLOPs of a model by closed formulas, without building it and without torch.

Letters: L blocks, C d_model, H query heads, K key and value heads, D d_head, F d_ff, V vocabulary, s sequence length.
"""

from __future__ import annotations

import re
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


def muon_state_bytes(config: ModelConfig) -> int:
    """Bytes that Muon keeps on all processes together, whatever `train.dtype` is.

    fp32 weights, one momentum for each matrix of the blocks, and two moments for everything else.
    """
    matrices = config.n_layer * _block_matmul_count(config)
    return 8 * matrices + 12 * (parameter_count(config) - matrices)


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
