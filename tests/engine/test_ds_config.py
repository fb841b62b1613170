"""What DeepSpeed is told: only keys that it reads, and nothing twice."""

from __future__ import annotations

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from megagpt.engine.ds_config import EXTRA_KEYS, ZERO_KEYS, ds_config
from megagpt.errors import ConfigError
from megagpt.parallel.plan import plan_batches
from tests.tiny import run_config


@pytest.fixture
def settings(tmp_path):
    def make(*overrides, world_size=2):
        config = run_config(tmp_path, tmp_path / "tokens", *overrides)
        return ds_config(config, plan_batches(config, world_size))

    return make


def deepspeed_source(*names):
    from importlib.util import find_spec
    from pathlib import Path

    root = Path(find_spec("deepspeed").origin).parent
    return "\n".join(path.read_text() for name in names for path in sorted(root.glob(name)))


def test_batch_sizes_and_clipping_are_always_said(settings):
    """DeepSpeed clips at 1.0 where the key is absent, and works out batch sizes that are absent."""
    told = settings("optim.grad_clip=0")
    assert told["gradient_clipping"] == 0.0
    assert told["train_batch_size"] == 8
    assert told["train_micro_batch_size_per_gpu"] == 2
    assert told["gradient_accumulation_steps"] == 2


def test_deepspeed_reads_our_values_as_they_are_meant(settings):
    parsed = DeepSpeedConfig(settings("optim.grad_clip=0", "train.dtype=bf16", "parallel.zero_stage=2") | BATCH_FOR_ONE)
    assert parsed.gradient_clipping == 0.0
    assert parsed.zero_optimization_stage == 2
    assert parsed.bfloat16_config.enabled
    assert not parsed.float16_config.enabled
    assert parsed.grad_accum_dtype == "fp32"
    assert parsed.buffer_dtype == "bf16"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_under_muon_deepspeed_neither_clips_nor_shards_nor_wraps_the_optimizer(dtype, settings):
    told = settings("optim.name=muon", f"train.dtype={dtype}", "optim.grad_clip=1", "parallel.zero_stage=1")
    assert told["gradient_clipping"] == 0.0
    assert told["zero_optimization"] == {"stage": 0}
    assert told.keys().isdisjoint({"bf16", "fp16", "data_types"})


BATCH_FOR_ONE = {"train_batch_size": 4}
"""This test is one process; the settings are for two."""


def test_deepspeed_clips_at_1_where_the_key_is_absent(settings):
    """The trap that makes us always say it. Where this fails, the comment in ds_config.py may go."""
    told = settings() | BATCH_FOR_ONE
    del told["gradient_clipping"]
    assert DeepSpeedConfig(told).gradient_clipping == 1.0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_key_is_one_that_deepspeed_reads(stage, dtype, settings):
    if stage == 0 and dtype != "fp32":
        return
    told = settings(f"parallel.zero_stage={stage}", f"train.dtype={dtype}")
    sections = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for name, section in sections.items():
        assert told.get(name, {}).keys() <= section.model_fields.keys()
    source = deepspeed_source("runtime/*.py", "runtime/zero/*.py")
    for key in [*told, *told.get("data_types", {})]:
        assert f'"{key}"' in source, key


CHOSEN = {
    "overlap_communication": (1, True, "overlap_comm"),
    "reduce_bucket_elements": (1, 1234, "reduce_bucket_size"),
    "gather_bucket_elements": (1, 1234, "allgather_bucket_size"),
    "prefetch_elements": (3, 1234, "prefetch_bucket_size"),
    "keep_gathered_below_elements": (3, 1234, "param_persistence_threshold"),
    "max_live_elements": (3, 1234, "max_live_parameters"),
    "update_elements": (3, 1234, "sub_group_size"),
    "shard_within_node": (3, 2, "zero_hpz_partition_size"),
}
"""Our key -> a stage where it means something, a value, and where DeepSpeed keeps what it has read."""


