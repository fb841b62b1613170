"""What a verification runs instead of the real thing: small, and of the same structure."""

from __future__ import annotations

from pathlib import Path

import pytest

from megagpt.config.load import load_config
from megagpt.config.schema import TrainingRun
from megagpt.errors import ConfigError
from megagpt.model.flops import parameter_count
from megagpt.parallel.plan import check_layout, plan_batches
from megagpt.verify.shrink import shrink
from tests.tiny import run_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WORDS = ["run.dir=r", "data.train=d", "optim.lr=1e-3", "train.max_steps=1000", "optim.warmup_steps=100"]


def of_cluster(path, *words):
    model = path.stem.split("_", 2)[2]
    return load_config(TrainingRun, [CONFIGS / "model" / f"{model}.yaml", path], [*WORDS, *words])


@pytest.mark.parametrize("path", sorted((CONFIGS / "cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_cluster_configuration_fits_into_eight_processes(path, tmp_path):
    config = of_cluster(path)
    try:
        check_layout(config)
    except ConfigError as refused:
        assert "this version has no" in str(refused)  # noqa: PT017 - told by another test
        return
    hosts, gpus = map(int, path.stem.split("_")[1].split("x"))
    for world_size in (None, hosts * gpus):
        small = shrink(config, tmp_path, steps=5, processes=None, world_size=world_size)
        assert small.world_size <= 8
        assert parameter_count(small.config.model) < 2_000_000
        assert plan_batches(small.config, small.world_size).data_parallel <= 2
        before, after = config.parallel, small.config.parallel
        for key in ("tensor", "pipeline", "sequence"):
            assert (getattr(before, key) > 1) == (getattr(after, key) > 1)
        for key in ("zero_stage", "tensor_sequence", "pipeline_schedule"):
            assert getattr(before, key) == getattr(after, key)
        assert small.config.train.dtype == "fp32"
        assert small.in_own_dtype is not None
        assert small.in_own_dtype.train.dtype == config.train.dtype
        assert small.config.train.recompute == config.train.recompute
        if world_size is not None:
            real = plan_batches(config, world_size)
            own = plan_batches(small.config, small.world_size)
            assert (real.grad_accum_steps > 1) == (own.grad_accum_steps > 1)
            assert (real.data_parallel > 1) >= (own.data_parallel > 1)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("model.n_head=8", "model.n_kv_head=1", "model.d_model=64", "parallel.tensor=4"), ("kv", 1)),
        (("model.n_head=8", "model.n_kv_head=8", "model.d_model=64", "parallel.tensor=2"), ("equal", True)),
        (("model.n_head=16", "model.n_kv_head=4", "model.d_model=64", "parallel.tensor=2"), ("equal", False)),
    ],
)
def test_heads_keep_their_kind(words, expected, tmp_path):
    config = run_config(tmp_path, tmp_path / "t", *words, family="llama")
    model = shrink(config, tmp_path, steps=5, processes=None, world_size=None).config.model
    if expected[0] == "kv":
        assert model.n_kv_head == expected[1]
    else:
        assert (model.n_kv_head == model.n_head) == expected[1]


def test_remainders_and_uneven_layers_are_kept(tmp_path):
    words = ["model.vocab_size=50257", "model.n_layer=7", "model.max_seq_len=1000", "parallel.pipeline=2"]
    config = run_config(tmp_path, tmp_path / "t", *words, "optim.grad_clip=0.0")
    small = shrink(config, tmp_path, steps=5, processes=None, world_size=None).config
    assert small.model.vocab_size % 128 == 50257 % 128
    assert small.model.n_layer == 3
    assert small.optim.grad_clip == 0.0
    split = run_config(tmp_path, tmp_path / "t", *words, "parallel.pipeline_split=[3,4]")
    assert shrink(split, tmp_path, steps=5, processes=None, world_size=None).config.parallel.pipeline_split == (1, 2)


def test_dropout_and_the_users_data_are_left_out_and_said(tmp_path):
    config = run_config(tmp_path, tmp_path / "mine", "model.dropout=0.1", "train.max_steps=50")
    small = shrink(config, tmp_path / "own", steps=5, processes=None, world_size=None)
    assert small.config.data.train.is_relative_to(tmp_path / "own")
    assert small.config.run.dir.is_relative_to(tmp_path / "own")
    assert {"model.dropout 0.1 -> 0.0", "train.max_steps 50 -> 5"} <= set(small.changes)
    mixed = config.model_copy(update={"data": load_mixture(tmp_path)})
    files = shrink(mixed, tmp_path / "own", steps=5, processes=None, world_size=None).config.data.train
    assert [part.weight for part in files] == [0.7, 0.3]
    assert len({part.prefix for part in files}) == 2


def load_mixture(folder):
    weights = "data.train=[{prefix: a, weight: 0.7}, {prefix: b, weight: 0.3}]"
    return run_config(folder, folder / "t", weights).data


@pytest.mark.parametrize(("dtype", "second"), [("fp32", None), ("bf16", "bf16"), ("fp16", None)])
def test_the_second_run_is_in_the_users_precision_where_a_cpu_can(dtype, second, tmp_path):
    config = run_config(tmp_path, tmp_path / "t", f"train.dtype={dtype}", "parallel.extra={fp16: {}}"
                        if dtype == "fp16" else "parallel.extra={}")  # fmt: skip
    small = shrink(config, tmp_path, steps=5, processes=None, world_size=None)
    assert (small.in_own_dtype.train.dtype if small.in_own_dtype else None) == second
    assert (small.not_run is not None) == (dtype == "fp16")
    assert small.config.parallel.extra == {}


@pytest.mark.parametrize(("processes", "data_parallel", "tensor"), [(2, 1, 2), (4, 2, 2), (8, 4, 2)])
def test_so_many_processes_are_started_as_asked_for(processes, data_parallel, tensor, tmp_path):
    config = run_config(tmp_path, tmp_path / "t", "parallel.tensor=2")
    small = shrink(config, tmp_path, steps=5, processes=processes, world_size=None)
    assert small.world_size == processes
    assert plan_batches(small.config, processes).data_parallel == data_parallel
    assert small.config.parallel.tensor == tensor


def test_what_does_not_fit_or_is_refused_is_said(tmp_path):
    config = run_config(tmp_path, tmp_path / "t", "parallel.tensor=2", "parallel.pipeline=2")
    with pytest.raises(ConfigError, match="3 processes do not hold tensor x pipeline x sequence = 4"):
        shrink(config, tmp_path, steps=5, processes=3, world_size=None)
    with pytest.raises(ConfigError, match="6 processes cannot hold tensor x pipeline x sequence = 4"):
        shrink(config, tmp_path, steps=5, processes=None, world_size=6)
    refused = run_config(tmp_path, tmp_path / "t", "parallel.zero_stage=3", "parallel.pipeline=2")
    with pytest.raises(ConfigError, match="nearest layouts that run"):
        shrink(refused, tmp_path, steps=5, processes=None, world_size=None)
