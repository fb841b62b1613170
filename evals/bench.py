"""Our backend and lm-eval's Hugging Face backend on the same requests, by turns, and whether they agree."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from rich.console import Console
from rich.table import Table

from evals.backend import MegaGPTLM
from evals.invariance import make_batch_invariant
from evals.scoring import quiet_bars
from evals.task_loader import LoadedTask, load_task, plan_task
from megagpt.checkpoint.hf import export_hf
from megagpt.checkpoint.open import Checkpoint, open_checkpoint
from megagpt.errors import EvalError
from megagpt.tokenizer import HF_FILE

LEAST_SPEEDUP = 3.0
TOLERANCE = 1e-4
"""Largest difference of two log-likelihoods, nats."""
METRIC_TOLERANCE = 2e-5
"""Relative."""
OURS, THEIRS = "megagpt", "lm-eval hf"


@dataclass(frozen=True)
class BenchRequest:
    """What is answered."""

    checkpoint: Path
    tasks: str
    """TASK, TASK:SHOTS or TASK:SHOTS:LIMIT, comma-separated."""
    data_dir: Path | None = None
    limit: int | None = None
    max_new_tokens: int = 64
    batch_size: int = 16
    rounds: int = 1


@dataclass(frozen=True)
class BenchRow:
    """One task."""

    task: str
    n_requests: int
    seconds: dict[str, float]
    """Backend -> least seconds of all rounds."""
    tokens_computed: int
    tokens_naive: int
    largest_difference: float
    """Of log-likelihoods, nats."""
    n_other_texts: int
    """Generated texts that are not the same."""
    same_metrics: bool


@dataclass(frozen=True)
class Bench:
    """The whole suite."""

    rows: list[BenchRow]
    n_threads: int
    batch_invariant: bool

    def total(self, backend: str) -> float:
        """Seconds of all tasks."""
        return sum(row.seconds[backend] for row in self.rows)

    @property
    def speedup(self) -> float:
        """How many times faster than lm-eval's backend."""
        return self.total(THEIRS) / self.total(OURS)

    @property
    def agrees(self) -> bool:
        """Whether all answers are the same."""
        return all(
            row.largest_difference <= TOLERANCE and not row.n_other_texts and row.same_metrics for row in self.rows
        )

    @property
    def ok(self) -> bool:
        """As exact and as fast as is wanted."""
        return self.agrees and self.speedup >= LEAST_SPEEDUP

    def to_json(self) -> str:
        """All figures."""
        return json.dumps({**asdict(self), "speedup": self.speedup, "agrees": self.agrees}, indent=1) + "\n"