@pytest.mark.parametrize("key", CHOSEN)
def test_deepspeed_takes_a_chosen_size_over_its_own(key, settings):
    stage, value, place = CHOSEN[key]
    words = ["train.micro_batch_size=1"]
    left_out = settings(f"parallel.zero_stage={stage}", *words, world_size=4)
    chosen = settings(f"parallel.zero_stage={stage}", *words, f"parallel.{key}={str(value).lower()}", world_size=4)
    assert ZERO_KEYS[key] not in left_out["zero_optimization"]
    read = [getattr(DeepSpeedZeroConfig(**one["zero_optimization"]), place) for one in (left_out, chosen)]
    assert read[0] != value
    assert read[1] == value


def test_every_key_that_sets_a_size_is_among_the_tested_ones():
    assert ZERO_KEYS.keys() == CHOSEN.keys()


def test_deepspeed_reads_where_state_is_kept(settings):
    words = ("parallel.zero_stage=3", "parallel.offload_weights=cpu", "parallel.offload_optimizer=cpu")
    read = DeepSpeedConfig(settings(*words) | BATCH_FOR_ONE)
    assert read.zero_config.offload_optimizer.device == "cpu"
    assert read.zero_config.offload_param.device == "cpu"
    assert read.zero_force_ds_cpu_optimizer is False
    nowhere = DeepSpeedConfig(settings("parallel.zero_stage=3") | BATCH_FOR_ONE)
    assert nowhere.zero_config.offload_optimizer is None
    assert nowhere.zero_config.offload_param is None
    assert nowhere.zero_force_ds_cpu_optimizer is True


def test_deepspeed_reads_which_disk_the_optimizer_is_on(settings):
    words = ("parallel.zero_stage=3", "parallel.offload_optimizer=nvme", "parallel.nvme_dir=/nvme")
    read = DeepSpeedConfig(settings(*words, "parallel.update_elements=300000") | BATCH_FOR_ONE)
    assert read.zero_config.offload_optimizer.device == "nvme"
    assert str(read.zero_config.offload_optimizer.nvme_path) == "/nvme"
    assert read.zero_config.offload_optimizer.buffer_count == 4
    assert read.zero_config.sub_group_size == 300000


def test_further_settings_of_offload_can_be_passed_through(settings):
    extra = "parallel.extra={zero_optimization: {offload_optimizer: {pin_memory: false}}}"
    told = settings("parallel.offload_optimizer=cpu", extra)
    assert told["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}


@pytest.mark.parametrize("key", sorted(EXTRA_KEYS))
def test_every_key_that_may_be_passed_through_is_one_that_deepspeed_reads(key):
    source = deepspeed_source("runtime/*.py", "runtime/**/*.py", "profiling/*.py", "comm/*.py", "compile/*.py")
    assert f'"{key}"' in source or f"'{key}'" in source


def test_extra_settings_are_added_beside_ours(settings):
    extra = "parallel.extra={zero_optimization: {reduce_bucket_size: 1000}, wall_clock_breakdown: true}"
    told = settings("parallel.zero_stage=2", extra)
    assert told["zero_optimization"] == {"stage": 2, "contiguous_gradients": True, "reduce_bucket_size": 1000}
    assert told["wall_clock_breakdown"] is True


def test_extra_scaler_settings_join_the_precision(settings):
    told = settings("train.dtype=fp16", "parallel.extra={fp16: {loss_scale_window: 5}}")
    assert told["fp16"] == {"enabled": True, "loss_scale_window": 5}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("{zero_optimisation: {}}", r"parallel.extra.zero_optimisation: .*did you mean 'zero_optimization'\?"),
        ("{qqqq: 1}", r"parallel.extra.qqqq: .*known: activation_checkpointing, aio"),
        ("{train_batch_size: 4}", r"parallel.extra.train_batch_size: .*or megagpt sets it"),
        ("{gradient_clipping: 2.0}", r"parallel.extra.gradient_clipping"),
        ("{optimizer: {type: Adam}}", r"parallel.extra.optimizer"),
        ("{zero_optimization: {stage: 3}}", r"parallel.extra.zero_optimization.stage: megagpt sets this itself \(1\)"),
        ("{bf16: {enabled: true}}", r"parallel.extra.bf16: train.dtype is fp32; set train.dtype=bf16"),
        ("{zero_optimization: 3}", r"parallel.extra.zero_optimization: megagpt sets this itself"),
    ],
)
def test_extra_settings_that_are_unknown_or_contradict_ours_are_refused(extra, message, settings):
    with pytest.raises(ConfigError, match=message):
        settings(f"parallel.extra={extra}")
