"""Every key of a training run: its name, type, default and unit. A key that is not here does not exist.

`megagpt config docs` prints this file as a reference; `megagpt config schema` as JSON Schema for editors.
What depends on the number of processes is not here: `megagpt.parallel.plan` works it out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from megagpt.config.load import Section

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class RunSection(Section):
    """Where a run lives and what makes it repeatable."""

    dir: Path
    """Folder of the run: configuration, metrics, checkpoints, report. Made if absent."""
    seed: NonNegativeInt = 1234
    """Seed of initial weights, data order and dropout."""


class GPT2Model(Section):
    """GPT-2: learned positions, LayerNorm, GELU, biases, output head tied to the embedding."""

    family: Literal["gpt2"]
    """Which file of megagpt/model builds it."""
    n_layer: PositiveInt
    """Transformer blocks."""
    n_head: PositiveInt
    """Attention heads; must divide `d_model`."""
    d_model: PositiveInt
    """Width of the residual stream. The feed-forward is four times as wide."""
    vocab_size: PositiveInt = 50257
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    max_seq_len: PositiveInt = 1024
    """Longest sequence, in tokens; also the length of a training sample."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the variance in LayerNorm."""
    dropout: Probability = 0.0
    """Probability of dropping an embedding, attention weight or residual branch in training."""

    @model_validator(mode="after")
    def _check_heads(self) -> GPT2Model:
        _check_divides("d_model", self.d_model, "n_head", self.n_head)
        return self


class LlamaModel(Section):
    """Llama: rotary positions, RMSNorm, SwiGLU, grouped-query attention, no biases."""

    family: Literal["llama"]
    """Which file of megagpt/model builds it."""
    n_layer: PositiveInt
    """Transformer blocks."""
    n_head: PositiveInt
    """Query heads; must divide `d_model`."""
    n_kv_head: PositiveInt
    """Key and value heads; must divide `n_head`. Equal to `n_head`: ordinary multi-head attention."""
    d_model: PositiveInt
    """Width of the residual stream."""
    d_ff: PositiveInt
    """Width of the gated feed-forward."""
    vocab_size: PositiveInt
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    max_seq_len: PositiveInt = 4096
    """Longest sequence, in tokens; also the length of a training sample."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary frequencies."""
    tied_head: bool = False
    """Output head shares the embedding's weight."""
    qk_norm: bool = False
    """RMSNorm over each query and key head before the rotation."""

    @model_validator(mode="after")
    def _check_heads(self) -> LlamaModel:
        _check_divides("d_model", self.d_model, "n_head", self.n_head)
        _check_divides("n_head", self.n_head, "n_kv_head", self.n_kv_head)
        if self.d_model // self.n_head % 2:
            raise ValueError(
                f"head width d_model / n_head = {self.d_model // self.n_head} must be even: "
                "rotary positions turn pairs of channels"
            )
        return self


ModelSection = Annotated[GPT2Model | LlamaModel, Field(discriminator="family")]


class WeightedTokens(Section):
    """One token file of a mixture."""

    prefix: Path
    """Path of a .bin/.idx pair without the ending."""
    weight: PositiveFloat
    """Share of the training samples, relative to the other files' weights."""


class DataSection(Section):
    """Which tokens are read."""

    train: Path | tuple[WeightedTokens, ...]
    """Training tokens: the path of a .bin/.idx pair without the ending, or a list of {prefix, weight}."""
    val: Path | None = None
    """Validation tokens: the path of one pair. Needed where `eval.every` is above 0."""
    tokenizer: str | None = None
    """Tokenizer of the token files: gpt2, cl100k_base, o200k_base (tiktoken), or a tokenizer.json's path.
    Not needed where manifest.json beside the token files names it; where both do, they must be the same."""
    isolate_documents: bool = False
    """Documents that share a sample do not see each other: attention stays within a document, positions begin at 0 in
    each, and the first token of a document is read but not predicted. Documents are those of the .idx file. In training
    and its validation loss, not in `megagpt eval`. A run that goes on keeps it."""

    @model_validator(mode="after")
    def _check_train(self) -> DataSection:
        if isinstance(self.train, tuple) and not self.train:
            raise ValueError("train is an empty list; name at least one {prefix, weight}")
        return self