class Replay(LM):  # type: ignore[misc]  # lm-eval has no types
    """A backend that gives lm-eval answers which are known: what is left is building requests and metrics."""

    def __init__(self, answers: Iterator[Sequence[Any]] | None = None) -> None:
        super().__init__()
        self.asked: list[tuple[str, list[Instance]]] = []
        self._answers = answers

    def _answer(self, kind: str, requests: list[Instance]) -> Sequence[Any]:
        self.asked.append((kind, requests))
        if self._answers is not None:
            return next(self._answers)
        return [""] * len(requests) if kind == "generate_until" else [(0.0, False)] * len(requests)

    def loglikelihood(self, requests: list[Instance]) -> Sequence[Any]:
        """What was answered."""
        return self._answer("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> Sequence[Any]:  # noqa: ARG002 - lm-eval's signature
        """Not timed: no task of the suites uses it.

        Raises:
            EvalError: always.
        """
        raise EvalError("a task that scores whole texts cannot be benchmarked; leave it out of --tasks")

    def generate_until(self, requests: list[Instance]) -> Sequence[Any]:
        """What was answered."""
        return self._answer("generate_until", requests)


def bench(request: BenchRequest, console: Console) -> Bench:
    """Time both backends.

    Raises:
        EvalError: a task that does not exist or whose data cannot be reached.
        CheckpointError: no checkpoint that can be used.
    """
    checkpoint = open_checkpoint(request.checkpoint)
    model = checkpoint.load_model()
    is_invariant = make_batch_invariant(model)
    tokenizer = checkpoint.tokenizer()
    rows = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        theirs = _hf_backend(checkpoint, Path(folder), request.batch_size)
        for word in request.tasks.split(","):
            name, shots, limit = _parse(word, request.limit)
            with quiet_bars():
                plan = plan_task(name, request.data_dir, Path(folder) / "cache")
                loaded = load_task(plan, shots, check_counts=False)  # seconds are told, and no score
            _limit_new_tokens(loaded, request.max_new_tokens)

            def ours() -> MegaGPTLM:
                max_seq_len = checkpoint.model_config.max_seq_len
                return MegaGPTLM(model, tokenizer, max_seq_len=max_seq_len, batch_size=request.batch_size)

            with console.status(name):
                rows.append(_bench_task(loaded, ours, theirs, request.rounds, limit))
    return Bench(rows, torch.get_num_threads(), is_invariant)


def _parse(word: str, limit: int | None) -> tuple[str, int | None, int | None]:
    """Task, shots, limit.

    Raises:
        EvalError: not of the form TASK:SHOTS:LIMIT.
    """
    name, *numbers = word.split(":")
    if not name or len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise EvalError(f"--tasks: {word!r} is not TASK, TASK:SHOTS or TASK:SHOTS:LIMIT")
    given = [int(number) for number in numbers]
    return name, given[0] if given else None, given[1] if len(given) == 2 else limit


def _bench_task(
    loaded: LoadedTask, ours: Callable[[], MegaGPTLM], theirs: LM, rounds: int, limit: int | None
) -> BenchRow:
    recorded = Replay()
    _evaluate(recorded, loaded, limit)
    answers: dict[str, list[Sequence[Any]]] = {}
    seconds = {OURS: float("inf"), THEIRS: float("inf")}
    for _ in range(rounds):
        lm = ours()  # a new one each time: its counts are this round's
        for backend, answering in ((OURS, lm), (THEIRS, theirs)):
            started = time.perf_counter()
            answers[backend] = [_ask(answering, kind, requests) for kind, requests in recorded.asked]
            seconds[backend] = min(seconds[backend], time.perf_counter() - started)
    largest, n_other_texts = 0.0, 0
    for mine, others in zip(answers[OURS], answers[THEIRS], strict=True):
        for answer, other in zip(mine, others, strict=True):
            if isinstance(other, str):
                n_other_texts += answer != other
            else:
                largest = max(largest, abs(answer[0] - other[0]))
    scores = [_evaluate(Replay(iter(answers[backend])), loaded, limit) for backend in (OURS, THEIRS)]
    return BenchRow(
        task=loaded.name,
        n_requests=sum(len(requests) for _, requests in recorded.asked),
        seconds=seconds,
        tokens_computed=lm.tokens_computed,
        tokens_naive=lm.tokens_naive,
        largest_difference=largest,
        n_other_texts=n_other_texts,
        same_metrics=_same(*scores),
    )


def _same(one: Any, other: Any) -> bool:
    """Equal but for rounding: means of probabilities carry that of the log-likelihoods; one document is far more."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, float):
        return math.isclose(one, other, rel_tol=METRIC_TOLERANCE) or (math.isnan(one) and math.isnan(other))
    return bool(one == other)


def _ask(lm: LM, kind: str, requests: list[Instance]) -> Sequence[Any]:
    found: Sequence[Any] = getattr(lm, kind)(requests, disable_tqdm=True)
    return found


def _evaluate(lm: LM, loaded: LoadedTask, limit: int | None) -> dict[str, Any]:
    """lm-eval's results. A task that has its requests keeps them: building them takes longer than answering them."""
    for task in loaded.tasks.values():
        before = getattr(task, "_instances", None)  # lm-eval sets it when it builds them
        if before is not None:
            task.build_all_requests = lambda **_: None
        for instance in before or ():
            instance.resps, instance.filtered_resps = [], {}
    with quiet_bars():
        found = lm_eval.evaluator.evaluate(
            lm, {"tasks": loaded.tasks, "groups": loaded.groups}, limit=limit, bootstrap_iters=0, log_samples=False
        )
    results: dict[str, Any] = found["results"]
    return results


def _limit_new_tokens(loaded: LoadedTask, max_new_tokens: int) -> None:
    for task in loaded.tasks.values():
        if task.OUTPUT_TYPE == "generate_until":
            arguments = {**(task.get_config("generation_kwargs") or {}), "max_gen_toks": max_new_tokens}
            task.set_config("generation_kwargs", arguments)


def _hf_backend(checkpoint: Checkpoint, folder: Path, batch_size: int) -> LM:
    """lm-eval's own backend over the exported weights."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = checkpoint.tokenizer()
    exported = folder / "hf"
    saved = tokenizer.save(folder)
    if saved.name != HF_FILE:
        raise EvalError(
            f"{checkpoint.path}: its tokenizer is tiktoken's, which lm-eval's Hugging Face backend cannot read; "
            f"take a run whose tokenizer is a {HF_FILE}"
        )
    export_hf(checkpoint.load_model(), checkpoint.model_config, saved, exported, eot_id=tokenizer.eot_id)
    return HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(exported),
        tokenizer=AutoTokenizer.from_pretrained(exported),
        batch_size=batch_size,
        max_length=checkpoint.model_config.max_seq_len,
        device="cpu",
    )


def show(found: Bench, console: Console) -> None:
    """One row a task, and the sum."""
    table = Table(title=f"seconds to answer, fp32, {found.n_threads} threads", title_justify="left")
    for column in (
        "task",
        "requests",
        OURS,
        THEIRS,
        "times faster",
        "tokens run",
        "naive",
        "largest difference",
        "same",
    ):
        table.add_column(column, justify="left" if column in ("task", "same") else "right")
    for row in found.rows:
        same = "yes" if row.same_metrics and not row.n_other_texts else f"NO ({row.n_other_texts} texts)"
        ours, theirs = row.seconds[OURS], row.seconds[THEIRS]
        table.add_row(
            row.task,
            f"{row.n_requests:,}",
            f"{ours:.2f}",
            f"{theirs:.2f}",
            f"{theirs / ours:.1f}",
            f"{row.tokens_computed:,}",
            f"{row.tokens_naive:,}",
            f"{row.largest_difference:.1e}",
            same,
        )
    table.add_section()
    table.add_row("all", "", f"{found.total(OURS):.2f}", f"{found.total(THEIRS):.2f}", f"{found.speedup:.1f}")
    console.print(table)
    console.print("the same bit for bit at any batch size: " + ("yes" if found.batch_invariant else "no"))
