"""Initial weights that depend on (seed, parameter name, shape) alone: the same in every layout, bit for bit.

Each parameter has a generator of its own, on the CPU and in fp32, seeded by a hash of the run's seed and its name. So
the order in which layers are built, the device, and the rank that cuts a shard from it make no difference.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from megagpt.model.decoder import Decoder


@dataclass(frozen=True, slots=True)
class InitRule:
    """Normal with mean 0 and this standard deviation, or a constant where `std` is 0."""

    std: float = 0.0
    constant: float = 0.0
    residual: bool = False
    """The weight writes into the residual stream: `std` is divided by sqrt(2 n_layer)."""


INIT_RULES: dict[str, InitRule] = {
    "embedding.tokens.weight": InitRule(std=0.02),
    "embedding.positions.weight": InitRule(std=0.01),
    "head.weight": InitRule(std=0.02),
    "blocks.*.attention.qkv.weight": InitRule(std=0.02),
    "blocks.*.attention.output.weight": InitRule(std=0.02, residual=True),
    "blocks.*.attention.qk_norm.query_weight": InitRule(constant=1.0),
    "blocks.*.attention.qk_norm.key_weight": InitRule(constant=1.0),
    "blocks.*.feed_forward.up.weight": InitRule(std=0.02),
    "blocks.*.feed_forward.gate_up.weight": InitRule(std=0.02),
    "blocks.*.feed_forward.down.weight": InitRule(std=0.02, residual=True),
    "blocks.*_norm.weight": InitRule(constant=1.0),
    "final_norm.weight": InitRule(constant=1.0),
    "*.bias": InitRule(constant=0.0),
}
"""Parameter name -> rule; the first pattern that matches counts.

Source: 0.02 for matrices and embeddings, 0.01 for positions: OpenAI's GPT-2 code (src/model.py). Residual projections
divided by the square root of the number of residual layers: Radford et al. 2019, section 2.3. For Llama the same
(0.02: Hugging Face's `initializer_range`; scaled residual projections: Groeneveld et al. 2024 and Megatron-LM).
"""


def init_weights(model: Decoder, seed: int) -> None:
    """Give every parameter its initial value, and fill the buffers.

    Raises:
        LookupError: a parameter has no rule: add it to `INIT_RULES`.
        ValueError: a parameter is still on the meta device: call `model.to_empty(device=...)` first.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device; call model.to_empty(device=...) before init_weights")
    with torch.no_grad():
        for parameter, value in initial_weights(model, seed):
            parameter.copy_(value)
    model.reset_buffers()


def initial_weights(model: Decoder, seed: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Every parameter with its initial value, fp32 on the CPU: one whole tensor at a time, cut as `model.shards` say.

    Raises:
        LookupError: a parameter has no rule: add it to `INIT_RULES`.
    """
    n_layer = len(model.blocks)
    for name, parameter in model.named_parameters():
        shard = model.shards.get(name)
        shape = shard.shape if shard is not None else parameter.shape
        logical = model.logical_name(name)
        value = initial_value(logical, shape, seed, rule_for(logical, n_layer))
        yield parameter, shard.cut(value) if shard is not None else value


def rule_for(name: str, n_layer: int) -> InitRule:
    """The rule of one parameter, with the residual scaling worked in.

    Raises:
        LookupError: no pattern of `INIT_RULES` matches.
    """
    for pattern, rule in INIT_RULES.items():
        if fnmatchcase(name, pattern):
            return InitRule(std=rule.std / math.sqrt(2 * n_layer)) if rule.residual else rule
    raise LookupError(f"no initial value is defined for parameter {name!r}; add a pattern to INIT_RULES")


def initial_value(name: str, shape: tuple[int, ...], seed: int, rule: InitRule) -> Tensor:
    """The full initial tensor of one parameter, fp32 on the CPU. Shards are cut from it."""
    if rule.std == 0:
        return torch.full(shape, rule.constant, dtype=torch.float32, device="cpu")
    generator = torch.Generator(device="cpu").manual_seed(_parameter_seed(name, seed))
    value = torch.empty(shape, dtype=torch.float32, device="cpu")
    return value.normal_(mean=0.0, std=rule.std, generator=generator)


def _parameter_seed(name: str, seed: int) -> int:
    """64 bits that are the same on every machine (Python's own `hash` is not)."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