class MuonSection(Section):
    """Muon, with `optim.name=muon`: the matrices of the blocks are updated by their momentum, orthogonalised."""

    lr: PositiveFloat | None = None
    """Peak learning rate of the matrices; without it `optim.lr`, which `scale: rms` is made for."""
    scale: Literal["rms", "spectral"] = "rms"
    """Factor on the update of a matrix (out, in). rms: 0.2 sqrt(max(out, in)), AdamW's usual size; spectral:
    sqrt(max(1, out / in)), which wants a learning rate of its own (0.02 in the first write-up)."""
    momentum: Probability = 0.95
    """Decay of the momentum."""
    nesterov: bool = True
    """Look a step ahead along the momentum."""
    ns_steps: PositiveInt = 5
    """Newton-Schulz iterations that orthogonalise a matrix, in `train.dtype`."""


class OptimSection(Section):
    """The optimizer and its schedule. Weight decay falls on matrices only: not on norms, biases and positions."""

    name: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon for the matrices of the blocks and AdamW for embeddings, head, norms and biases. muon works with
    `zero_stage` 0 and 1 in fp32 and bf16, and with tensor parallelism."""
    muon: MuonSection = MuonSection()
    lr: PositiveFloat
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine to `min_lr_frac`; wsd: stable, then linear decay; or constant."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up from 0."""
    decay_frac: Fraction = 0.2
    """wsd: the last part of `train.max_steps` in which the rate falls."""
    min_lr_frac: Fraction = 0.1
    """Rate at the last step, as a fraction of `lr` (cosine, wsd)."""
    betas: tuple[Probability, Probability] = (0.9, 0.95)
    """Decay of the first and second moment."""
    eps: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay."""
    grad_clip: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 means no clipping."""

    @model_validator(mode="after")
    def _check_muon(self) -> OptimSection:
        if self.name != "muon" and self.muon != MuonSection():
            raise ValueError(f"muon is set, but name is {self.name!r}; set name: muon, or leave muon out")
        return self


def _check_range(batches: tuple[int, int]) -> tuple[int, int]:
    first, end = batches
    if not 0 <= first < end:
        raise ValueError(f"[{first}, {end}] is no range: write the first batch and the one after the last")
    return batches


BatchRange = Annotated[tuple[int, int], AfterValidator(_check_range)]
"""[first, end): the first batch that is skipped, and the first one that is not."""


class TrainSection(Section):
    """How long, how much at a time, in which precision."""

    max_steps: PositiveInt
    """Optimizer steps."""
    global_batch_size: PositiveInt
    """Sequences an optimizer step, over all processes."""
    micro_batch_size: PositiveInt
    """Sequences one process runs at once. The rest is gradient accumulation."""
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Precision of weights and activations in forward and backward; master weights are fp32."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Recompute activations in backward: nothing, the attention core, or whole blocks."""
    attention: Literal["auto", "sdpa", "flex", "varlen", "flash"] = "auto"
    """What computes attention. sdpa: PyTorch's own choice, on CUDA in bf16 and fp16 its built-in flash-attention kernel
    (with `data.isolate_documents` a dense mask, and no such kernel). flash: the flash-attn package. varlen (PyTorch's
    flash-attention for sequences of different lengths) and flex (FlexAttention): for `data.isolate_documents`, on CUDA.
    auto: sdpa; with `data.isolate_documents` the first of flash, varlen, flex and sdpa that can be used."""
    compile: bool = False
    """torch.compile of each block: fewer passes over memory, a slow first step. Needs a C++ compiler."""
    skip_batches: tuple[BatchRange, ...] = ()
    """Batches that are never trained on: ranges [first, end), 0-based; batch k holds the samples from
    k x `global_batch_size` on. A run that has read a batch cannot skip it any more."""
    offload_activations: bool = False
    """Keep what the blocks' forward leaves for backward (with recompute=full: each block's input) in pinned host
    memory: the same loss and gradients, less memory on the device, two copies over the bus."""


