"""`megagpt eval run`: a checkpoint and task names -> one result file a task."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import lm_eval
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from evals.answers import AnswerKey, AnswerStore, code_version
from evals.backend import MegaGPTLM, UnscorableError
from evals.heldout import heldout_loss
from evals.humaneval import (
    HUMANEVAL,
    CodeSettings,
    check_allowed,
    complete,
    generation_arguments,
    load_problems,
    run_and_count,
    sample_lines,
)
from evals.invariance import bits_of, make_batch_invariant
from evals.results import Metric, TaskResult, hash_settings, make_metric
from evals.reuse import describe_environment, device_name, differences
from evals.sample_files import with_clustered_intervals
from evals.scoring import BOOTSTRAP_ITERATIONS, quiet_bars, score_task
from evals.sharing import Sharing
from evals.suites import SuiteTask, resolve_tasks
from evals.task_loader import DataOrigin, TaskUnavailableError, load_task, plan_task
from megagpt.checkpoint.open import Checkpoint, open_checkpoint
from megagpt.data.manifest import read_manifest
from megagpt.generate import Model
from megagpt.model.packed import FAST
from megagpt.tokenizer import Tokenizer

HELDOUT = "heldout"
ANSWERS = "answers"
"""Folder beside the results; a task's answers are in it until its result is written."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Load = Callable[[Checkpoint], Model]
"""How the weights get into memory, called when a task first needs them."""


@dataclass(frozen=True)
class EvalRequest:
    """What to evaluate, on what, and how."""

    checkpoint: Path
    """A run's folder, its checkpoints/, or one step's folder."""
    tasks: tuple[str, ...]
    """Suites, tasks, `heldout`."""
    data_dir: Path | None = None
    """Local benchmark data; what is not there comes from the hub."""
    n_shots: int | None = None
    """Few-shot examples; None for what the suite or the task says."""
    limit: int | None = None
    """Only the first documents of each task; None for what the suite says, or all."""
    batch_size: int = 16
    batch_invariant: bool = True
    """In fp32: arithmetic whose results do not depend on the batch, where this machine has it."""
    share_prefixes: bool = True
    """What inputs have in common at the beginning runs once."""
    out: Path | None = None
    """Folder of the results; None for <run>/evals/step_<step>."""
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = "cpu"
    suites_dir: Path = Path("configs/evals")
    allow_code: bool = False
    """Run code that the model writes, in the sandbox; without it such tasks are unavailable."""
    code: CodeSettings = field(default_factory=CodeSettings)
    """How such code is drawn."""
    cache_dir: Path | None = None
    """Prepared rows and Arrow tables; None for <run>/evals/cache."""


def run_evals(
    request: EvalRequest, console: Console, load: Load | None = None, sharing: Sharing | None = None
) -> list[TaskResult]:
    """Evaluate, reusing what the same code already found about the same weights, settings and data.

    Every task's file is written as soon as the task is done. A task whose data cannot be reached, or whose
    requests exceed the model's context, has the status `unavailable` and the reason; the others go on.

    Args:
        request: what, on what, and how.
        console: of the main process.
        load: where the model is not read whole, onto `request.device`.
        sharing: this process's part, where several evaluate together; the main one writes.

    Raises:
        EvalError: a task that does not exist, or a setting that cannot work.
        CheckpointError: no checkpoint that can be used.
        DataError: no tokenizer, or validation tokens that are damaged.
    """
    tasks = resolve_tasks(request.tasks, request.suites_dir, n_shots=request.n_shots, limit=request.limit)
    evaluation = Evaluation(request, open_checkpoint(request.checkpoint), load, sharing)
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        for task in tasks:
            bar = progress.add_task(task.task, total=None)
            result = evaluation.run(task, functools.partial(_show, progress, bar))
            progress.remove_task(bar)
            results.append(result)
            console.print(_one_line(result), highlight=False, markup=False)
    return results


