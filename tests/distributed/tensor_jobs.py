"""What every process of a tensor group does for test_tensor.py without an engine."""

from __future__ import annotations

import json
import os
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from megagpt.config.schema import TrainingRun
from megagpt.engine.engine import init_distributed
from megagpt.model.decoder import Decoder
from megagpt.model.loss import IGNORED_TARGET
from megagpt.model.recompute import apply_recompute
from megagpt.parallel.apply_tensor import prepare_parameters
from megagpt.parallel.cross_entropy import vocab_parallel_nll
from megagpt.parallel.mesh import Mesh, make_mesh
from megagpt.parallel.tensor import RankedDropout, vocabulary_shard
from megagpt.train.build import build_share
from megagpt.train.loop import seed_random_numbers


def join(config: TrainingRun) -> Mesh:
    torch.set_num_threads(1)
    init_distributed(timedelta(seconds=120), device_type="cpu")
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return make_mesh(rank, world_size, rank, torch.device("cpu"), config.parallel)


def cut_model(config: TrainingRun, mesh: Mesh) -> Decoder:
    model = build_share(config, mesh)
    prepare_parameters(model, model.shards, mesh)
    return model


def save_initial_weights(configs: list[TrainingRun], folder: Path) -> None:
    """Each process writes its parameters as they are, and whether DeepSpeed counts them once or on every process."""
    mesh = join(configs[0])
    for index, config in enumerate(configs):
        parameters = dict(cut_model(config, mesh).named_parameters())
        tagged = [name for name, parameter in parameters.items() if getattr(parameter, "tensor_model_parallel", False)]
        torch.save((parameters, tagged), folder / f"{index}-{mesh.tensor}-{mesh.tensor_rank}.pt")
    mesh.barrier()
    torch.distributed.destroy_process_group()


def measure_loss(config: TrainingRun, out: Path) -> None:
    """The cut cross-entropy and its gradient beside PyTorch's own, for several vocabularies and types."""
    mesh = join(config)
    found = []
    for vocab_size in (61, 64, 9, 300):
        for dtype in (torch.float32, torch.bfloat16):
            generator = torch.Generator().manual_seed(vocab_size)
            whole = (30 * torch.randn(3, 5, vocab_size, generator=generator)).to(dtype).requires_grad_()
            targets = torch.randint(vocab_size, (3, 5), generator=generator)
            targets[0, 1] = targets[2, 4] = IGNORED_TARGET
            expected = F.cross_entropy(whole.float().flatten(0, 1), targets.flatten(), reduction="sum")
            (3 * expected).backward()
            shard = vocabulary_shard(vocab_size, 1, RegionSizes(mesh))
            ((start, size),) = shard.spans
            padding = torch.full((3, 5, shard.local_size - size), 100.0, dtype=dtype)  # must not count
            own = torch.cat((whole.detach()[..., start : start + size], padding), -1).requires_grad_()
            nll = vocab_parallel_nll(own, targets, shard, mesh.groups.tensor)
            (3 * nll).backward()
            wanted = whole.grad[..., start : start + size].float()
            found.append(
                {
                    "nll": [float(nll), float(expected)],
                    "gradient_error": float((own.grad[..., :size].float() - wanted).abs().sum()),
                    "gradient_size": float(wanted.abs().sum()),
                    "padding_gradient": float(own.grad[..., size:].abs().sum()),
                    "dtypes": [str(nll.dtype), str(own.grad.dtype)],
                }
            )
    gathered = mesh.gather(found)
    if mesh.is_main:
        out.write_text(json.dumps(gathered))
    mesh.barrier()
    torch.distributed.destroy_process_group()


class RegionSizes:
    """The integers of a region."""

    def __init__(self, mesh: Mesh) -> None:
        self.size, self.rank = mesh.tensor, mesh.tensor_rank


def measure_dropout(config: TrainingRun, out: Path) -> None:
    """What dropout draws on this process, inside of the regions and between them; rank 0 writes what all drew."""
    mesh = join(config)
    model = cut_model(config, mesh).train()
    tokens = torch.arange(2 * 16).view(2, 16) % config.model.vocab_size
    drawn: dict[str, list[float]] = {}

    def watch(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        drawn["residual"] = output.flatten().tolist()

    watching = model.blocks[0].register_forward_hook(watch)
    seed_random_numbers(1, 0, mesh)
    model.nll(model(tokens), tokens).backward()
    watching.remove()
    drawn["after"] = torch.rand(3).tolist()
    core = model.blocks[0].attention.core
    ones = torch.ones(1, 16, core_heads(model), 4)
    drawn["attention"] = core(0 * ones, 0 * ones, ones).flatten().tolist()
    if config.parallel.tensor_sequence:
        (dropout, *_) = [module for module in model.modules() if isinstance(module, RankedDropout)]
        drawn["residual_mask"] = dropout(torch.ones(64)).tolist()
    drawn["end"] = torch.rand(3).tolist()
    drawn["norm_gradient"] = model.blocks[0].attention_norm.weight.grad.tolist()
    drawn["recomputed"] = gradients_equal_when_recomputed(model, tokens, mesh)
    gathered = mesh.gather(drawn)
    if mesh.is_main:
        out.write_text(json.dumps(gathered))
    mesh.barrier()
    torch.distributed.destroy_process_group()


def core_heads(model: Decoder) -> int:
    return model.blocks[0].attention.n_head


def gradients_equal_when_recomputed(model: Decoder, tokens: torch.Tensor, mesh: Mesh) -> list[float]:
    gradients = []
    for kind in ("none", "selective", "full"):
        apply_recompute(model, kind)
        model.zero_grad()
        seed_random_numbers(1, 0, mesh)
        model.nll(model(tokens), tokens).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    return [float(torch.equal(gradients[0], other)) for other in gradients[1:]]