class ParallelSection(Section):
    """How the model is laid over processes."""

    tensor: PositiveInt = 1
    """Processes that share each layer's weights (tensor parallelism). Divides `model.n_head`; keep it within a node."""
    pipeline: PositiveInt = 1
    """Processes that share the layers (pipeline stages); with `zero_stage` 1 only."""
    pipeline_schedule: Literal["1f1b", "dualpipev"] = "1f1b"
    """1f1b: one forward, one backward. dualpipev: each process holds a stage on the way out and one on the way back,
    which leaves less time idle; needs twice as many micro-batches a step as processes in the pipeline, or more."""
    pipeline_split: tuple[NonNegativeInt, ...] | None = None
    """Blocks of each stage, first to last (dualpipev: twice as many numbers as processes, along the V). Without it
    the stages are balanced by FLOPs, the output head included."""
    sequence: PositiveInt = 1
    """Processes that share each sequence (Ulysses sequence parallelism): each holds a stretch of it, and they trade
    stretches for heads around attention. For long sequences: activations shrink by it, and ZeRO shards over these
    processes too. Divides `model.max_seq_len` and `model.n_head` / `tensor`."""
    tensor_sequence: bool = False
    """Between the layers that `tensor` cuts, each process holds a part of the sequence (Megatron-style sequence
    parallelism): the same loss with less memory for activations."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards over data-parallel processes: 1 optimizer, 2 and gradients, 3 and weights.
    0 shards nothing: with AdamW in fp32 only, with muon in fp32 and bf16, and without a pipeline."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where master weights and Adam moments live, and where the update is computed: none: on the device; cpu: in host
    memory, with ZeRO 1 to 3; nvme: on the local disk of `nvme_dir`, with ZeRO 3, and `update_elements` of them at a
    time in host memory for the update, 16 bytes each. Gradients stay in host memory."""
    offload_weights: Literal["none", "cpu", "nvme"] = "none"
    """ZeRO-3: where a process's part of the weights lives while it is not in use: none: on the device; cpu: in host
    memory. nvme is refused by this version."""
    nvme_dir: Path | None = None
    """With `offload_optimizer` nvme: a folder on a local disk of every host, with room for 16 bytes an element of the
    host's part of the model. What is written there has no name, and is gone when the process ends."""
    overlap_communication: bool | None = None
    """Reduce gradients while backward still runs. Unset: DeepSpeed's default, true with ZeRO-3 and false below."""
    reduce_bucket_elements: PositiveInt | None = None
    """Gradient elements that are reduced at once; twice as many bytes of buffer in bf16. Unset: DeepSpeed's 5e8."""
    gather_bucket_elements: PositiveInt | None = None
    """ZeRO-1 and 2: weight elements that are gathered at once after an update; even. Unset: DeepSpeed's 5e8."""
    prefetch_elements: NonNegativeInt | None = None
    """ZeRO-3: weight elements that are gathered ahead of their use. Unset: DeepSpeed's 5e7."""
    keep_gathered_below_elements: NonNegativeInt | None = None
    """ZeRO-3: a parameter of at most so many elements stays whole on every process. Unset: DeepSpeed's 1e5."""
    max_live_elements: NonNegativeInt | None = None
    """ZeRO-3: gathered weight elements that a process holds at once at most. Unset: DeepSpeed's 1e9."""
    update_elements: PositiveInt | None = None
    """ZeRO-3: elements of a process's part that are updated at once. Unset: DeepSpeed's 1e9."""
    shard_within_node: PositiveInt | None = None
    """ZeRO-3: so many neighbouring processes, usually those of a node, keep a second copy of the weights cut over them
    alone, so that backward gathers within a node (ZeRO++ hpZ). Unset: no second copy."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further DeepSpeed configuration keys, passed through; may not contradict what megagpt sets."""


