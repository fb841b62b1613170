"""A suite through our backend and through lm-eval's Hugging Face backend, by turns, and whether they agree."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import LM
from rich.console import Console

from evals.answers import code_version
from evals.backend import MegaGPTLM
from evals.bench_measure import OURS, THEIRS, Measurement, Seconds, evaluate_timed
from evals.invariance import make_batch_invariant
from evals.lines import append_line, read_lines
from evals.prompts import kept_templates
from evals.scoring import quiet_bars
from evals.task_loader import LoadedTask, TaskPlan, load_task, plan_task
from megagpt.checkpoint.hf import export_hf
from megagpt.checkpoint.open import Checkpoint, open_checkpoint
from megagpt.errors import EvalError
from megagpt.tokenizer import HF_FILE

LEAST_SPEEDUP = 3.0
TOLERANCE = 1e-4
"""Largest difference of two log-likelihoods, nats."""
METRIC_TOLERANCE = 2e-5
"""Relative."""


@dataclass(frozen=True)
class BenchRequest:
    """What is answered."""

    checkpoint: Path
    tasks: str
    """TASK, TASK:SHOTS or TASK:SHOTS:LIMIT, comma-separated."""
    data_dir: Path | None = None
    limit: int | None = None
    max_new_tokens: int | None = None
    """Of tasks that generate; None: what each task's definition says, lm-eval's 256 where it says nothing."""
    batch_size: int = 16
    rounds: int = 1
    lines: Path | None = None
    """Where each measurement is kept as soon as it is there; those that are there already are not made again."""


@dataclass(frozen=True)
class BenchRow:
    """One task."""

    task: str
    n_requests: int
    seconds: dict[str, Seconds]
    """Backend -> of its fastest round."""
    tokens_computed: int
    tokens_naive: int
    largest_difference: float
    """Of log-likelihoods, nats."""
    n_other_texts: int
    """Generated texts that are not the same."""
    differences: list[str]
    """Metrics that are not the same, with both values."""
    same_requests: bool = True
    """Whether both were asked the same, to the byte."""


@dataclass(frozen=True)
class Bench:
    """The whole suite."""

    rows: list[BenchRow]
    n_threads: int
    batch_invariant: bool

    def sum(self, backend: str) -> Seconds:
        """Seconds of all tasks."""
        found = [row.seconds[backend] for row in self.rows]
        return Seconds(
            sum(each.requests for each in found),
            sum(each.answers for each in found),
            sum(each.metrics for each in found),
            sum(each.cpu for each in found),
        )

    @property
    def speedup(self) -> float:
        """How many times faster than lm-eval's backend, from documents to scores."""
        return self.sum(THEIRS).total / self.sum(OURS).total

    @property
    def agrees(self) -> bool:
        """Whether all requests, answers and scores are the same."""
        return all(
            row.same_requests and row.largest_difference <= TOLERANCE and not row.n_other_texts and not row.differences
            for row in self.rows
        )

    @property
    def ok(self) -> bool:
        """As exact and as fast as is wanted."""
        return self.agrees and self.speedup >= LEAST_SPEEDUP

    def to_json(self) -> str:
        """All figures."""
        totals = {backend: asdict(self.sum(backend)) for backend in (OURS, THEIRS)}
        found = {**asdict(self), "seconds": totals, "speedup": self.speedup, "agrees": self.agrees}
        return json.dumps(found, indent=1) + "\n"


@dataclass(frozen=True)
class _Asked:
    """One task of the command."""

    word: str
    name: str
    shots: int | None
    limit: int | None


def bench(request: BenchRequest, console: Console) -> Bench:
    """Time both backends.

    Raises:
        EvalError: a task that does not exist or whose data cannot be reached, or lines of another benchmark.
        CheckpointError: no checkpoint that can be used.
    """
    asked = [_parse(word, request.limit) for word in request.tasks.split(",")]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        run = _Run(request, Path(folder), console)
        rows = [run.row(task) for task in asked]
    return Bench(rows, torch.get_num_threads(), run.is_invariant)


