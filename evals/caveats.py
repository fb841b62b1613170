"""What a reader must know of a score beside its number, told from what its result says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evals.results import TaskResult

MOST_CUT = 0.5
"""Share of a task's documents from which on their cut prompts are a warning: the score is of other prompts then."""
DIFFERS = "differs"
"""`data.checksum` of a result: not the copy whose hash is known (`evals.data_checksum`; a test compares)."""
FASTCHAT_TOKENS = 1024
"""Of an answer to MT-Bench. Source: FastChat, llm_judge/gen_model_answer.py; a test compares with `evals.mt_bench`."""


def is_mostly_cut(truncated: int, n: int) -> bool:
    """Whether most prompts lost their beginning."""
    return n > 0 and truncated / n >= MOST_CUT


def caveats(result: TaskResult) -> tuple[str, ...]:
    """Sentences without a full stop, the gravest first; of files of every version.

    Args:
        result: of a task that could be run and that no judge scored.
    """
    told = [_cut_prompts(result), _other_files(result.data), _examples_from(result), result.reason]
    return tuple(line for line in told if line)


def judged_caveats(result: TaskResult) -> tuple[str, ...]:
    """Likewise of a result that a judge scored; what `result.reason` says is told elsewhere."""
    tokens = result.settings.get("max_new_tokens")
    short = ""
    if result.task.startswith("mt_bench") and isinstance(tokens, int) and tokens < FASTCHAT_TOKENS:
        short = (
            f"an answer has {tokens:,} tokens at most where FastChat's have {FASTCHAT_TOKENS:,}, because the context "
            "holds no more: not comparable with published scores"
        )
    return tuple(line for line in (short, _other_files(result.data)) if line)


def _cut_prompts(result: TaskResult) -> str:
    if not result.truncated:
        return ""
    context = result.settings.get("max_seq_len")
    room = "the model's context" if context is None else f"the model's context of {context:,} tokens"
    what = f"{result.truncated:,} of {result.n:,} prompts lost their beginning, being longer than {room}"
    if not is_mostly_cut(result.truncated, result.n):
        return what
    shots = "" if not result.n_shots else f" with all {result.n_shots} worked examples"
    return f"most prompts are cut: {what}; this is no score{shots} and not comparable with others"


def _other_files(data: dict[str, Any]) -> str:
    if data.get("checksum") != DIFFERS:
        return ""
    return "the data files have the official number of rows but are not the copy that was checked: scores may differ"


def _examples_from(result: TaskResult) -> str:
    """Worked examples that come from the split that is scored, or, in older files, from one that is not known."""
    if not result.n_shots:
        return ""
    absent: Sequence[str] = result.data.get("absent_splits") or ()
    lacks = f": the data has no {' and no '.join(absent)}" if absent else ""
    shared = sorted(set(result.splits.get("examples", ())) & set(result.splits.get("scored", ())))
    if shared:
        return (
            f"the {result.n_shots} worked examples of a prompt were drawn from {' and '.join(shared)}, which is "
            f"scored too (never the document itself){lacks}"
        )
    if not result.splits and "train" in absent:
        return f"the {result.n_shots} worked examples of a prompt were not drawn from train{lacks}"
    return ""
