"""Muon's rule beside exact singular values and beside PyTorch's own Muon."""

from __future__ import annotations

import pytest
import torch

from megagpt.engine.muon import NS_COEFFICIENTS, NS_EPS, SCALES, momentum_direction, orthogonalized
from megagpt.engine.sharded_muon import ShardedMuon
from megagpt.model.build import build_model
from megagpt.model.flops import muon_state_bytes
from megagpt.model.init import init_weights
from megagpt.parallel.mesh import Mesh
from megagpt.train.optim import parameter_groups
from tests.tiny import run_config

SHAPES = [(24, 24), (24, 96), (96, 24), (1, 16), (200, 64)]


def matrix(shape, least=0.1):
    """Random singular vectors; singular values from 1 down to `least`, evenly on a logarithmic scale."""
    generator = torch.Generator().manual_seed(shape[0] * 1000 + shape[1])
    u, values, v = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, torch.tensor(least).log10(), len(values), dtype=torch.float64)
    return (u * values) @ v


def by_singular_values(whole, steps):
    """What the iteration should give, in fp64: U p(p(...p(S / |S|))) V^T."""
    u, values, v = torch.linalg.svd(whole.double(), full_matrices=False)
    values = values / values.norm()
    a, b, c = NS_COEFFICIENTS
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return (u * values) @ v


def relative(found, expected):
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("steps", [1, 5, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_iteration_works_on_singular_values_and_leaves_singular_vectors(shape, steps):
    whole = matrix(shape)
    assert relative(orthogonalized(whole.float(), steps, torch.float32), by_singular_values(whole, steps)) < 2e-5


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("shape", SHAPES)
def test_five_steps_bring_singular_values_near_one(shape, dtype, error):
    """Down to 0.003 of the norm, in fp32; bf16 blurs them by its rounding."""
    found = torch.linalg.svdvals(orthogonalized(matrix(shape, least=0.05).float(), 5, dtype).double())
    assert 0.68 - error < found.min()
    assert found.max() < 1.21 + error


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_gives_nearly_what_fp32_gives(shape):
    whole = matrix(shape).float()
    assert 1e-4 < relative(orthogonalized(whole, 5, torch.bfloat16), orthogonalized(whole, 5, torch.float32)) < 0.03


def test_a_factor_on_the_matrix_changes_nothing():
    """So clipping a gradient does not shrink the update that it makes."""
    whole = matrix((24, 40)).float()
    expected = orthogonalized(whole, 5, torch.float32)
    for factor in (1e-10, 1e-3, 1e6):
        assert relative(orthogonalized(whole * factor, 5, torch.float32), expected) < 1e-5
    assert (
        relative(orthogonalized(whole * NS_EPS * 1e-3, 5, torch.float32), expected) > 0.1
    )  # the guard of a zero matrix
    assert torch.equal(orthogonalized(torch.zeros(3, 4), 5, torch.float32), torch.zeros(3, 4))


def test_two_matrices_in_one_are_not_two_matrices():
    """Why fused weights are taken apart and cut ones put together: it makes another update."""
    upper, lower = matrix((24, 24)).float(), 100 * matrix((24, 24), least=0.2).float()
    both = orthogonalized(torch.cat([upper, lower]), 5, torch.float32)
    each = torch.cat([orthogonalized(part, 5, torch.float32) for part in (upper, lower)])
    assert relative(both, each) > 0.1


@pytest.mark.parametrize(("scale", "theirs"), [("rms", "match_rms_adamw"), ("spectral", "original")])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(24, 24), (24, 96), (96, 24)])
def test_ten_updates_equal_pytorch_s_muon(shape, nesterov, scale, theirs):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator)
    parameter = torch.nn.Parameter(weight.clone())
    peer = torch.optim.Muon(
        [parameter], lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=nesterov, ns_steps=5, adjust_lr_fn=theirs
    )
    momentum = torch.zeros(shape)
    for _ in range(10):
        gradient = torch.randn(shape, generator=generator)
        parameter.grad = gradient.clone()
        peer.step()
        direction = momentum_direction(gradient, momentum, 0.9, nesterov=nesterov)
        update = orthogonalized(direction, 5, torch.bfloat16) * SCALES[scale](*shape)
        weight = weight * (1 - 0.02 * 0.1) - 0.02 * update
    moved = relative(weight, torch.randn(shape, generator=torch.Generator().manual_seed(3)))
    assert relative(weight, parameter.detach()) < 0.02 * moved  # theirs is in bf16, whose rounding differs


def alone(config, dtype):
    """A model of one process with its optimizer."""
    model = build_model(config.model)
    init_weights(model, 1)
    mesh = Mesh(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
    optimizer = ShardedMuon(model, parameter_groups(model, 0.1), config.optim, mesh, sharded=True, dtype=dtype)
    return model.to(dtype), optimizer


def test_gradients_of_bf16_micro_batches_add_up_in_fp32(tmp_path):
    """1 + 2^-10 is 1 in bf16."""
    model, optimizer = alone(run_config(tmp_path, tmp_path / "t", "optim.name=muon"), torch.bfloat16)
    for gradient in (1.0, 2.0**-10):
        sum((gradient * parameter).sum() for parameter in model.parameters()).backward()
    gradients, _ = optimizer.get_grads_for_reduction()
    assert len(gradients) == len(list(model.parameters()))
    assert all(torch.equal(found, torch.full_like(found, 1 + 2.0**-10)) for found in gradients)
    assert all(found.dtype == torch.float32 for found in gradients)


def test_master_weights_move_by_less_than_bf16_can_tell(tmp_path):
    """Ten updates of 1e-5 of a weight leave bf16 where it was, and must not be lost; they start from fp32 weights."""
    model, optimizer = alone(run_config(tmp_path, tmp_path / "t", "optim.name=muon", "optim.lr=1e-6"), torch.bfloat16)
    name, parameter = next((n, p) for n, p in model.named_parameters() if n.endswith("qkv.weight"))
    start, shown = optimizer.owned_slice(name, parameter).values["weight"].clone(), parameter.detach().clone()
    assert not torch.equal(start, start.bfloat16().float())
    for _ in range(10):
        model(torch.arange(16)[None]).float().logsumexp(-1).sum().backward()
        optimizer.step()
    moved = optimizer.owned_slice(name, parameter).values["weight"] - start
    assert 0 < moved.abs().max() < 1e-4
    assert torch.count_nonzero(moved) > 0.9 * moved.numel()
    assert torch.count_nonzero(parameter.detach() != shown) < 0.1 * moved.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_state_is_of_the_size_that_the_plan_tells(family, dtype, tmp_path):
    config = run_config(tmp_path, tmp_path / "t", "optim.name=muon", family=family)
    model, optimizer = alone(config, dtype)
    model(torch.zeros(1, 4, dtype=torch.int64)).float().sum().backward()
    optimizer.step()
    slices = [optimizer.owned_slice(name, parameter) for name, parameter in model.named_parameters()]
    assert sum(4 * value.numel() for one in slices for value in one.values.values()) == muon_state_bytes(config.model)