class CheckpointSection(Section):
    """When state is saved and how a run starts again."""

    save_every: NonNegativeInt = 1000
    """Steps between checkpoints; 0 means only at the end and when stopped."""
    resume: Literal["auto", "never", "must"] = "auto"
    """auto: go on from the newest complete checkpoint if there is one; never: refuse a folder that has any;
    must: refuse to start from step 0."""
    fall_back: bool = False
    """Where the newest checkpoint is damaged, set it aside (step_N.damaged) and go on from the one before it, instead
    of refusing; the run's history says so. One that cannot be read, on whichever rank, is refused in any case. `megagpt
    train --restarts` sets it."""
    keep_last: PositiveInt = 3
    """Newest complete checkpoints that are kept."""
    keep_every: NonNegativeInt = 0
    """Also keep every checkpoint whose step is a multiple of this; 0 means none."""
    verify_before_prune: bool = True
    """Before an older checkpoint is removed, read the new one back from the disk, every process its own file, while
    training goes on; where it is not what was written nothing is removed."""
    make_room: bool = True
    """Where there is no room for a checkpoint, remove the oldest one that `keep_last` and `keep_every` would not keep
    once it is there, after reading the newest one; that one is never removed. false: the save fails."""
    asynchronous: bool = True
    """Write while training goes on: a step waits only for a copy into host memory, which takes as much of it as this
    process's part of the checkpoint (--check tells how much). false: training waits until everything is on disk."""
    retry_after: NonNegativeInt = 50
    """Steps after which a save that failed is tried again, if none is due before; 0 means not before the next due."""
    max_failed_saves: NonNegativeInt = 0
    """Failed saves in a row that end the run; 0 means they never do: what was computed since the last checkpoint is
    lost for certain then, and room on a disk can come back. The last save of a run must succeed in any case."""


class EvalSection(Section):
    """Loss on the validation tokens and scores of benchmarks during training. Neither changes what is trained."""

    every: NonNegativeInt = 0
    """Steps between evaluations of the loss; 0 means never."""
    sequences: PositiveInt = 256
    """Validation sequences an evaluation, the same ones each time; all of them where there are fewer."""
    tasks: tuple[str, ...] = ()
    """Suites (configs/evals) and tasks of lm-eval that are scored on the model while it trains. `heldout` in a suite is
    left out (`every` is for that), as is `humaneval`, which runs code; the terminal says so. Scores, and for multiple
    choice what moves before them, the bits per byte of the right answer and its margin, go to metrics.jsonl and
    evals/training/ of the run."""
    tasks_every: NonNegativeInt = 0
    """Steps between them, also before the first step and after the last; 0 means never."""
    tasks_limit: PositiveInt = 100
    """Documents of each task, the first ones, or as many as its suite says where these are fewer."""
    tasks_batch_size: PositiveInt = 16
    """Sequences a forward pass of them."""
    data: Path | None = None
    """Folder of local benchmark data (`megagpt eval prepare`); what is not in it comes from the hub."""

    @model_validator(mode="after")
    def _check_tasks(self) -> EvalSection:
        if self.tasks and not self.tasks_every:
            raise ValueError(
                f"tasks is {list(self.tasks)}, but tasks_every is 0: they would never be scored; "
                "set eval.tasks_every, or leave eval.tasks out"
            )
        if self.tasks_every and not self.tasks:
            raise ValueError(f"tasks_every is {self.tasks_every}, but tasks names none; set eval.tasks, as in [fast]")
        return self