class Evaluation:
    """One checkpoint under evaluation; its weights are loaded when the first task needs them."""

    def __init__(
        self, request: EvalRequest, checkpoint: Checkpoint, load: Load | None = None, sharing: Sharing | None = None
    ) -> None:
        self.request = request
        self.checkpoint = checkpoint
        self.sharing = sharing or Sharing()
        self._load = load or (lambda found: found.load_model(DTYPES[request.dtype], request.device))
        self._why_again: dict[str, str] = {}
        self.out = request.out or checkpoint.run_dir / "evals" / f"step_{checkpoint.step:08d}"
        self.cache_dir = request.cache_dir or checkpoint.run_dir / "evals" / "cache"
        self.max_seq_len = checkpoint.model_config.max_seq_len

    @property
    def model(self) -> Model:
        """The weights; whoever has them has them with the arithmetic decided. Every process asks at the same time."""
        _ = self._bits
        return self._weights

    @functools.cached_property
    def _weights(self) -> Model:
        return self._load(self.checkpoint)

    @property
    def _wants_invariant(self) -> bool:
        return self.request.batch_invariant and self.request.dtype == "fp32"

    @functools.cached_property
    def _bits(self) -> str | None:
        """What row-invariant arithmetic gives here, the same on every process; None where there is none."""
        model = self._weights
        if self._wants_invariant and self.sharing.all(make_batch_invariant(model)):
            here = bits_of(model)
            if self.sharing.all(here == self.sharing.from_main(lambda: here)):
                return here
        model.packing = FAST  # on this process it may have held
        return None

    @property
    def batch_invariant(self) -> bool:
        """Whether scores do not depend on the batch; decided once, before the first task."""
        return self._bits is not None

    @functools.cached_property
    def environment(self) -> dict[str, Any]:
        """What computes, as results record it; the weights are not needed for it."""
        return describe_environment(
            self.sharing.device or torch.device(self.request.device),
            self.sharing.layout,
            self.checkpoint.manifest.tokenizer,
            wants_invariant=self._wants_invariant,
            share_prefixes=self.request.share_prefixes,
        )

    @functools.cached_property
    def arithmetic(self) -> str:
        """What two evaluations have in common whose answers are the same numbers; the same on every process."""
        if self._bits is not None:
            return f"row-invariant: {self._bits}"
        name = device_name(self.model.device)
        request = self.request
        batches = f"batches of {request.batch_size}, prefixes shared: {request.share_prefixes}"
        threads = torch.get_num_threads()
        return self.sharing.from_main(lambda: f"{name}, {threads} threads, {self.sharing.layout}, {batches}")

    @functools.cached_property
    def answer_key(self) -> AnswerKey:
        """What every answer depends on beside its request."""
        return AnswerKey(
            checkpoint=self.checkpoint.hash,
            dtype=self.request.dtype,
            max_seq_len=self.max_seq_len,
            tokenizer=self.tokenizer.fingerprint,
            code=code_version(),
            arithmetic=self.arithmetic,
        )

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the weights were trained with."""
        return self.checkpoint.tokenizer()

    def run(self, task: SuiteTask, on_progress: Callable[[int, int], None]) -> TaskResult:
        """Evaluate one task, or read what an earlier evaluation of the same found."""
        try:
            special = {HELDOUT: self._run_heldout, HUMANEVAL: self._run_humaneval}
            return special.get(task.task, self._run_task)(task, on_progress)
        except (TaskUnavailableError, UnscorableError) as error:
            return self._unavailable(task, str(error))

    def _run_task(self, task: SuiteTask, on_progress: Callable[[int, int], None]) -> TaskResult:
        started = time.monotonic()
        sharing = self.sharing
        with quiet_bars():
            plan = sharing.first_on_each_host(lambda: plan_task(task.task, self.request.data_dir, self.cache_dir))
            if (known := sharing.from_main(lambda: self._reusable(task, plan.data))) is not None:
                return known
            loaded = sharing.first_on_each_host(lambda: load_task(plan, task.shots))
        with AnswerStore(self.out / ANSWERS, task.task, self.answer_key, sharing.writer) as answers:
            answers.take(sharing.from_main(answers.known))
            lm = self.make_lm(answers, on_progress)
            scores = score_task(lm, loaded, task.limit, bootstrap=BOOTSTRAP_ITERATIONS if sharing.is_main else 0)
        result = TaskResult(
            **self._header(task, plan.data),
            status="ok",
            reason="",
            task_version=scores.version,
            n_shots=scores.n_shots,
            n=scores.n,
            n_total=scores.n_total,
            metrics=scores.metrics,
            chance=scores.chance,
            truncated=scores.truncated,
            seconds=time.monotonic() - started,
            tokens_computed=lm.tokens_computed,
            tokens_naive=lm.tokens_naive,
            answers_resumed=lm.n_resumed,
            answers_damaged=answers.n_damaged,
            batch_invariant=self.batch_invariant,
            subtasks=scores.subtasks,
            splits=scores.splits,
        )

        def keep() -> TaskResult:
            written = with_clustered_intervals(result, scores.samples).write(self.out, scores.samples)
            answers.remove()
            return written

        return sharing.from_main(keep)

    def make_lm(
        self, answers: AnswerStore | None = None, on_progress: Callable[[int, int], None] | None = None
    ) -> MegaGPTLM:
        """The model as lm-eval sees it."""
        return MegaGPTLM(
            self.model,
            self.tokenizer,
            max_seq_len=self.max_seq_len,
            batch_size=self.request.batch_size,
            share_prefixes=self.request.share_prefixes,
            answers=answers,
            on_progress=on_progress,
            sharing=self.sharing,
        )

    def _run_humaneval(self, task: SuiteTask, on_progress: Callable[[int, int], None]) -> TaskResult:
        started = time.monotonic()
        sharing, code = self.sharing, self.request.code
        sharing.from_main(lambda: check_allowed(allow_code=self.request.allow_code))
        with quiet_bars():
            problems, data = sharing.first_on_each_host(lambda: load_problems(self.request.data_dir, self.cache_dir))
        if (known := sharing.from_main(lambda: self._reusable(task, data))) is not None:
            return known
        chosen = problems[: task.limit]
        with AnswerStore(self.out / ANSWERS, task.task, self.answer_key, sharing.writer) as answers:
            answers.take(sharing.from_main(answers.known))
            lm = self.make_lm(answers, on_progress)
            arguments = generation_arguments(lm, chosen, code)
            completions = complete(lm, chosen, code, arguments)

        def keep() -> TaskResult:
            scores = run_and_count(chosen, completions, code, on_progress)
            result = TaskResult(
                **self._header(task, data),
                status="ok",
                reason=scores.explain(arguments),
                task_version="1.0",
                n_shots=0,
                n=len(chosen),
                n_total=len(problems),
                metrics=scores.metrics,
                truncated=sum(len(documents) for documents in lm.truncated.values()),
                seconds=time.monotonic() - started,
                tokens_computed=lm.tokens_computed,
                tokens_naive=lm.tokens_naive,
                answers_resumed=lm.n_resumed,
                answers_damaged=answers.n_damaged,
                batch_invariant=self.batch_invariant,
                generation=arguments,
            )
            written = result.write(self.out, sample_lines(chosen, scores.attempts))
            answers.remove()
            return written

        return sharing.from_main(keep)

    def _run_heldout(self, task: SuiteTask, on_progress: Callable[[int, int], None]) -> TaskResult:
        started = time.monotonic()
        prefix = self.checkpoint.config.data.val
        if prefix is None:
            raise TaskUnavailableError("the run has no validation tokens (data.val)")
        manifest = read_manifest(prefix)
        entry = None if manifest is None else manifest.files.get(prefix.name)
        digest = None if entry is None else entry.bin.xxh3_128
        data = DataOrigin("local", str(prefix), digest)
        known = None if digest is None else self.sharing.from_main(lambda: self._reusable(task, data))
        if known is not None:
            return known
        loss = heldout_loss(
            self.model,
            prefix,
            max_seq_len=self.max_seq_len,
            n_windows=task.limit,
            batch_size=self.request.batch_size,
            on_windows=on_progress,
            sharing=self.sharing,
        )
        metrics = {"nats_per_token": _loss_metric(loss.nats_per_token, loss.nats_per_token_stderr)}
        if loss.bits_per_byte is not None:
            metrics = {"bits_per_byte": _loss_metric(loss.bits_per_byte, loss.bits_per_byte_stderr), **metrics}
        result = TaskResult(
            **self._header(task, data),
            status="ok",
            reason="" if loss.bits_per_byte is not None else f"{prefix}: no manifest.json counts its bytes",
            task_version="1",
            n=loss.n_windows,
            n_total=loss.n_windows_total,
            metrics=metrics,
            seconds=time.monotonic() - started,
            tokens_computed=loss.n_tokens,
            tokens_naive=loss.n_tokens,
            batch_invariant=self.batch_invariant,
        )
        return self.sharing.from_main(lambda: result.write(self.out))

    def _unavailable(self, task: SuiteTask, reason: str) -> TaskResult:
        """The row that says why; it does not replace a score of the same weights."""
        data = DataOrigin("hub" if self.request.data_dir is None else "local", str(self.request.data_dir or ""), None)
        result = TaskResult(
            **self._header(task, data), status="unavailable", reason=" ".join(reason.split()), task_version=None
        )

        def keep() -> TaskResult:
            before = self._stored(task)
            if before is not None and before.status == "ok" and before.checkpoint["hash"] == self.checkpoint.hash:
                return result
            return result.write(self.out)

        return self.sharing.from_main(keep)

    def _header(self, task: SuiteTask, data: DataOrigin) -> dict[str, Any]:
        settings = self._settings(task)
        return {
            "task": task.task,
            "checkpoint": {
                "run": str(self.checkpoint.run_dir),
                "step": self.checkpoint.step,
                "hash": self.checkpoint.hash,
            },
            "settings": settings,
            "settings_hash": hash_settings(settings),
            "lm_eval_version": lm_eval.__version__,
            "data": {**asdict(data), "absent_splits": list(data.absent_splits)},
            "environment": self.environment,
            "again": self._why_again.get(task.task, ""),
        }

    def _settings(self, task: SuiteTask) -> dict[str, Any]:
        code = {"code": asdict(self.request.code)} if task.task == HUMANEVAL else {}
        return {
            **code,
            "n_shots": task.shots,
            "limit": task.limit,
            "batch_size": self.request.batch_size,
            "dtype": self.request.dtype,
            "max_seq_len": self.max_seq_len,
        }

    def _stored(self, task: SuiteTask) -> TaskResult | None:
        path = self.out / f"{task.task}.json"
        return TaskResult.read(path) if path.is_file() else None

    def _reusable(self, task: SuiteTask, data: DataOrigin) -> TaskResult | None:
        """An earlier score that is what would be found now; where it is not, the new one tells why."""
        before = self._stored(task)
        if before is None or before.status != "ok":
            return None
        if reasons := differences(before, self._header(task, data)):
            self._why_again[task.task] = "; ".join(reasons)
            return None
        return TaskResult(**{**_fields(before), "reused": True})


def _loss_metric(value: float, stderr: float | None) -> Metric:
    return make_metric(value, stderr, 0, is_proportion=False, higher_is_better=False)


def _fields(result: TaskResult) -> dict[str, Any]:
    return {name: getattr(result, name) for name in result.__dataclass_fields__}


def _show(progress: Progress, bar: TaskID, done: int, total: int) -> None:
    progress.update(bar, completed=done, total=total)


def _one_line(result: TaskResult) -> str:
    if result.status != "ok":
        return f"{result.task}: unavailable: {result.reason}"
    scores = ", ".join(f"{name} {metric.value:.4f}" for name, metric in result.metrics.items())
    how = "reused: same weights, settings, data and code" if result.reused else f"{result.n} in {result.seconds:.1f} s"
    if result.tokens_computed and not result.reused:
        how += f", {result.tokens_computed:,} tokens of {result.tokens_naive:,}"
    if result.answers_resumed:
        how += f", {result.answers_resumed:,} answers of a killed evaluation"
    if result.answers_damaged:
        how += f", {result.answers_damaged} of its lines damaged"
    if result.again:
        how += f"; scored again, the earlier score is not of the same: {result.again}"
    return f"{result.task}: {scores or f'{len(result.subtasks)} tasks'} ({how})"
