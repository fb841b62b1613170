"""World size + configuration -> integers: who runs how many sequences, and which layouts are legal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megagpt.config.schema import GPT2Model, LlamaModel, TrainingRun
from megagpt.errors import ConfigError
from megagpt.parallel.nearest import in_words, nearest_layouts
from megagpt.parallel.stages import n_parts


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How one optimizer step is divided. `global_batch_size = micro_batch_size x grad_accum_steps x data_parallel`."""

    data_parallel: int
    """Processes that see different samples."""
    micro_batch_size: int
    """Sequences a process runs at once."""
    grad_accum_steps: int
    """Micro-batches a process adds up before the optimizer steps."""
    seq_len: int
    """Tokens a sequence."""
    model_parallel: int = 1
    """Processes that work on the same samples: tensor x pipeline x sequence."""
    isolate_documents: bool = False
    """Batches tell which document each token belongs to."""

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.data_parallel * self.model_parallel

    @property
    def global_batch_size(self) -> int:
        """Sequences an optimizer step."""
        return self.data_parallel * self.micro_batch_size * self.grad_accum_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens that an optimizer step reads. With isolated documents a few less are targets."""
        return self.global_batch_size * self.seq_len

    def sample_indices(self, step: int, data_parallel_rank: int) -> list[range]:
        """The samples of one rank in one step, a range for each micro-batch.

        Step s always covers samples [s x global_batch_size, (s + 1) x global_batch_size), whatever the layout.
        """
        width = self.data_parallel * self.micro_batch_size
        first = step * self.global_batch_size + data_parallel_rank * self.micro_batch_size
        starts = (first + micro * width for micro in range(self.grad_accum_steps))
        return [range(start, start + self.micro_batch_size) for start in starts]


@dataclass(frozen=True, slots=True)
class Refusal:
    """A combination that is not run, why, and what to write instead."""

    applies: Callable[[TrainingRun], bool]
    reason: str
    instead: str


DEEPSPEED_STATE = frozenset(
    {
        "bf16",
        "fp16",
        "data_types",
        "torch_autocast",
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    }
)
"""Keys of `parallel.extra` about the state that DeepSpeed keeps for an optimizer."""
ONLY_WITH_ZERO_3 = (
    "prefetch_elements",
    "keep_gathered_below_elements",
    "max_live_elements",
    "update_elements",
    "shard_within_node",
)
SMALLEST_ON_DISK = 2**18
"""Elements of fp32 that make 1 MiB, below which DeepSpeed swaps nothing."""
BUCKETS = ("overlap_communication", "reduce_bucket_elements")
"""Keys of the section `parallel` that mean something where their refusals do not apply."""

REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        lambda c: c.parallel.zero_stage == 0 and c.train.dtype != "fp32" and c.optim.name == "adamw",
        "parallel.zero_stage=0 with bf16 or fp16: DeepSpeed 0.19.8 applies one update on zero gradients at start, "
        "so that Adam's bias correction is off from the first step",
        "parallel.zero_stage=1 (the same memory on one process), or train.dtype=fp32",
    ),
    Refusal(
        lambda c: c.parallel.offload_optimizer != "none" and c.parallel.zero_stage == 0,
        "parallel.offload_optimizer with parallel.zero_stage=0: without ZeRO there is no copy of the weights to update "
        "elsewhere",
        "parallel.zero_stage=1 (the same memory where nothing is data-parallel), or parallel.offload_optimizer=none",
    ),
    Refusal(
        lambda c: c.parallel.offload_weights == "nvme",
        "parallel.offload_weights is nvme: this version has no offload of weights to disks",
        "parallel.offload_weights=cpu, and parallel.offload_optimizer=nvme where host memory is too small",
    ),
    Refusal(
        lambda c: _is_on_disk(c) and c.parallel.zero_stage < 3,
        "parallel.offload_optimizer=nvme below parallel.zero_stage=3: DeepSpeed would keep everything in host memory "
        "and say nothing",
        "parallel.zero_stage=3, or parallel.offload_optimizer=cpu",
    ),
    Refusal(
        lambda c: _is_on_disk(c) and c.parallel.nvme_dir is None,
        "parallel.offload_optimizer=nvme without parallel.nvme_dir: nothing says which disk",
        "a folder on a local disk for parallel.nvme_dir, or parallel.offload_optimizer=cpu",
    ),
    Refusal(
        lambda c: not _is_on_disk(c) and c.parallel.nvme_dir is not None,
        "parallel.nvme_dir without parallel.offload_optimizer=nvme: nothing would be written there",
        "parallel.offload_optimizer=nvme, or leave it out",
    ),
    Refusal(
        lambda c: _is_on_disk(c) and (c.parallel.update_elements or SMALLEST_ON_DISK) < SMALLEST_ON_DISK,
        f"parallel.update_elements below {SMALLEST_ON_DISK} with parallel.offload_optimizer=nvme: what is less than "
        "1 MiB does not leave host memory",
        f"{SMALLEST_ON_DISK} or more, or leave it out",
    ),
    Refusal(
        lambda c: (
            _is_on_disk(c)
            and ("aio" in c.parallel.extra or "offload_optimizer" in _table(c.parallel.extra.get("zero_optimization")))
        ),
        "parallel.extra.aio or parallel.extra.zero_optimization.offload_optimizer with "
        "parallel.offload_optimizer=nvme: megagpt reads and writes the disk itself, because "
        "DeepSpeed 0.19.8 does not look whether it succeeded",
        "parallel.nvme_dir and parallel.update_elements alone",
    ),
    Refusal(
        lambda c: c.parallel.offload_weights != "none" and c.parallel.zero_stage < 3,
        "parallel.offload_weights below parallel.zero_stage=3: every process needs all of its weights all the time",
        "parallel.zero_stage=3, or parallel.offload_weights=none",
    ),
    Refusal(
        lambda c: c.parallel.zero_stage < 3 and _is_set(c, *ONLY_WITH_ZERO_3),
        f"one of parallel.{{{', '.join(ONLY_WITH_ZERO_3)}}} below parallel.zero_stage=3: nothing is gathered for use "
        "there, so that it would have no effect",
        "parallel.zero_stage=3, or leave it out",
    ),
    Refusal(
        lambda c: (c.parallel.zero_stage in (0, 3) or _is_muon(c)) and _is_set(c, "gather_bucket_elements"),
        "parallel.gather_bucket_elements with parallel.zero_stage 0 or 3, or with optim.name=muon: DeepSpeed gathers "
        "no weights after an update there, so that it would have no effect",
        "parallel.zero_stage=1 or 2, or leave it out (with ZeRO-3: parallel.prefetch_elements)",
    ),
    Refusal(
        lambda c: (c.parallel.gather_bucket_elements or 0) % 2 == 1,
        "parallel.gather_bucket_elements is odd: DeepSpeed aligns the buckets to two elements",
        "an even number",
    ),
    Refusal(
        lambda c: not _has_buckets(c) and _is_set(c, *BUCKETS),
        f"one of parallel.{{{', '.join(BUCKETS)}}} with parallel.zero_stage=0, with optim.name=muon, or with bf16 "
        "under ZeRO-1 without parallel.offload_optimizer: gradients are reduced all together there, so that it would "
        "have no effect",
        "parallel.zero_stage=2 or 3, or leave it out",
    ),
    Refusal(
        lambda c: c.parallel.pipeline > 1 and c.parallel.overlap_communication is True,
        "parallel.overlap_communication with parallel.pipeline above 1: DeepSpeed's pipeline reduces gradients after "
        "the last micro-batch and would ignore it",
        "parallel.pipeline=1, or leave it out",
    ),
    Refusal(
        lambda c: c.parallel.shard_within_node is not None and c.parallel.tensor > 1,
        "parallel.shard_within_node with parallel.tensor above 1: DeepSpeed cuts the second copy over neighbouring "
        "processes, and those of a tensor group hold different weights",
        "parallel.tensor=1, or leave parallel.shard_within_node out",
    ),
    Refusal(
        lambda c: c.model.n_head % c.parallel.tensor != 0,
        "parallel.tensor does not divide model.n_head: every process of a tensor group takes whole query heads",
        "a divisor of model.n_head for parallel.tensor, or parallel.tensor=1 with parallel.zero_stage=3",
    ),
    Refusal(
        lambda c: not _kv_heads_divide(c),
        "parallel.tensor and model.n_kv_head: neither divides the other, so that a process's query heads would look at "
        "parts of several key and value heads",
        "a parallel.tensor that is a divisor or a multiple of model.n_kv_head, or parallel.tensor=1 with "
        "parallel.zero_stage=3",
    ),
    Refusal(
        lambda c: _kv_heads_divide(c) and _kv_channels(c) % c.parallel.tensor != 0,
        "parallel.tensor does not divide the channels of all key and value heads (n_kv_head x d_model / n_head), which "
        "are cut where there are more processes than such heads",
        "a smaller parallel.tensor, or parallel.tensor=1 with parallel.zero_stage=3",
    ),
    Refusal(
        lambda c: c.model.family == "llama" and c.model.d_ff % c.parallel.tensor != 0,
        "parallel.tensor does not divide model.d_ff: every process of a tensor group takes equally many channels of it",
        "a divisor of model.d_ff for parallel.tensor, or a model.d_ff that is a multiple of it",
    ),
    Refusal(
        lambda c: c.train.compile and c.parallel.zero_stage == 3,
        "train.compile with parallel.zero_stage=3: DeepSpeed gathers weights in hooks of the layers inside a block, "
        "which a compiled block cannot hold",
        "parallel.zero_stage=2 or less, or train.compile=false",
    ),
    Refusal(
        lambda c: c.train.compile and c.parallel.tensor > 1,
        "train.compile with parallel.tensor above 1: this version has no compiled blocks that talk to other processes",
        "parallel.tensor=1, or train.compile=false",
    ),
    Refusal(
        lambda c: c.train.compile and c.train.recompute == "selective",
        "train.compile with train.recompute=selective: every block would be compiled by itself",
        "train.recompute=full, or none (fused attention stores no scores, which is what selective would save)",
    ),
    Refusal(
        lambda c: c.parallel.pipeline > 1 and c.parallel.zero_stage > 1,
        "parallel.zero_stage above 1 with parallel.pipeline above 1: DeepSpeed's pipeline adds up gradients of all "
        "micro-batches on each process, so that it cannot shard them",
        "parallel.zero_stage=1, or parallel.pipeline=1",
    ),
    Refusal(
        lambda c: c.parallel.pipeline > 1 and c.parallel.zero_stage == 0 and c.train.dtype == "fp32",
        "parallel.zero_stage=0 with parallel.pipeline above 1: DeepSpeed 0.19.8 clips by the gradient norm of some "
        "processes alone",
        "parallel.zero_stage=1 (the same memory where nothing is data-parallel)",
    ),
    Refusal(
        lambda c: n_parts(c.parallel) > c.model.n_layer,
        "parallel.pipeline is more than the blocks of the model (with dualpipev: than half of them)",
        "a parallel.pipeline of at most model.n_layer, or parallel.pipeline_schedule=1f1b",
    ),
    Refusal(
        lambda c: c.parallel.pipeline_split is not None and not _splits_the_blocks(c),
        "parallel.pipeline_split does not give the model's blocks to as many stages as the pipeline has",
        "one number a stage that add up to model.n_layer, or leave it out",
    ),
    Refusal(
        lambda c: c.parallel.pipeline_schedule == "dualpipev" and c.parallel.pipeline == 1,
        "parallel.pipeline_schedule=dualpipev with parallel.pipeline=1: there is no pipeline to schedule",
        "parallel.pipeline=2 or more, or parallel.pipeline_schedule=1f1b",
    ),
    Refusal(
        lambda c: c.model.max_seq_len % c.parallel.sequence != 0,
        "parallel.sequence does not divide model.max_seq_len: every process of a sequence group takes an equal stretch "
        "of a sample",
        "a divisor of model.max_seq_len for parallel.sequence, or a model.max_seq_len that is a multiple of it",
    ),
    Refusal(
        lambda c: _query_heads_divide(c) and _query_heads(c) % c.parallel.sequence != 0,
        "parallel.sequence does not divide model.n_head / parallel.tensor: around attention, every process of a "
        "sequence group takes equally many of the query heads that tensor parallelism leaves",
        "a divisor of model.n_head / parallel.tensor for parallel.sequence, or parallel.tensor_sequence=true with "
        "parallel.sequence=1",
    ),
    Refusal(
        lambda c: _query_heads_divide(c) and _kv_heads_divide(c) and not _kv_heads_fit_the_sequence_group(c),
        "parallel.sequence and the key and value heads that tensor parallelism leaves (model.n_kv_head / "
        "parallel.tensor, at least 1): neither divides the other, so that a process's query heads would look at parts "
        "of several of them",
        "a parallel.sequence that is a divisor or a multiple of those heads, or parallel.tensor_sequence=true with "
        "parallel.sequence=1",
    ),
    Refusal(
        lambda c: c.train.attention in ("flex", "varlen") and not c.data.isolate_documents,
        "train.attention=flex or varlen without data.isolate_documents: they are for samples of several documents that "
        "do not see each other, and slower than PyTorch's own kernel where there is nothing to skip",
        "train.attention=auto, or data.isolate_documents=true",
    ),
    Refusal(
        lambda c: c.train.attention in ("flex", "varlen") and isinstance(c.model, GPT2Model) and c.model.dropout > 0,
        "train.attention=flex or varlen with model.dropout: these kernels have no dropout",
        "model.dropout=0, or train.attention=auto",
    ),
    Refusal(
        lambda c: c.train.attention in ("flash", "varlen") and c.train.dtype == "fp32",
        "train.attention=flash or varlen with train.dtype=fp32: these kernels compute in bf16 and fp16",
        "train.dtype=bf16, or train.attention=auto",
    ),
    Refusal(
        lambda c: c.parallel.tensor_sequence and c.parallel.tensor == 1,
        "parallel.tensor_sequence with parallel.tensor=1: there is no tensor group to share out a sequence in",
        "parallel.tensor=2 or more, or parallel.tensor_sequence=false",
    ),
    Refusal(
        lambda c: c.parallel.tensor_sequence and not _stretch_divides(c),
        "parallel.tensor_sequence: parallel.tensor does not divide model.max_seq_len / parallel.sequence, what a "
        "tensor group has of a sample",
        "a multiple of parallel.tensor x parallel.sequence for model.max_seq_len, or parallel.tensor_sequence=false",
    ),
    Refusal(
        lambda c: "compile" in c.parallel.extra,
        "parallel.extra.compile: this version has no DeepCompile; DeepSpeed 0.19.8 would train without it and say "
        "nothing, and has none for a pipeline or ZeRO-0",
        "the configuration without this key",
    ),
    Refusal(
        lambda c: _is_muon(c) and c.parallel.zero_stage > 1,
        "parallel.zero_stage above 1 with optim.name=muon: DeepSpeed cuts gradients and weights anywhere, Muon needs "
        "whole matrices, and this version has no other sharding of gradients and weights",
        "parallel.zero_stage=1, which shards Muon's own state by whole matrices, or optim.name=adamw",
    ),
    Refusal(
        lambda c: _is_muon(c) and c.parallel.pipeline > 1,
        "parallel.pipeline above 1 with optim.name=muon: this version has no Muon in a pipeline, whose gradient "
        "norm is that of all stages",
        "parallel.pipeline=1 with parallel.tensor for larger models, or optim.name=adamw",
    ),
    Refusal(
        lambda c: _is_muon(c) and c.parallel.offload_optimizer == "cpu" and c.parallel.zero_stage == 1,
        "parallel.offload_optimizer with optim.name=muon: this version has no Muon in host memory, where its products "
        "of matrices would take long",
        "parallel.offload_optimizer=none, or optim.name=adamw",
    ),
    Refusal(
        lambda c: _is_muon(c) and c.train.dtype == "fp16",
        "train.dtype=fp16 with optim.name=muon: this version has no loss scaling for Muon",
        "train.dtype=bf16, or optim.name=adamw",
    ),
    Refusal(
        lambda c: _is_muon(c) and not DEEPSPEED_STATE.isdisjoint(c.parallel.extra),
        "parallel.extra sets DeepSpeed's sharding or precision (zero_optimization, bf16, data_types, ...) with "
        "optim.name=muon: they would do nothing, because Muon keeps its state itself",
        "the keys parallel.zero_stage and train.dtype, or optim.name=adamw",
    ),
)
"""What cannot be run, as data: the configuration check, `--check` and the tests read this one table."""


def _is_muon(config: TrainingRun) -> bool:
    return config.optim.name == "muon"


def _is_on_disk(config: TrainingRun) -> bool:
    return config.parallel.offload_optimizer == "nvme"


def _table(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _is_set(config: TrainingRun, *keys: str) -> bool:
    return any(getattr(config.parallel, key) is not None for key in keys)


def _has_buckets(config: TrainingRun) -> bool:
    """DeepSpeed's BF16_Optimizer, which adds up in fp32 on the device, reduces without buckets."""
    if _is_muon(config):  # which DeepSpeed knows as stage 0
        return False
    on_device = config.parallel.offload_optimizer == "none"
    alone = config.parallel.zero_stage == 1 and config.train.dtype == "bf16" and on_device
    return config.parallel.zero_stage > 0 and not alone


