"""lm-eval's generation arguments -> our decoder: stop strings, sampling, the text up to the first stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from evals.forwards import CACHE_BYTES
from megagpt.errors import EvalError
from megagpt.generate import Model, Sampling, generate
from megagpt.tokenizer import Tokenizer

_LOOK_BACK = 8
"""A stop string is looked for in the text of its own number of UTF-8 bytes, which no tokenizer of bytes needs more
tokens for, plus this many tokens: it may begin or end inside a token."""

TOGETHER = 64
"""Rows of a step. Measured on a CPU: four times as many as 16 save 30 % of the time, twice as many again 3 %."""

_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p", "seed"}


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How one kind of request is continued; requests with equal settings share batches."""

    max_new_tokens: int
    stops: tuple[str, ...]
    sampling: Sampling

    @classmethod
    def from_lm_eval(cls, arguments: dict[str, Any], task: str) -> GenerationSettings:
        """Read what `lm_eval.models.utils.normalize_gen_kwargs` returns.

        Raises:
            EvalError: an argument that we do not have would be passed over.
        """
        unknown = sorted(set(arguments) - _KNOWN)
        if unknown:
            raise EvalError(
                f"task {task}: generation argument {', '.join(unknown)} is not supported; known are "
                f"{', '.join(sorted(_KNOWN))}"
            )
        sampled = bool(arguments["do_sample"])
        sampling = Sampling(
            temperature=float(arguments.get("temperature", 0.0)) if sampled else 0.0,
            top_k=arguments.get("top_k"),
            top_p=arguments.get("top_p"),
            seed=int(arguments.get("seed", 0)),
        )
        return cls(int(arguments["max_gen_toks"]), tuple(stop for stop in arguments["until"] if stop), sampling)


@dataclass(frozen=True, slots=True)
class Written:
    """What a model wrote behind a prompt."""

    text: str
    """Up to the first stop string."""
    n_tokens: int
    """Generated, those of the stop string included."""


OnWritten = Callable[[int, Written], object]
"""Told the number of a prompt and what was written behind it."""


def rows_together(n_asked: int, batch_size: int, row_bytes: int) -> int:
    """Prompts that are continued at the same time: of the many that a step could take, as many as memory holds.

    Args:
        n_asked: how many there are.
        batch_size: of them run through the model together, at least.
        row_bytes: of keys and values of the longest row.
    """
    return max(batch_size, min(n_asked, TOGETHER, CACHE_BYTES // row_bytes))


def generate_texts(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    row_names: Sequence[str] | None = None,
    *,
    batch_size: int | None = None,
    on_written: OnWritten | None = None,
) -> list[Written]:
    """Continue each prompt and cut the text before the first stop string.

    Args:
        model: on the device that is to be used.
        tokenizer: the model's. Rows of the model's vocabulary that it does not know have no text.
        prompts: token ids; all are continued at the same time.
        settings: when to stop and how to choose.
        row_names: as for `megagpt.generate.generate`.
        batch_size: likewise.
        on_written: told of each prompt that is done, by its number.
    """
    written: list[list[int]] = [[] for _ in prompts]
    found = [Written("", 0) for _ in prompts]
    n_tokens = [0] * len(prompts)
    look_back = _LOOK_BACK + max((len(stop.encode()) for stop in settings.stops), default=0)

    def ends(row: int, token: int) -> bool:
        at_end_of_text = token == tokenizer.eot_id
        if not at_end_of_text:
            n_tokens[row] += 1
            if token < tokenizer.vocab_size:
                written[row].append(token)
        tail = tokenizer.decode(written[row][-look_back:])
        has_ended = (
            at_end_of_text or n_tokens[row] == settings.max_new_tokens or any(stop in tail for stop in settings.stops)
        )
        if has_ended:
            text = cut_at_first_stop(tokenizer.decode(written[row]), settings.stops)
            found[row] = Written(text, n_tokens[row])
            if on_written is not None:
                on_written(row, found[row])
        return has_ended

    generate(
        model,
        prompts,
        settings.max_new_tokens,
        settings.sampling,
        on_token=ends,
        row_names=row_names,
        batch_size=batch_size,
    )
    return found


def cut_at_first_stop(text: str, stops: Sequence[str]) -> str:
    """The text before whichever stop string comes first."""
    return text[: min((at for at in map(text.find, stops) if at >= 0), default=len(text))]
