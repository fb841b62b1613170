"""What every process of a sequence group does for test_sequence.py without an engine."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from megagpt.config.schema import TrainingRun
from megagpt.model.build import build_model
from megagpt.model.decoder import Decoder
from megagpt.model.init import init_weights
from megagpt.model.layers import AttentionCore
from megagpt.model.loss import next_token_nll
from megagpt.model.rotary import Rotary
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.sequence import SequenceParallelCore
from megagpt.train.build import build_share
from megagpt.train.loop import seed_random_numbers
from tests.distributed.tensor_jobs import cut_model, gradients_equal_when_recomputed, join


def tell(mesh: Mesh, found: object, out: Path) -> None:
    """Rank 0 writes what all found."""
    gathered = mesh.gather(found)
    if mesh.is_main:
        out.write_text(json.dumps(gathered))
    mesh.barrier()
    torch.distributed.destroy_process_group()


def measure_heads(config: TrainingRun, heads: list[tuple[int, int]], out: Path) -> None:
    """Attention between two all-to-alls, and the gradients of its inputs, beside attention over the whole sequence."""
    mesh = join(config)
    found = []
    for n_head, n_kv_head in heads:
        generator = torch.Generator().manual_seed(n_head)
        shapes = [(2, 8, count, 6) for count in (n_head, n_kv_head, n_kv_head)]
        whole = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        weights = torch.randn(2, 8, n_head * 6, generator=generator)
        expected = AttentionCore(n_head, n_kv_head)(*whole)
        (expected * weights).sum().backward()

        def own(x: Tensor) -> Tensor:
            return x.detach().chunk(mesh.sequence, dim=1)[mesh.sequence_rank]

        n_kv_local = max(1, n_kv_head // mesh.sequence)
        core = AttentionCore(n_head // mesh.sequence, n_kv_local)
        inputs = [own(x).clone().requires_grad_() for x in whole]
        attended = SequenceParallelCore(core, mesh.groups.sequence, mesh.sequence)(*inputs)
        (attended * own(weights)).sum().backward()
        pairs = [(attended, expected), *((x.grad, y.grad) for x, y in zip(inputs, whole, strict=True))]
        found.append([float((a - own(b)).abs().max() / b.abs().max()) for a, b in pairs])
    tell(mesh, found, out)


def measure_mistakes(configs: dict[str, TrainingRun], out: Path) -> None:
    """How far loss and gradients are from one process's, as things are and with something done wrong."""
    mesh = join(next(iter(configs.values())))
    found = {}
    for family, config in configs.items():
        for mistake, commit in MISTAKES.items():
            model = build_share(config, mesh)
            commit(model)
            found[f"{family}-{mistake}"] = deviation(model, config, mesh)
    tell(mesh, found, out)


def _begin_at_zero(model: Decoder) -> None:
    model.embedding.stretch = 0
    for module in model.modules():
        if isinstance(module, Rotary):
            module.stretch = 0


def _lose_gradients_of_copies(model: Decoder) -> None:
    for module in model.modules():
        if isinstance(module, SequenceParallelCore):
            heads_of_each = module._heads_of_each

            def first_alone(x: Tensor, heads_of_each=heads_of_each, size: int = module.size) -> Tensor:
                parts = heads_of_each(x)
                copies = size // min(size, x.shape[2])
                kept = torch.arange(size) % copies == 0
                return torch.where(kept.view(-1, 1, 1, 1, 1), parts, parts.detach())

            module._heads_of_each = first_alone  # type: ignore[method-assign]


def _look_at_own_stretch_alone(model: Decoder) -> None:
    for block in model.blocks:
        core = block.attention.core.core
        core.grouped = block.attention.n_head != block.attention.n_kv_head
        block.attention.core = core


MISTAKES = {
    "none": lambda model: None,
    "positions": _begin_at_zero,
    "copies": _lose_gradients_of_copies,
    "stretch": _look_at_own_stretch_alone,
}


def deviation(model: Decoder, config: TrainingRun, mesh: Mesh) -> list[float]:
    """Relative to one process: of the loss, and of the gradients, the largest over all parameters."""
    tokens = torch.arange(3 * 17).view(3, 17) * 7 % config.model.vocab_size
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    whole = build_model(config.model)
    init_weights(whole, config.run.seed)
    expected = next_token_nll(whole(inputs), targets)
    expected.backward()
    own_inputs, own_targets = (x.chunk(mesh.sequence, dim=1)[mesh.sequence_rank] for x in (inputs, targets))
    nll = model.nll(model(own_inputs), own_targets)
    nll.backward()
    (total,) = mesh.sum(float(nll))
    worst = 0.0
    for (name, found), wanted in zip(model.named_parameters(), whole.parameters(), strict=True):
        torch.distributed.all_reduce(found.grad, group=mesh.groups.zero)
        difference = (found.grad - wanted.grad).norm() / wanted.grad.norm().clamp_min(1e-3)
        assert torch.isfinite(difference), name
        worst = max(worst, float(difference))
    return [abs(total - float(expected)) / float(expected), worst]


def measure_dropout(config: TrainingRun, out: Path) -> None:
    """What dropout draws on this process; with the same numbers everywhere, and with those of a step."""
    mesh = join(config)
    model = cut_model(config, mesh).train()
    attention = model.blocks[0].attention
    tokens = torch.arange(2 * 16).view(2, 16)[:, : 16 // mesh.sequence] % config.model.vocab_size

    def draw() -> dict[str, list[float]]:
        nothing = torch.zeros(1, 16 // mesh.sequence, attention.n_head, 6)
        attended = attention.core(nothing, nothing, nothing + 1)  # (1, T / s, H * D)
        local = attended.unflatten(-1, (attention.n_head, 6))[..., 0]  # what remains of each head
        stretches = [torch.empty_like(local) for _ in range(mesh.sequence)]
        torch.distributed.all_gather(stretches, local.contiguous(), group=mesh.groups.sequence)
        first, other = torch.cat(stretches, 1)[0].detach().chunk(mesh.sequence, dim=-1)
        return {
            "first_heads": first.flatten().tolist(),
            "other_heads": other.flatten().tolist(),
            "residual": attention.dropout(torch.ones(64)).tolist(),
        }

    torch.manual_seed(5)
    found: dict[str, object] = {"in_step": draw()}
    seed_random_numbers(1, 0, mesh)
    found["own"] = draw()
    found["recomputed"] = gradients_equal_when_recomputed(model, tokens, mesh)
    tell(mesh, found, out)