def _splits_the_blocks(config: TrainingRun) -> bool:
    split = config.parallel.pipeline_split or ()
    return len(split) == n_parts(config.parallel) and sum(split) == config.model.n_layer


def _n_kv_head(config: TrainingRun) -> int:
    return config.model.n_kv_head if isinstance(config.model, LlamaModel) else config.model.n_head


def _kv_heads_divide(config: TrainingRun) -> bool:
    kv, tensor = _n_kv_head(config), config.parallel.tensor
    return kv % tensor == 0 or tensor % kv == 0 or config.model.n_head % tensor != 0  # the last is told by itself


def _query_heads_divide(config: TrainingRun) -> bool:
    return config.model.n_head % config.parallel.tensor == 0


def _query_heads(config: TrainingRun) -> int:
    """Those of one process of a tensor group."""
    return config.model.n_head // config.parallel.tensor


def _kv_heads_fit_the_sequence_group(config: TrainingRun) -> bool:
    kv, sequence = max(1, _n_kv_head(config) // config.parallel.tensor), config.parallel.sequence
    told_by_itself = _query_heads(config) % sequence != 0
    return kv % sequence == 0 or sequence % kv == 0 or told_by_itself


def _stretch_divides(config: TrainingRun) -> bool:
    sequence, T = config.parallel.sequence, config.model.max_seq_len
    return T // sequence % config.parallel.tensor == 0 or T % sequence != 0  # the last is told by itself


def _kv_channels(config: TrainingRun) -> int:
    return _n_kv_head(config) * (config.model.d_model // config.model.n_head)


def check_layout(config: TrainingRun, world_size: int | None = None) -> None:
    """Refuse a layout that would fail late or train wrongly.

    Args:
        config: the run.
        world_size: number of processes, None where it is not known.

    Raises:
        ConfigError: naming each reason, what to write instead, and the two nearest layouts that run.
    """
    refused = _refused(config)
    if refused:
        reasons = "\n".join(f"{rule.reason}; use {rule.instead}" for rule in refused)
        raise ConfigError(f"{reasons}; {_nearest(config, world_size)}")


def is_legal(config: TrainingRun, world_size: int | None = None) -> bool:
    """Whether a layout runs: nothing refuses it, and the batch divides over so many processes where that is known."""
    return not _refused(config) and (world_size is None or isinstance(_divide(config, world_size), BatchPlan))


def plan_batches(config: TrainingRun, world_size: int) -> BatchPlan:
    """Divide the global batch over `world_size` processes.

    Raises:
        ConfigError: the layout is refused, or the numbers do not divide; says the nearest that do.
    """
    check_layout(config, world_size)
    plan = _divide(config, world_size)
    if isinstance(plan, str):
        raise ConfigError(f"{plan}; {_nearest(config, world_size)}")
    return plan


def _refused(config: TrainingRun) -> list[Refusal]:
    return [rule for rule in REFUSALS if rule.applies(config)]


def _nearest(config: TrainingRun, world_size: int | None) -> str:
    found = nearest_layouts(config, world_size, lambda candidate: is_legal(candidate, world_size))
    if not found:
        of_these = f" of {world_size} processes" if world_size is not None else ""
        return f"no layout{of_these} runs with the rest of the configuration as it is"
    return f"nearest layout{'s' * (len(found) > 1)} that run{'s' * (len(found) == 1)}: {in_words(config, found)}"


def _divide(config: TrainingRun, world_size: int) -> BatchPlan | str:
    """The batch over so many processes, or why it does not divide."""
    model_parallel = config.parallel.tensor * config.parallel.pipeline * config.parallel.sequence
    if world_size % model_parallel:
        return (
            f"{world_size} processes cannot hold tensor x pipeline x sequence = {model_parallel}; "
            f"start a multiple of {model_parallel}"
        )
    data_parallel = world_size // model_parallel
    wanted, micro = config.train.global_batch_size, config.train.micro_batch_size
    width = data_parallel * micro
    if wanted % width:
        below, above = wanted // width * width, (wanted // width + 1) * width
        nearest = f"{below} or {above}" if below else str(above)
        return (
            f"train.global_batch_size ({wanted}) must be a multiple of data-parallel processes ({data_parallel}) "
            f"x train.micro_batch_size ({micro}) = {width}; the nearest that fit: {nearest}"
        )
    within_node = config.parallel.shard_within_node
    if within_node is not None and (world_size % within_node or within_node in (1, world_size)):
        return (
            f"parallel.shard_within_node ({within_node}) must be a divisor of the {world_size} processes, more than 1 "
            "and fewer than all: usually the GPUs of a node where there are several nodes; or leave it out"
        )
    isolate = config.data.isolate_documents
    plan = BatchPlan(data_parallel, micro, wanted // width, config.model.max_seq_len, model_parallel, isolate)
    if config.parallel.pipeline_schedule == "dualpipev" and plan.grad_accum_steps < n_parts(config.parallel):
        return (
            f"parallel.pipeline_schedule=dualpipev needs {n_parts(config.parallel)} micro-batches a step or more, and "
            f"{wanted} sequences / {data_parallel} processes / {micro} a micro-batch = {plan.grad_accum_steps}; "
            "raise train.global_batch_size, lower train.micro_batch_size, or use parallel.pipeline_schedule=1f1b"
        )
    return plan
