"""One task through one backend, as lm-eval runs it, timed part by part: building requests, answering, scoring."""

from __future__ import annotations

import hashlib
import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import lm_eval.evaluator
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from evals.scoring import quiet_bars
from evals.task_loader import NUMPY_SEED, RANDOM_SEED, LoadedTask
from megagpt.errors import EvalError

OURS, THEIRS = "megagpt", "lm-eval hf"


@dataclass(frozen=True, slots=True)
class Seconds:
    """Wall time of the parts."""

    requests: float
    """Building the requests: prompts from documents."""
    answers: float
    """From the requests to the last answer: tokenising, planning, running the model."""
    metrics: float
    """From answers to scores."""
    cpu: float = 0.0
    """Of the whole, CPU time of all threads: on a busy machine it says more than wall time."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.requests + self.answers + self.metrics


@dataclass(frozen=True, slots=True)
class Measurement:
    """One task through one backend, once."""

    asked: str
    """TASK:SHOTS:LIMIT of the command."""
    data: str
    """Hash of the task's rows."""
    backend: str
    round: int
    seconds: Seconds
    n_requests: int
    requests: str
    """SHA-256 of every field of every request, in order."""
    answers: list[list[Any]]
    """Of each kind of request in turn: [log-likelihood, is it greedy], or a text."""
    scores: dict[str, Any]
    """lm-eval's results."""
    tokens_computed: int = 0
    """Ours: tokens that ran through the model for scoring."""
    tokens_naive: int = 0
    """Ours: tokens of all requests, each by itself; of generation the prompts and the texts."""

    def to_json(self) -> dict[str, Any]:
        """As a line of a file."""
        return {"measurement": asdict(self)}

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Measurement:
        """What `to_json` made."""
        fields = row["measurement"]
        return cls(**{**fields, "seconds": Seconds(**fields["seconds"])})


class Timed(LM):  # type: ignore[misc]  # lm-eval has no types
    """A backend with clocks around it: what comes before its first call is building, what comes after it is scoring."""

    def __init__(self, lm: LM, *, show_bar: bool = False) -> None:
        super().__init__()
        self.answers: list[list[Any]] = []
        self.n_requests = 0
        self.answering = 0.0
        """Seconds in the backend."""
        self.building: float | None = None
        """Seconds before it was first asked."""
        self.aside = 0.0
        """Seconds that this class took itself."""
        self._lm, self._show_bar = lm, show_bar
        self._digest = hashlib.sha256()
        self._started, self._cpu_started = time.perf_counter(), time.process_time()

    @property
    def requests(self) -> str:
        """SHA-256 of what was asked."""
        return self._digest.hexdigest()

    def _answer(self, kind: str, requests: list[Instance]) -> list[Any]:
        called = time.perf_counter()
        if self.building is None:
            self.building = called - self._started
        self.n_requests += len(requests)
        for request in requests:
            self._digest.update(describe_request(request).encode("utf-8", "surrogatepass"))
        started = time.perf_counter()
        found = list(getattr(self._lm, kind)(requests, disable_tqdm=not self._show_bar))
        ended = time.perf_counter()
        self.answering += ended - started
        self.answers.append([answer if isinstance(answer, str) else list(answer) for answer in found])
        self.aside += started - called + time.perf_counter() - ended
        return found

    def loglikelihood(self, requests: list[Instance]) -> list[Any]:
        """The backend's."""
        return self._answer("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[Any]:  # noqa: ARG002 - lm-eval's signature
        """Not timed: no task of the suites uses it.

        Raises:
            EvalError: always.
        """
        raise EvalError("a task that scores whole texts cannot be benchmarked; leave it out of --tasks")

    def generate_until(self, requests: list[Instance]) -> list[Any]:
        """The backend's."""
        return self._answer("generate_until", requests)

    def seconds(self) -> Seconds:
        """Since this object was made."""
        building = self.building or 0.0
        whole = time.perf_counter() - self._started
        metrics = whole - building - self.answering - self.aside
        return Seconds(building, self.answering, metrics, time.process_time() - self._cpu_started)


def describe_request(request: Instance) -> str:
    """Every field of a request, but what answers are put into."""
    fields = (
        request.request_type,
        request.doc,
        request.arguments,
        request.idx,
        request.metadata,
        request.task_name,
        request.doc_id,
        request.repeats,
    )
    return f"{fields!r}\0"


def evaluate_timed(
    lm: LM, loaded: LoadedTask, limit: int | None, around: Callable[[], AbstractContextManager[None]], *, show_bar: bool
) -> tuple[Timed, Seconds, dict[str, Any]]:
    """lm-eval's own evaluation of freshly loaded tasks.

    Args:
        lm: the backend.
        loaded: tasks whose samplers have drawn nothing yet.
        limit: documents of each task; None for all.
        around: what is done to lm-eval meanwhile.
        show_bar: whether the backend shows lm-eval's progress bar.

    Returns:
        What was asked and answered, how long it took, and lm-eval's results by task.
    """
    random.seed(RANDOM_SEED)
    np.random.seed(NUMPY_SEED)
    with quiet_bars(), _quiet_warnings(), around():
        timed = Timed(lm, show_bar=show_bar)
        found = lm_eval.evaluator.evaluate(
            timed, {"tasks": loaded.tasks, "groups": loaded.groups}, limit=limit, bootstrap_iters=0, log_samples=False
        )
        seconds = timed.seconds()
    scores: dict[str, Any] = found["results"]
    return timed, seconds, scores


@contextmanager
def _quiet_warnings() -> Iterator[None]:
    """lm-eval's backend writes a line for every prompt that it cuts: thousands, and writing them takes its time."""
    logger = logging.getLogger("lm_eval.models")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