class _Run:
    """Both backends over one checkpoint."""

    def __init__(self, request: BenchRequest, folder: Path, console: Console) -> None:
        self._request, self._folder, self._console = request, folder, console
        self._checkpoint = open_checkpoint(request.checkpoint)
        self._model = self._checkpoint.load_model()
        self.is_invariant = make_batch_invariant(self._model)
        self._tokenizer = self._checkpoint.tokenizer()
        self._theirs = _hf_backend(self._checkpoint, folder, request.batch_size)
        self._known = [] if request.lines is None else self._read(request.lines)

    def row(self, asked: _Asked) -> BenchRow:
        """One task: every backend in every round, by turns."""
        with quiet_bars():
            plan = plan_task(asked.name, self._request.data_dir, self._folder / "cache")
        found = [
            self._measured(asked, plan, backend, number)
            for number in range(self._request.rounds)
            for backend in (OURS, THEIRS)
        ]
        return make_row(asked.name, found)

    def _measured(self, asked: _Asked, plan: TaskPlan, backend: str, number: int) -> Measurement:
        """Measured now, or by a benchmark that was ended."""
        data = plan.data.sha256 or plan.data.path_or_id
        for known in self._known:
            if (known.asked, known.data, known.backend, known.round) == (asked.word, data, backend, number):
                self._tell(asked.name, known, "known: ")
                return known
        with quiet_bars():  # tasks of its own: their samplers start with the same seed
            loaded = load_task(plan, asked.shots, check_counts=False)  # seconds are told, and no score
        if self._request.max_new_tokens is not None:
            _limit_new_tokens(loaded, self._request.max_new_tokens)
        with self._showing(f"{asked.name}: {backend}", backend) as on_progress:
            lm = self._ours(on_progress) if backend == OURS else self._theirs
            around = kept_templates if backend == OURS else nullcontext
            show_bar = backend == THEIRS and self._console.is_terminal
            timed, seconds, scores = evaluate_timed(lm, loaded, asked.limit, around, show_bar=show_bar)
        measured = Measurement(
            asked=asked.word,
            data=data,
            backend=backend,
            round=number,
            seconds=seconds,
            n_requests=timed.n_requests,
            requests=timed.requests,
            answers=timed.answers,
            scores=json.loads(json.dumps(scores)),
            tokens_computed=lm.tokens_computed if isinstance(lm, MegaGPTLM) else 0,
            tokens_naive=lm.tokens_naive + _n_generation_tokens(lm, loaded) if isinstance(lm, MegaGPTLM) else 0,
        )
        if self._request.lines is not None:
            append_line(self._request.lines, measured.to_json())
        self._tell(asked.name, measured)
        return measured

    def _ours(self, on_progress: Callable[[int, int], None]) -> MegaGPTLM:
        """A new one each time: its counts are this measurement's."""
        return MegaGPTLM(
            self._model,
            self._tokenizer,
            max_seq_len=self._checkpoint.model_config.max_seq_len,
            batch_size=self._request.batch_size,
            on_progress=on_progress,
        )

    @contextmanager
    def _showing(self, title: str, backend: str) -> Iterator[Callable[[int, int], None]]:
        """A line that moves; lm-eval's backend shows a bar of its own."""
        if backend == THEIRS:
            yield lambda _done, _total: None
            return
        with self._console.status(title) as status:
            yield lambda done, total: status.update(f"{title}: {done:,} of {total:,}")

    def _tell(self, name: str, found: Measurement, known: str = "") -> None:
        each = found.seconds
        self._console.print(
            f"{name}: {known}{found.backend}: {found.n_requests:,} requests built in {each.requests:.1f} s, "
            f"answered in {each.answers:.1f} s, scored in {each.metrics:.1f} s",
            highlight=False,
            markup=False,
        )

    def _settings(self) -> dict[str, Any]:
        """What decides the seconds and answers of every task."""
        return {
            "checkpoint": self._checkpoint.hash,
            "batch_size": self._request.batch_size,
            "max_new_tokens": self._request.max_new_tokens,
            "n_threads": torch.get_num_threads(),
            "batch_invariant": self.is_invariant,
            "transformers": metadata.version("transformers"),
            "code": code_version(),
        }

    def _read(self, path: Path) -> list[Measurement]:
        """What an earlier benchmark of the same left; a new file gets its first line.

        Raises:
            EvalError: the file is of something else.
        """
        rows = read_lines(path)
        settings = self._settings()
        if not rows:
            append_line(path, {"settings": settings})
            return []
        before = rows[0].get("settings")
        if not isinstance(before, dict) or not all("measurement" in row for row in rows[1:]):
            raise EvalError(f"{path}: not the lines of `megagpt bench evals`; name another file with --lines")
        for key, value in settings.items():
            if before.get(key) != value:
                raise EvalError(
                    f"{path}: measured with {key} {before.get(key)}, now it is {value}; name another file with "
                    "--lines, or delete this one"
                )
        return [Measurement.from_json(row) for row in rows[1:]]


