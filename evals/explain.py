"""`megagpt eval explain`: one document as the model saw it: tokens, log-probabilities, and how the score follows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from rich.console import Console
from rich.table import Table

from evals.backend import MegaGPTLM
from evals.encoding import encode_pairs
from evals.prompts import kept_templates
from evals.run import EvalRequest, Evaluation
from evals.scoring import quiet_bars
from evals.task_loader import load_task, plan_task
from megagpt.checkpoint.open import open_checkpoint
from megagpt.errors import EvalError

SHOWN_CHARACTERS = 240
"""Of a context, at either end."""


@dataclass(frozen=True)
class ScoredToken:
    """One token of a continuation."""

    id: int
    text: str
    log_probability: float
    """Nats."""
    is_greedy: bool
    """The most probable token here."""


@dataclass(frozen=True)
class ScoredRequest:
    """A context and what is scored, or written, behind it."""

    context: str
    n_context_tokens: int
    n_cut_tokens: int
    """Of them, lost at the beginning, because the input exceeds the model's context."""
    cut: str
    """Their text."""
    continuation: str
    tokens: list[ScoredToken]
    total: float | None
    """Sum of the log-probabilities, nats; None for generated text."""
    per_character: float | None
    """The sum over the length of the choice, which decides acc_norm; None where there are no choices."""


@dataclass(frozen=True)
class Explanation:
    """How one document got its score."""

    task: str
    doc_id: int
    n_shots: int
    checkpoint: dict[str, Any]
    target: Any
    """The gold answer: the number of a choice, or a text."""
    requests: list[ScoredRequest]
    metrics: dict[str, Any]
    """Of this document alone; with a filter, `metric,filter`."""

    def to_json(self) -> str:
        """All of it."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, default=str)


def explain(request: EvalRequest, task_name: str, doc_id: int) -> Explanation:
    """Score one document.

    Args:
        request: checkpoint, data, shots, precision, device; its tasks and limit do not count.
        task_name: a task, not a group.
        doc_id: number of the document, as `doc_id` of the samples files has it.

    Raises:
        EvalError: no such task or document, or a task that cannot be explained.
    """
    evaluation = Evaluation(request, open_checkpoint(request.checkpoint))
    with quiet_bars(), kept_templates():
        plan = plan_task(task_name, request.data_dir, evaluation.cache_dir)
        loaded = load_task(plan, request.n_shots, check_counts=False)  # a document, not a score
        if list(loaded.tasks) != [task_name]:
            names = ", ".join(list(loaded.tasks)[:5])
            raise EvalError(f"{task_name} is a group of {len(loaded.tasks)} tasks; name one of them: {names} ...")
        task = loaded.tasks[task_name]
        instances = _instances(task, doc_id)
    lm = evaluation.make_lm()
    if task.OUTPUT_TYPE == "generate_until":
        explained = [_written(lm, instance) for instance in instances]
    elif task.OUTPUT_TYPE in ("multiple_choice", "loglikelihood"):
        explained = _scored(lm, instances, _choice_lengths(task, instances))
    else:
        raise EvalError(f"{task_name} is of the kind {task.OUTPUT_TYPE}, which scores whole texts; not supported")
    answers = [
        (each.total, all(token.is_greedy for token in each.tokens)) if each.total is not None else each.continuation
        for each in explained
    ]
    doc = instances[0].doc
    return Explanation(
        task=task_name,
        doc_id=doc_id,
        n_shots=int(task.get_config("num_fewshot")),
        checkpoint={
            "run": str(evaluation.checkpoint.run_dir),
            "step": evaluation.checkpoint.step,
            "hash": evaluation.checkpoint.hash,
        },
        target=task.doc_to_target(doc),
        requests=explained,
        metrics=_metrics(task, instances, answers),
    )


def _instances(task: Task, doc_id: int) -> list[Instance]:
    """The document's requests as a whole evaluation makes them: examples are drawn document after document."""
    n = len(task.eval_docs)
    if not 0 <= doc_id < n:
        raise EvalError(f"{task.task_name} has the documents 0 to {n - 1}; there is no document {doc_id}")
    if task.get_config("num_fewshot"):
        task.build_all_requests(limit=doc_id + 1, rank=0, world_size=1)
        return [instance for instance in task.instances if instance.doc_id == doc_id]
    task.build_all_requests(samples=[doc_id], rank=0, world_size=1)
    return list(task.instances)


def _choice_lengths(task: Task, instances: Sequence[Instance]) -> list[int | None]:
    """Characters of each choice as lm-eval counts them: without the space that stands before it in the continuation."""
    choices = task.doc_to_choice(instances[0].doc) if task.OUTPUT_TYPE == "multiple_choice" else []
    return [len(choice) for choice in choices] if len(choices) == len(instances) else [None] * len(instances)


