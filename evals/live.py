"""Tasks that are scored again and again on a model in training."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from evals.backend import MegaGPTLM, UnscorableError
from evals.gold import GoldScores, gold_scores
from evals.invariance import make_batch_invariant
from evals.live_files import LiveEvaluation, LiveTask
from evals.run import HELDOUT
from evals.sample_files import clustered_metrics
from evals.scoring import Scores, quiet_bars, score_task
from evals.sharing import Sharing
from evals.suites import SuiteTask, resolve_tasks
from evals.task_loader import FEWSHOT_SEED, NUMPY_SEED, RANDOM_SEED, LoadedTask, RunsCodeError, load_task, plan_task
from megagpt.config.schema import TrainingRun
from megagpt.errors import EvalError
from megagpt.model.packed import FAST
from megagpt.parallel.decode import ParallelDecoder
from megagpt.parallel.mesh import Mesh
from megagpt.tokenizer import Tokenizer
from megagpt.train.benchmarks import BenchmarkScores


@dataclass(frozen=True, slots=True)
class Member:
    """One task, loaded."""

    task: SuiteTask
    loaded: LoadedTask

    @property
    def limit(self) -> int:
        """Documents of each of its tasks."""
        assert self.task.limit is not None  # noqa: S101 - `load_live_benchmarks` sets it
        return self.task.limit


def load_live_benchmarks(config: TrainingRun, tokenizer: Tokenizer, mesh: Mesh, suites_dir: Path) -> LiveBenchmarks:
    """Load the tasks of `eval.tasks`, one process of each host first: the others then read what it prepared.

    What a suite has and training cannot score is left out, and `LiveBenchmarks.lines` say so.

    Raises:
        EvalError: on every process: a task that does not exist, or whose data cannot be reached; one that is named by
            itself and cannot be scored during training; or nothing is left to score.
    """
    sharing = Sharing(mesh)
    cache_dir = config.run.dir / "evals" / "cache"
    members = []
    left_out: dict[str, str] = {}
    for task in resolve_tasks(config.eval.tasks, suites_dir):
        if task.task == HELDOUT:
            left_out[HELDOUT] = "eval.every is for that"
            continue
        limit = min(task.limit or config.eval.tasks_limit, config.eval.tasks_limit)
        bounded = SuiteTask(task=task.task, shots=task.shots, limit=limit)

        def load(task: SuiteTask = bounded) -> LoadedTask | RunsCodeError:
            with quiet_bars():
                try:
                    plan = plan_task(task.task, config.eval.data, cache_dir)
                except RunsCodeError as error:
                    return error
                return load_task(plan, task.shots)

        loaded = sharing.first_on_each_host(load)
        if isinstance(loaded, RunsCodeError):
            left_out[task.task] = str(loaded)
        else:
            members.append(Member(bounded, loaded))
    _check_named(config.eval.tasks, left_out, [member.task.task for member in members])
    lines = [f"eval.tasks: {task} is not scored during training: {reason}" for task, reason in left_out.items()]
    return LiveBenchmarks(config, tokenizer, mesh, members, lines)


def _check_named(names: Sequence[str], left_out: Mapping[str, str], scored: Sequence[str]) -> None:
    """A suite may have tasks that training leaves out; whoever names one of them by itself is told before training.

    Raises:
        EvalError: such a name, or nothing is left to score.
    """
    named = [name for name in names if name in left_out]
    if named or not scored:
        wrong = named or list(left_out)
        reasons = "; ".join(f"{task}: {left_out[task]}" for task in wrong)
        rest = [name for name in names if name not in left_out] if scored else []
        fix = f"write eval.tasks=[{', '.join(rest)}]" if rest else "leave eval.tasks and eval.tasks_every out"
        raise EvalError(f"eval.tasks={list(names)}: cannot be scored during training: {reasons}; {fix}")


class LiveBenchmarks:
    """`megagpt.train.benchmarks.Benchmarks` through lm-eval."""

    def __init__(
        self,
        config: TrainingRun,
        tokenizer: Tokenizer,
        mesh: Mesh,
        members: Sequence[Member],
        lines: Sequence[str] = (),
    ) -> None:
        self.lines = tuple(lines)
        self._config = config
        self._tokenizer = tokenizer
        self._mesh = mesh
        self._members = members
        self._is_chosen = False
        """Whether the model's arithmetic is: it stays with the model."""

    def score(self, step: int, model: ParallelDecoder) -> BenchmarkScores:
        """Score every task. One that this model cannot answer (a prompt that leaves no room) is told and recorded."""
        rows: list[LiveTask] = []
        lines = []
        values: dict[str, float | None] = {}
        sharing = Sharing(self._mesh, settle=model.finish)
        self._choose_arithmetic(model, sharing)
        for member in self._members:
            started = time.perf_counter()
            row = LiveTask(task=member.task.task, limit=member.limit, status="ok")
            try:
                scores = self._score(member, model, sharing)
            except UnscorableError as error:
                row = replace(row, status="unavailable", reason=str(error))
                lines.append(f"{member.task.task}: not scored: {error}")
            else:
                gold = gold_scores(scores.samples)
                row = described(row, scores, gold)
                values |= _values(member.task.task, scores, gold)
                lines.append(_line(member.task.task, scores, gold))
            rows.append(replace(row, seconds=time.perf_counter() - started))
        found = LiveEvaluation(step, tuple(rows))
        sharing.from_main(lambda: found.write(self._config.run.dir))
        return BenchmarkScores(values, lines)

    def _choose_arithmetic(self, model: ParallelDecoder, sharing: Sharing) -> None:
        """In fp32, the one of `megagpt eval run`, so that the checkpoint of this step has these very scores.

        Where tensor parallelism sums partial products they differ in the last digits: training sums faster than
        `megagpt.parallel.apply_tensor` does for exact shares.
        """
        if self._is_chosen or model.weight.dtype != torch.float32:
            return
        self._is_chosen = True
        if not sharing.all(make_batch_invariant(model)):
            model.packing = FAST  # on this process it may have held

    def _score(self, member: Member, model: ParallelDecoder, sharing: Sharing) -> Scores:
        # The same examples in the prompts at every step: lm-eval's draws go on where the last evaluation ended.
        random.seed(RANDOM_SEED)
        np.random.seed(NUMPY_SEED)
        for task in member.loaded.tasks.values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        lm = MegaGPTLM(
            model,
            self._tokenizer,
            max_seq_len=self._config.model.max_seq_len,
            batch_size=self._config.eval.tasks_batch_size,
            sharing=sharing,
        )
        # No bootstrap: lm-eval would fork a process that holds the device and the process groups.
        return score_task(lm, member.loaded, member.limit, bootstrap=0)


