"""Batch arithmetic by hand, and which samples each rank takes."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megagpt.errors import ConfigError
from megagpt.parallel.plan import REFUSALS, BatchPlan, check_layout, plan_batches
from tests.tiny import SEQ_LEN, run_config


@pytest.fixture
def config(tmp_path):
    def make(*overrides):
        family = "llama" if LLAMA[0] in overrides else "gpt2"
        words = [word for word in overrides if word not in LLAMA]
        return run_config(tmp_path, tmp_path / "tokens", *words, family=family)

    return make


def test_a_step_is_divided_over_processes_and_micro_batches(config):
    plan = plan_batches(config("train.global_batch_size=24", "train.micro_batch_size=2"), world_size=3)
    assert plan == BatchPlan(data_parallel=3, micro_batch_size=2, grad_accum_steps=4, seq_len=SEQ_LEN)
    assert plan.global_batch_size == 24
    assert plan.tokens_per_step == 24 * SEQ_LEN
    assert plan.sample_indices(step=1, data_parallel_rank=2) == [
        range(28, 30),
        range(34, 36),
        range(40, 42),
        range(46, 48),
    ]


@pytest.mark.parametrize(
    ("world_size", "batch", "micro", "nearest"),
    [(3, 8, 2, "= 6; the nearest that fit: 6 or 12"), (4, 4, 2, "= 8; the nearest that fit: 8;"), (5, 12, 4, "= 20")],
)
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_do(world_size, batch, micro, nearest, config):
    with pytest.raises(ConfigError, match=rf"train.global_batch_size \({batch}\) must be a multiple.*{nearest}"):
        plan_batches(config(f"train.global_batch_size={batch}", f"train.micro_batch_size={micro}"), world_size)


@given(
    data_parallel=st.integers(1, 9),
    micro=st.integers(1, 5),
    accumulation=st.integers(1, 5),
    step=st.integers(0, 10**12),
)
def test_the_ranks_of_any_layout_share_out_the_samples_of_a_step(data_parallel, micro, accumulation, step):
    plan = BatchPlan(data_parallel, micro, accumulation, seq_len=8)
    per_rank = [plan.sample_indices(step, rank) for rank in range(data_parallel)]
    assert all(len(ranges) == accumulation and all(len(one) == micro for one in ranges) for ranges in per_rank)
    taken = sorted(index for ranges in per_rank for one in ranges for index in one)
    batch = plan.global_batch_size
    assert taken == list(range(step * batch, (step + 1) * batch))


LLAMA = ("family=llama",)
MUON = "optim.name=muon"
ON_DISK = ("parallel.zero_stage=3", "parallel.offload_optimizer=nvme", "parallel.nvme_dir=/nvme")

REFUSED = {
    "train.compile with parallel.zero_stage=3": ("train.compile=true", "parallel.zero_stage=3"),
    "train.compile with parallel.tensor": ("train.compile=true", "parallel.tensor=2"),
    "train.compile with train.recompute=selective": ("train.compile=true", "train.recompute=selective"),
    "zero_stage=0 with bf16": ("parallel.zero_stage=0", "train.dtype=bf16"),
    "zero_stage=0 with fp16": ("parallel.zero_stage=0", "train.dtype=fp16"),
    "parallel.offload_optimizer with parallel.zero_stage=0": (
        "parallel.zero_stage=0",
        "parallel.offload_optimizer=cpu",
    ),
    "this version has no offload of weights to disks": ("parallel.zero_stage=3", "parallel.offload_weights=nvme"),
    "parallel.offload_optimizer=nvme below": ("parallel.offload_optimizer=nvme", "parallel.nvme_dir=/nvme"),
    "parallel.offload_optimizer=nvme without": ("parallel.zero_stage=3", "parallel.offload_optimizer=nvme"),
    "parallel.nvme_dir without": ("parallel.zero_stage=3", "parallel.nvme_dir=/nvme"),
    "parallel.update_elements below 262144": (*ON_DISK, "parallel.update_elements=262143"),
    "parallel.extra.aio or": (*ON_DISK, "parallel.extra={zero_optimization: {offload_optimizer: {ratio: 0.5}}}"),
    "parallel.offload_weights below": ("parallel.offload_weights=cpu", "parallel.zero_stage=2"),
    "below parallel.zero_stage=3: nothing is gathered": ("parallel.prefetch_elements=0",),
    "parallel.gather_bucket_elements with parallel.zero_stage 0 or 3": (
        "parallel.gather_bucket_elements=1000",
        "parallel.zero_stage=3",
    ),
    "parallel.gather_bucket_elements is odd": ("parallel.gather_bucket_elements=1001",),
    "gradients are reduced all together there": ("train.dtype=bf16", "parallel.reduce_bucket_elements=1000"),
    "parallel.overlap_communication with parallel.pipeline above 1": (
        "parallel.overlap_communication=true",
        "parallel.pipeline=2",
    ),
    "parallel.shard_within_node with parallel.tensor above 1": (
        "parallel.shard_within_node=2",
        "parallel.tensor=2",
        "parallel.zero_stage=3",
    ),
    "parallel.tensor does not divide model.n_head": ("parallel.tensor=3",),
    "parallel.tensor and model.n_kv_head": (*LLAMA, "model.n_head=12", "model.n_kv_head=6", "parallel.tensor=4"),
    "parallel.tensor does not divide the channels": (*LLAMA, "model.n_kv_head=1", "parallel.tensor=4"),
    "parallel.tensor does not divide model.d_ff": (*LLAMA, "model.d_ff=37", "parallel.tensor=2"),
    "parallel.zero_stage above 1 with parallel.pipeline": ("parallel.pipeline=2", "parallel.zero_stage=2"),
    "parallel.zero_stage=0 with parallel.pipeline": ("parallel.pipeline=2", "parallel.zero_stage=0"),
    "parallel.pipeline is more than the blocks": ("parallel.pipeline=4",),
    "parallel.pipeline_split does not": ("parallel.pipeline=2", "parallel.pipeline_split=[1,2]"),
    "parallel.pipeline_schedule=dualpipev with": ("parallel.pipeline_schedule=dualpipev",),
    "parallel.sequence does not divide model.max_seq_len": ("parallel.sequence=2", "model.max_seq_len=17"),
    "parallel.sequence does not divide model.n_head / parallel.tensor": ("parallel.tensor=2", "parallel.sequence=2"),
    "parallel.sequence and the key and value heads": (
        *LLAMA,
        "model.n_head=12",
        "model.n_kv_head=6",
        "parallel.sequence=4",
    ),
    "train.attention=flex or varlen without": ("train.attention=flex",),
    "train.attention=flex or varlen with model.dropout": (
        "train.attention=flex",
        "data.isolate_documents=true",
        "model.dropout=0.1",
    ),
    "train.attention=flash or varlen with train.dtype=fp32": ("train.attention=flash",),
    "parallel.tensor_sequence with parallel.tensor=1": ("parallel.tensor_sequence=true",),
    "parallel.tensor_sequence: parallel.tensor does not divide model.max_seq_len": (
        "parallel.tensor_sequence=true",
        "parallel.tensor=2",
        "model.max_seq_len=17",
    ),
    "parallel.extra.compile": ("parallel.extra.compile.deepcompile=true",),
    "parallel.zero_stage above 1 with optim.name=muon": (MUON, "parallel.zero_stage=2"),
    "parallel.pipeline above 1 with optim.name=muon": (MUON, "parallel.pipeline=2"),
    "parallel.offload_optimizer with optim.name=muon": (MUON, "parallel.offload_optimizer=cpu"),
    "train.dtype=fp16 with optim.name=muon": (MUON, "train.dtype=fp16"),
    "parallel.extra sets": (MUON, "parallel.extra={zero_optimization: {offload_optimizer: {device: cpu}}}"),
}


@pytest.mark.parametrize(("reason", "overrides"), REFUSED.items())
def test_what_cannot_be_run_is_refused_with_the_reason_and_a_way_out(reason, overrides, config):
    with pytest.raises(ConfigError) as refused:
        check_layout(config(*overrides))
    message = str(refused.value)
    (rule,) = [rule for rule in REFUSALS if rule.applies(config(*overrides))]
    assert rule.reason in message
    assert f"; use {rule.instead}" in message
    assert reason.split(" with ")[0] in message


def test_every_refusal_is_among_the_tested_ones(config):
    applied = {rule.reason for rule in REFUSALS for words in REFUSED.values() if rule.applies(config(*words))}
    assert applied == {rule.reason for rule in REFUSALS}


def test_several_refusals_are_told_at_once(config):
    with pytest.raises(ConfigError, match=r"model.n_head(.|\n)*parallel.zero_stage above 1"):
        check_layout(config("parallel.tensor=3", "parallel.pipeline=2", "parallel.zero_stage=3"))


def test_zero_0_in_fp32_and_every_other_stage_in_every_precision_are_allowed(config):
    check_layout(config("parallel.zero_stage=0"))
    for stage in (1, 2, 3):
        for dtype in ("fp32", "bf16", "fp16"):
            check_layout(config(f"parallel.zero_stage={stage}", f"train.dtype={dtype}"))


def test_a_sequence_group_shares_its_samples(config):
    plan = plan_batches(config("parallel.sequence=2", "train.micro_batch_size=1"), world_size=4)
    assert (plan.data_parallel, plan.model_parallel, plan.world_size, plan.grad_accum_steps) == (2, 2, 4, 4)


@pytest.mark.parametrize(
    ("n_head", "n_kv_head", "tensor", "sequence", "allowed"),
    [
        (12, 12, 1, 4, True),
        (12, 12, 2, 3, True),
        (12, 12, 2, 4, False),  # 6 query heads
        (12, 4, 1, 2, True),
        (12, 4, 1, 4, True),
        (12, 4, 1, 12, True),  # each head goes to 3 processes
        (12, 4, 1, 6, False),
        (12, 4, 2, 6, True),  # 2 key and value heads are left
        (12, 1, 1, 12, True),
        (12, 2, 4, 3, True),  # fewer than processes of the tensor group: 1 is left
    ],
)
def test_which_heads_a_sequence_group_can_share_out(n_head, n_kv_head, tensor, sequence, allowed, config):
    words = [f"model.n_head={n_head}", f"model.n_kv_head={n_kv_head}", "model.d_model=96", "model.max_seq_len=48"]
    laid_out = config(*LLAMA, *words, f"parallel.tensor={tensor}", f"parallel.sequence={sequence}")
    if allowed:
        check_layout(laid_out)
    else:
        with pytest.raises(ConfigError, match=r"parallel\.sequence"):
            check_layout(laid_out)


def test_a_stretch_is_shared_out_further_in_a_tensor_group(config):
    words = [*LLAMA, "parallel.tensor=2", "parallel.sequence=2", "parallel.tensor_sequence=true"]
    check_layout(config(*words, "model.max_seq_len=20"))
    with pytest.raises(ConfigError, match=r"tensor x parallel.sequence for model.max_seq_len"):
        check_layout(config(*words, "model.max_seq_len=18"))


def test_muon_is_allowed_without_and_with_its_own_sharding_in_fp32_and_bf16_and_with_tensor_parallelism(config):
    for stage, dtype, tensor in product((0, 1), ("fp32", "bf16"), (1, 2)):
        check_layout(config(MUON, f"parallel.zero_stage={stage}", f"train.dtype={dtype}", f"parallel.tensor={tensor}"))
    check_layout(config(MUON, "parallel.extra={wall_clock_breakdown: true}"))


def test_a_tensor_group_shares_its_samples(config):
    plan = plan_batches(config("parallel.tensor=2", "train.micro_batch_size=1"), world_size=4)
    assert (plan.data_parallel, plan.model_parallel, plan.world_size, plan.grad_accum_steps) == (2, 2, 4, 4)
    with pytest.raises(ConfigError, match="start a multiple of 2"):
        plan_batches(config("parallel.tensor=2"), world_size=3)


def test_fewer_key_and_value_heads_than_processes_are_allowed(config):
    check_layout(config(*LLAMA, "model.n_kv_head=1", "model.d_model=32", "parallel.tensor=4"))
    check_layout(config(*LLAMA, "parallel.tensor=4", "parallel.tensor_sequence=true"))


def test_offload_and_buckets_are_allowed_where_they_mean_something(config):
    for stage in (1, 2, 3):
        check_layout(config("parallel.offload_optimizer=cpu", f"parallel.zero_stage={stage}"))
    both = ("parallel.offload_optimizer=cpu", "parallel.offload_weights=cpu")
    check_layout(config(*both, "parallel.zero_stage=3", "parallel.update_elements=1000000"))
    bf16 = ("train.dtype=bf16", "parallel.reduce_bucket_elements=1000")
    check_layout(config(*bf16, "parallel.offload_optimizer=cpu"))
    check_layout(config(*bf16, "parallel.zero_stage=2"))
    check_layout(config("parallel.gather_bucket_elements=1000", "parallel.overlap_communication=true"))
    check_layout(config("parallel.pipeline=2", "parallel.overlap_communication=false"))


@pytest.mark.parametrize("within_node", [1, 3, 4])
def test_a_second_copy_is_cut_over_a_part_of_the_processes(within_node, config):
    words = ("parallel.zero_stage=3", "train.micro_batch_size=1")
    with pytest.raises(ConfigError, match=rf"parallel.shard_within_node \({within_node}\) must be a divisor of the 4"):
        plan_batches(config(*words, f"parallel.shard_within_node={within_node}"), world_size=4)
    plan_batches(config(*words, "parallel.shard_within_node=2"), world_size=4)