def _scored(lm: MegaGPTLM, instances: Sequence[Instance], lengths: Sequence[int | None]) -> list[ScoredRequest]:
    pairs = [instance.args for instance in instances]
    encoded = encode_pairs(lm.tokenizer, pairs, lm.prefix_token_id)
    found = []
    scores = lm.score(instances)
    for (context, continuation), (ids, _), (run, answer), length in zip(pairs, encoded, scores, lengths, strict=True):
        kept = run.n_inputs + 1 - run.n_scored
        n_cut = len(ids) - kept
        tokens = [
            ScoredToken(token, lm.tokenizer.decode([token]), log_probability, greedy)
            for token, log_probability, greedy in zip(run.targets, answer.log_probabilities, answer.greedy, strict=True)
        ]
        found.append(
            ScoredRequest(
                context=context,
                n_context_tokens=len(ids),
                n_cut_tokens=n_cut,
                cut=lm.tokenizer.decode(ids[:n_cut].tolist()),
                continuation=continuation,
                tokens=tokens,
                total=answer.total,
                per_character=answer.total / length if length else None,
            )
        )
    return found


def _written(lm: MegaGPTLM, instance: Instance) -> ScoredRequest:
    context, arguments = instance.args
    ids = lm.tok_encode(context)
    (text,) = lm.generate_until([instance])
    room = lm.room_for_prompt(instance, arguments)
    n_cut = max(0, len(ids) - room)
    return ScoredRequest(context, len(ids), n_cut, lm.tokenizer.decode(ids[:n_cut]), text, [], None, None)


def _metrics(task: Task, instances: Sequence[Instance], answers: Sequence[Any]) -> dict[str, Any]:
    """As lm-eval's evaluator: every filter's answer is scored by itself."""
    for instance, answer in zip(instances, answers, strict=True):
        instance.resps = [answer]
    task._instances = list(instances)  # filters run over all that the task holds
    task.apply_filters()
    found = {}
    for name in instances[0].filtered_resps:
        results = [instance.filtered_resps[name] for instance in instances]
        for metric, value in task.process_results(instances[0].doc, results).items():
            found[metric if name == "none" else f"{metric},{name}"] = value
    return found


def show(explanation: Explanation, console: Console) -> None:
    """Print it: the context once, then each continuation token by token."""
    step = explanation.checkpoint
    console.print(
        f"{explanation.task}, document {explanation.doc_id}, {explanation.n_shots} examples; "
        f"step {step['step']} of {step['run']} ({step['hash'][:12]})",
        markup=False,
    )
    shown = None
    for number, request in enumerate(explanation.requests):
        if (request.context, request.n_cut_tokens) != shown:
            _show_context(request, console)
            shown = (request.context, request.n_cut_tokens)
        if request.total is None:
            console.print(f"\nwritten: {request.continuation!r}", markup=False)
        else:
            _show_tokens(request, _label(explanation, number), console)
    console.print(f"\ngold: {explanation.target!r}", markup=False)
    for metric, value in explanation.metrics.items():
        console.print(f"{metric}: {value}", markup=False)


def _label(explanation: Explanation, number: int) -> str:
    """Choice, and which decisions it wins."""
    requests = explanation.requests
    label = f"choice {number}"
    marks = ["gold"] if explanation.target == number else []
    if len(requests) > 1:
        for name, values in (
            ("largest sum", [request.total for request in requests]),
            ("largest per character", [request.per_character for request in requests]),
        ):
            known = [value for value in values if value is not None]
            marks += [name] if len(known) == len(values) and known.index(max(known)) == number else []
    return label + (f" ({', '.join(marks)})" if marks else "")


def _show_context(request: ScoredRequest, console: Console) -> None:
    text = request.context
    if len(text) > 2 * SHOWN_CHARACTERS:
        left_out = len(text) - 2 * SHOWN_CHARACTERS
        text = f"{text[:SHOWN_CHARACTERS]} [... {left_out} characters ...] {text[-SHOWN_CHARACTERS:]}"
    console.print(f"\ncontext, {request.n_context_tokens} tokens:\n{text}", markup=False, highlight=False)
    if request.n_cut_tokens:
        end = request.cut[-SHOWN_CHARACTERS:]
        console.print(
            f"cut: the first {request.n_cut_tokens} tokens, which the model did not see; they end with {end!r}",
            markup=False,
        )


def _show_tokens(request: ScoredRequest, label: str, console: Console) -> None:
    per = "" if request.per_character is None else f", {request.per_character:.6f} per character"
    console.print(
        f"\n{label}: {request.continuation!r}\nsum {request.total:.6f} nats{per}", markup=False, highlight=False
    )
    table = Table()
    for column in ("token", "text", "log-probability", "most probable"):
        table.add_column(column, justify="right" if column in ("token", "log-probability") else "left")
    for token in request.tokens:
        greedy = "yes" if token.is_greedy else ""
        table.add_row(str(token.id), repr(token.text), f"{token.log_probability:.6f}", greedy)
    console.print(table, markup=False)