def described(row: LiveTask, scores: Scores, gold: GoldScores | None) -> LiveTask:
    """The row with all that was measured; intervals of a group as a checkpoint's result has them."""
    return replace(
        row,
        n=scores.n,
        n_total=scores.n_total,
        n_shots=scores.n_shots,
        chance=scores.chance,
        truncated=scores.truncated,
        metrics=clustered_metrics(row.task, scores.metrics, scores.samples),
        gold=gold,
    )


def _values(task: str, scores: Scores, gold: GoldScores | None) -> dict[str, float | None]:
    """Numbers of metrics.jsonl; JSON has no word for what is not finite."""
    found: dict[str, float | None] = {name: metric.value for name, metric in scores.metrics.items()}
    if gold is not None:
        found |= {"gold_bits_per_byte": gold.bits_per_byte}
        found |= {} if gold.margin is None else {"gold_margin": gold.margin}
    finite = {name: value if value is not None and math.isfinite(value) else None for name, value in found.items()}
    return {f"eval/{task}/{name}": value for name, value in finite.items()}


def _line(task: str, scores: Scores, gold: GoldScores | None) -> str:
    words = [f"{name} {metric.value:.4f}" for name, metric in scores.metrics.items()]
    if gold is not None:
        words.append(f"right answer {gold.bits_per_byte:.3f} bits/byte")
        words += [] if gold.margin is None else [f"margin {gold.margin:+.3f}"]
    return f"{task}: {', '.join(words)} ({scores.n} documents)"
