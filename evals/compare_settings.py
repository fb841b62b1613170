"""What two evaluations of one task were made with: what forbids to compare them, and what a reader must know."""

from __future__ import annotations

from typing import Any

from evals.results import TaskResult
from evals.reuse import SHORT

_DRAWN = ("samples", "temperature")
"""Of humaneval's completions."""
_TOLD = ("dtype", "template", "max_new_tokens", "seed")
"""Settings that belong to a model, or that its context decides."""


def forbids(a: TaskResult, b: TaskResult) -> list[str]:
    """What somebody chose differently, so that a difference of the scores would not be the models'."""
    values: list[tuple[str, Any, Any]] = [
        ("shots", a.n_shots, b.n_shots),
        ("version of the task", a.task_version, b.task_version),
        ("data", _data_of(a), _data_of(b)),
        ("documents", f"{a.n} of {a.n_total}", f"{b.n} of {b.n_total}"),
        ("judge", a.settings.get("judge"), b.settings.get("judge")),
        ("the judge's prompts", *(_judge_prompts_of(result) for result in (a, b))),
    ]
    values += [(f"{name} of completions", _code_of(a).get(name), _code_of(b).get(name)) for name in _DRAWN]
    values.append(("temperature", a.settings.get("temperature"), b.settings.get("temperature")))
    return [f"{name}: {before} and {after}" for name, before, after in values if before != after]


def tells(a: TaskResult, b: TaskResult) -> list[str]:
    """What differs without anybody's fault, or by little, and must stand beside the numbers."""
    told = _cut(a, b)
    limits = [result.generation.get("max_gen_toks") for result in (a, b)]
    if limits[0] != limits[1]:
        told.append(f"completions of at most {_known(limits[0])} and {_known(limits[1])} tokens")
    for name in _TOLD:
        before, after = a.settings.get(name), b.settings.get(name)
        if before != after:
            told.append(f"{name}: {before} and {after}")
    if a.lm_eval_version != b.lm_eval_version:
        told.append(f"lm-eval: {a.lm_eval_version} and {b.lm_eval_version}")
    code = [result.environment.get("code") for result in (a, b)]
    if None not in code and code[0] != code[1]:
        told.append(f"version of the evaluation's code: {str(code[0])[:SHORT]} and {str(code[1])[:SHORT]}")
    return told


def _cut(a: TaskResult, b: TaskResult) -> list[str]:
    """Prompts that lost their beginning are other prompts, where the models' contexts or tokenizers are not the same.

    The hashes of prompts are those of the whole ones and do not show it.
    """
    if not a.truncated and not b.truncated:
        return []
    contexts = [result.settings.get("max_seq_len") for result in (a, b)]
    tokenizers = [result.environment.get("tokenizer") for result in (a, b)]
    if a.truncated == b.truncated and contexts[0] == contexts[1] and tokenizers[0] == tokenizers[1]:
        return []
    numbers = f"{a.truncated:,} and {b.truncated:,} of {a.n:,}"
    where = f"contexts of {contexts[0]} and {contexts[1]} tokens"
    return [f"prompts that lost their beginning: {numbers} documents ({where}), so some prompts are not the same"]


def _known(value: Any) -> str:
    return "an unknown number of" if value is None else str(value)


def _code_of(result: TaskResult) -> dict[str, Any]:
    return result.settings.get("code") or {}


def _data_of(result: TaskResult) -> str:
    """What identifies the rows: their hash, else where they come from."""
    return str(result.data.get("sha256") or f"{result.data.get('origin')} {result.data.get('path_or_id')}")


def _judge_prompts_of(result: TaskResult) -> Any:
    return result.settings.get("judge_prompts") or result.settings.get("judge_prompt")