def make_row(task: str, found: Sequence[Measurement]) -> BenchRow:
    """All rounds of both backends of one task."""
    ours, theirs = (_fastest(found, backend) for backend in (OURS, THEIRS))
    largest, n_other_texts = 0.0, 0
    for mine, others in zip(ours.answers, theirs.answers, strict=True):
        for answer, other in zip(mine, others, strict=True):
            if isinstance(other, str):
                n_other_texts += answer != other
            else:
                largest = max(largest, abs(answer[0] - other[0]))
    return BenchRow(
        task=task,
        n_requests=ours.n_requests,
        seconds={OURS: ours.seconds, THEIRS: theirs.seconds},
        tokens_computed=ours.tokens_computed,
        tokens_naive=ours.tokens_naive,
        largest_difference=largest,
        n_other_texts=n_other_texts,
        differences=list(_differences(ours.scores, theirs.scores)),
        same_requests=all(each.requests == ours.requests for each in found),
    )


def _fastest(found: Sequence[Measurement], backend: str) -> Measurement:
    return min((each for each in found if each.backend == backend), key=lambda each: each.seconds.total)


def _differences(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[str]:
    """Metrics that differ by more than the rounding of log-likelihoods makes them; one document is far more."""
    for task in sorted({*ours, *theirs}):
        mine, others = ours.get(task, {}), theirs.get(task, {})
        for key in sorted({*mine, *others}):
            if not _same(mine.get(key), others.get(key)):
                yield f"{task} {key}: {mine.get(key)} and {others.get(key)}"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=METRIC_TOLERANCE) or (math.isnan(one) and math.isnan(other))
    return bool(one == other)


def _parse(word: str, limit: int | None) -> _Asked:
    """Task, shots, limit.

    Raises:
        EvalError: not of the form TASK:SHOTS:LIMIT.
    """
    name, *numbers = word.split(":")
    if not name or len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise EvalError(f"--tasks: {word!r} is not TASK, TASK:SHOTS or TASK:SHOTS:LIMIT")
    given = [int(number) for number in numbers]
    shots, limit = given[0] if given else None, given[1] if len(given) == 2 else limit
    return _Asked(f"{name}:{shots}:{limit}", name, shots, limit)


def _limit_new_tokens(loaded: LoadedTask, max_new_tokens: int) -> None:
    for task in loaded.tasks.values():
        if task.OUTPUT_TYPE == "generate_until":
            arguments = {**(task.get_config("generation_kwargs") or {}), "max_gen_toks": max_new_tokens}
            task.set_config("generation_kwargs", arguments)


def _n_generation_tokens(lm: MegaGPTLM, loaded: LoadedTask) -> int:
    """Of prompts, as far as they fit, and of the texts that were written."""
    n = 0
    for request in (request for task in loaded.tasks.values() for request in task.instances):
        if request.request_type == "generate_until":
            prompt, arguments = request.args
            n += min(len(lm.tok_encode(prompt)), lm.room_for_prompt(request, arguments))
            n += sum(len(lm.tok_encode(text)) for text in request.resps)
    return n


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