class WatchSection(Section):
    """What ends a run, or drops a step of it, before harm is done."""

    startup_seconds: NonNegativeFloat = 1800.0
    """Longest time from the start of a process to its first steps, the first step with what is compiled for it
    included; 0: no deadline. After a deadline the stacks of all ranks are in the run's folder `stacks`, the message
    names the rank that did not arrive, and the run ends with exit code 4."""
    step_seconds: NonNegativeFloat | None = None
    """Longest time of an optimizer step; 0: no deadline. Unset: ten times the median of the last steps, and at least
    180 seconds."""
    save_seconds: NonNegativeFloat = 1800.0
    """Longest time of a checkpoint, and of the end of a run; 0: no deadline. One that is written while training goes
    on has it as well, from the copy to the end."""
    eval_seconds: NonNegativeFloat = 1800.0
    """Longest time of an evaluation; 0: no deadline."""
    silent_seconds: NonNegativeFloat = 30.0
    """Longest time without a sign of life of a rank while the others give theirs, one a second: a host without power
    or network is found so, long before a step's deadline. A process that a debugger or SIGSTOP holds, or that holds the
    interpreter's lock in foreign code, gives none either. 0: no limit."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite is seen on all ranks before the update. stop: the run ends with exit code
    3; skip: the step makes no update and the run goes on. The step is computed once more to find the rank. fp16: a
    gradient that is finite when the step is computed once more with a loss scale of 1 was an overflow, which lowers the
    scale and is no event; where the scale is fixed or at its smallest, it is treated as above."""
    on_spike: Literal["record", "skip", "rollback"] = "record"
    """A loss or gradient norm that lies more than `spike_sigmas` standard deviations above the mean of the last
    `spike_window` steps. record: only tell; skip: the step makes no update; rollback: go back to the last checkpoint
    and pass over the batches from there to the spike."""
    spike_sigmas: PositiveFloat = 6.0
    """Standard deviations that make a spike."""
    spike_window: Annotated[int, Field(ge=2)] = 128
    """Steps over which mean and deviation are taken; nothing is a spike before half of them are there."""
    max_skips: PositiveInt = 3
    """Dropped steps in a row, or rollbacks to the same checkpoint, after which the run ends with exit code 3. A step
    that fp16's loss scale drops neither counts nor ends the row."""
    replicas_every: NonNegativeInt = 100
    """Steps between comparisons of the weights that several processes hold; 0: only in steps with a checkpoint after
    them. What differs ends the run with exit code 3 and is never saved. They are compared between backward and update:
    a bit that flips in such a step is found before its gradient is used. In ZeRO 1 to 3 each update writes the weights
    anew from the master copy, so that a flip in another step is not seen any more; 1 sees all of them, for 0.6 ns
    (bf16: 0.3 ns) of a CPU core and weight. The master copy and its moments, of which ZeRO has one, cannot be compared
    with anything."""
    slow_every: NonNegativeInt = 10
    """Steps between comparisons of the ranks' own times; 0: never. A rank that is slower than the others in four of
    them, one after the other, is named once."""


class LogSection(Section):
    """What is shown and where it is written beside metrics.jsonl."""

    progress: bool = True
    """Progress line on the terminal."""
    tensorboard: bool = True
    """Write TensorBoard events into the run's folder."""
    wandb_project: str | None = None
    """Weights & Biases project; needs the `wandb` extra."""
    peak_tflops: PositiveFloat | None = None
    """Dense peak of one accelerator in TFLOP/s, for MFU. Known GPUs need not be told;
    without a peak no MFU is shown."""


class TrainingRun(Section):
    """The root: everything that `launch/pretrain.py` reads."""

    run: RunSection
    model: ModelSection
    data: DataSection
    optim: OptimSection
    train: TrainSection
    parallel: ParallelSection = ParallelSection()
    checkpoint: CheckpointSection = CheckpointSection()
    eval: EvalSection = EvalSection()
    watch: WatchSection = WatchSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _check_sections_together(self) -> TrainingRun:
        if self.optim.warmup_steps > self.train.max_steps:
            raise ValueError(
                f"optim.warmup_steps ({self.optim.warmup_steps}) is longer than the run: "
                f"train.max_steps is {self.train.max_steps}"
            )
        if self.eval.every and self.data.val is None:
            raise ValueError(
                f"eval.every is {self.eval.every} but data.val is not set; name validation tokens or set eval.every=0"
            )
        if self.watch.on_spike == "rollback" and not self.checkpoint.save_every:
            raise ValueError(
                "watch.on_spike is 'rollback' but checkpoint.save_every is 0: there is no checkpoint to go back to; "
                "set checkpoint.save_every, or watch.on_spike=skip"
            )
        if self.train.global_batch_size % self.train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size ({self.train.global_batch_size}) must be a multiple of "
                f"train.micro_batch_size ({self.train.micro_batch_size})"
            )
        return self


def _check_divides(whole_name: str, whole: int, part_name: str, part: int) -> None:
    if whole % part:
        raise ValueError(f"{whole_name} ({whole}) must be a multiple of {part_name} ({part})")
