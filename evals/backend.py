"""Our decoder as lm-eval sees a model: log-likelihoods, rolling log-likelihoods and generation, in memory.

What inputs share runs once (`evals.prefix_tree`). No response cache of lm-eval's: it is not keyed by the model; answers
of a killed evaluation are in `evals.answers`. Nothing is cut without being counted: `truncated` says for each task
which documents lost the beginning of their prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from evals.answers import AnswerStore, request_hash
from evals.decoding import GenerationSettings, Written, generate_texts, rows_together
from evals.encoding import encode_pairs
from evals.forwards import Answer, PlanRunner, slot_bytes
from evals.prefix_tree import Continuation, cut_in_parts, plan_forwards
from evals.sharing import Sharing
from megagpt.errors import EvalError
from megagpt.generate import Model
from megagpt.tokenizer import Tokenizer

DEFAULT_MAX_GEN_TOKS = 256
"""Tokens to generate where a task does not say. Source: lm-eval 0.4.13, HFLM.max_gen_toks."""

T = TypeVar("T")

_Prompt = tuple[int, list[int], str]
"""(number of the request, token ids, name of what it draws)."""

Request = tuple[Any, Sequence[int], Sequence[int]]
"""lm-eval's (strings, context tokens, continuation tokens)."""


OnScored = Callable[[Continuation, Answer], None]
"""Told a continuation and its answer."""


class UnscorableError(EvalError):
    """A request that this model cannot answer at any batch size, such as one longer than its context."""


class MegaGPTLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A live decoder behind lm-eval's interface."""

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        *,
        max_seq_len: int,
        batch_size: int = 16,
        share_prefixes: bool = True,
        answers: AnswerStore | None = None,
        on_progress: Callable[[int, int], None] | None = None,
        sharing: Sharing | None = None,
    ) -> None:
        """Wrap a model that is in evaluation mode, on its device.

        Args:
            model: the decoder, whole or shared by processes that all ask the same.
            tokenizer: the one it was trained with.
            max_seq_len: longest input, in tokens.
            batch_size: sequences a forward pass; more of short ones (`evals.forwards`) and of those being written.
            share_prefixes: whether what inputs have in common at the beginning runs once.
            answers: what an earlier evaluation of the same left, and where answers are kept until the task is done.
            on_progress: told how many requests of the present kind are answered, and of how many.
            sharing: this process's part of the work; None where it is alone.

        Raises:
            EvalError: the batch is empty or the tokenizer has more tokens than the model.
        """
        super().__init__()
        if batch_size < 1:
            raise EvalError(f"batch_size is {batch_size}; must be 1 or more")
        if tokenizer.vocab_size > model.sizes.vocab_size:
            raise EvalError(
                f"the tokenizer has {tokenizer.vocab_size} tokens but the model only {model.sizes.vocab_size}; "
                "evaluate with the tokenizer that the model was trained with"
            )
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_seq_len
        self.batch_size = batch_size
        self.share_prefixes = share_prefixes
        self.truncated: dict[str, set[int]] = {}
        """Task -> documents whose prompt lost its beginning in at least one request."""
        self.tokens_computed = 0
        """Tokens that ran through the model: of what was scored, of prompts that were continued, and those written."""
        self.tokens_naive = 0
        """What it would have been with one input a request."""
        self.n_forwards = 0
        """Forward passes for scoring."""
        self.n_resumed = 0
        """Requests whose answer an earlier evaluation had left."""
        self._device = model.device
        self._answers = answers
        self._sharing = sharing or Sharing()
        self._on_progress = on_progress or (lambda _done, _total: None)
        self._done = self._shown = self._total = 0

    @property
    def eot_token_id(self) -> int:
        """The token that stands before an empty context and ends a generation."""
        return self.tokenizer.eot_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: ARG002, FBT001
        """Ids of a text; none is ever added."""
        return self.tokenizer.encode(string)

    def loglikelihood(
        self,
        requests: list[Instance],
        disable_tqdm: bool = True,  # noqa: ARG002, FBT001, FBT002 - lm-eval's signature
    ) -> list[tuple[float, bool]]:
        """(sum of log-probabilities in nats, is it the greedy continuation) of each continuation."""
        return [(answer.total, answer.is_greedy) for _, answer in self.score(requests)]

    def score(self, requests: Sequence[Instance]) -> list[tuple[Continuation, Answer]]:
        """What was run and scored for each request of a log-likelihood, and every token's log-probability."""
        self._begin(requests)
        pairs = [request.args for request in requests]
        continuations = []
        # Equal inputs are one object: the four letters of a question would hold its whole prompt four times.
        known: dict[bytes, bytes] = {}
        encoded = encode_pairs(self.tokenizer, pairs, self.prefix_token_id)
        for request, (context, continuation) in zip(requests, encoded, strict=True):
            if len(context) + len(continuation) > self.max_length + 1:
                self._count_truncated(request)
            fitted = self._fit(context, continuation)
            inputs = known.setdefault(fitted.inputs, fitted.inputs)
            continuations.append(Continuation(inputs, fitted.targets))
        return list(zip(continuations, self._score_all(continuations, self._advance), strict=True))

    def loglikelihood_rolling(
        self,
        requests: list[Instance],
        disable_tqdm: bool = True,  # noqa: ARG002, FBT001, FBT002 - lm-eval's signature
    ) -> list[float]:
        """Log-probability of each whole text, in nats; every token is predicted once, none is cut."""
        self._begin(requests)
        windows: list[Continuation] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            ):
                windows.append(self._fit(*make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, answer in zip(owners, self._score_all(windows), strict=True):
            totals[owner] += answer.total
        self._advance(len(requests))
        return totals

    def generate_until(
        self,
        requests: list[Instance],
        disable_tqdm: bool = True,  # noqa: ARG002, FBT001, FBT002 - lm-eval's signature
    ) -> list[str]:
        """Continue each prompt until a stop string, the end of text, or `max_gen_toks` tokens.

        Raises:
            UnscorableError: a task asks for as many new tokens as the model's context holds.
        """
        self._begin(requests)
        by_settings: dict[GenerationSettings, list[_Prompt]] = {}
        repeats: dict[tuple[str, Any, int], int] = {}
        for index, request in enumerate(requests):
            context, arguments = request.args
            settings = self._generation_settings(request, arguments)
            room = self.room_for_prompt(request, arguments)
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            if len(tokens) > room:
                self._count_truncated(request)
            name = (str(request.task_name), request.doc_id, request.idx)
            repeats[name] = repeats.get(name, -1) + 1
            # Drawn numbers are the document's own, and its repeat's: they do not depend on who shares its batch.
            row_name = f"{name[0]}/{name[1]}/{name[2]}/{repeats[name]}"
            by_settings.setdefault(settings, []).append((index, tokens[-room:], row_name))
        texts: dict[int, str] = {}
        for settings, prompts in by_settings.items():
            texts |= self._generate_all(settings, prompts)
        return [texts[index] for index in range(len(requests))]

    def room_for_prompt(self, request: Instance, arguments: dict[str, Any]) -> int:
        """Tokens of a prompt that fit beside the new ones."""
        return self.max_length - self._generation_settings(request, arguments).max_new_tokens

    def _generate_all(self, settings: GenerationSettings, prompts: Sequence[_Prompt]) -> dict[int, str]:
        """Texts by the prompts' numbers, from the store or the model."""
        described = asdict(settings)
        texts: dict[int, str] = {}
        asked: list[tuple[_Prompt, str]] = []
        for prompt in prompts:
            index, tokens, row_name = prompt
            drawn = row_name if settings.sampling.temperature > 0 else ""
            identity = request_hash("text", json.dumps(tokens), described, drawn)
            found = None if self._answers is None else self._answers.get(identity)
            if found is None:
                asked.append((prompt, identity))
            else:
                texts[index], n_new = found
                self.tokens_naive += len(tokens) + n_new
        self._resumed(len(texts))
        # Longest first: what runs out of memory does so at once. Similar lengths share a batch.
        asked.sort(key=lambda item: (-len(item[0][1]), item[0][1], item[0][0]))
        alone = (n_parts := self._sharing.n_parts(len(asked))) == 1
        longest = max((len(tokens) for (_, tokens, _), _ in asked), default=0) + settings.max_new_tokens
        size = rows_together(-(-len(asked) // n_parts), self.batch_size, longest * slot_bytes(self.model.sizes))
        batches = list(_chunks(asked, size))

        def write(batch: Sequence[tuple[_Prompt, str]]) -> list[Written]:
            def keep(row: int, one: Written) -> None:
                if self._answers is not None and self._sharing.keeps_answers:
                    self._answers.put(batch[row][1], [one.text, one.n_tokens])
                if alone:
                    self._advance(1)

            rows, names = [tokens for (_, tokens, _), _ in batch], [name for (_, _, name), _ in batch]
            return generate_texts(
                self.model, self.tokenizer, rows, settings, names, batch_size=self.batch_size, on_written=keep
            )

        for number, written in self._sharing.map(batches, write):
            batch = batches[number]
            for ((index, tokens, _), _), one in zip(batch, written, strict=True):
                texts[index] = one.text
                self.tokens_computed += len(tokens) + one.n_tokens
                self.tokens_naive += len(tokens) + one.n_tokens
            if not alone:
                self._advance(len(batch))
        return texts

    def _generation_settings(self, request: Instance, arguments: dict[str, Any]) -> GenerationSettings:
        known = dict(normalize_gen_kwargs(arguments, DEFAULT_MAX_GEN_TOKS))
        settings = GenerationSettings.from_lm_eval(known, task=str(request.task_name))
        if settings.max_new_tokens >= self.max_length:
            raise UnscorableError(
                f"task {request.task_name} generates {settings.max_new_tokens} tokens, but the model's context is "
                f"{self.max_length}: no room is left for the prompt"
            )
        return settings

    def _begin(self, requests: Sequence[Instance]) -> None:
        self._done, self._shown, self._total = 0, 0, len(requests)
        self._sharing.check_same("the requests", ((request.task_name, request.args) for request in requests))

    def _advance(self, n: int) -> None:
        """Tell of progress; a thousand times at most, for there may be a hundred thousand requests."""
        self._done += n
        if self._done == self._total or self._done - self._shown >= self._total / 1000:
            self._shown = self._done
            self._on_progress(self._done, self._total)

    def _resumed(self, n: int) -> None:
        self.n_resumed += n
        if n:
            self._advance(n)

    def _count_truncated(self, request: Instance) -> None:
        self.truncated.setdefault(str(request.task_name), set()).add(int(request.doc_id or 0))

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        continuations = [self._fit(context, continuation) for _, context, continuation in requests]
        return [(answer.total, answer.is_greedy) for answer in self._score_all(continuations, self._advance)]

    def _score_all(
        self, continuations: Sequence[Continuation], on_progress: Callable[[int], None] | None = None
    ) -> list[Answer]:
        """Answers from the store or the model; equal continuations are asked once."""
        asking: dict[Continuation, list[int]] = {}
        for index, continuation in enumerate(continuations):
            asking.setdefault(continuation, []).append(index)
        answers: dict[Continuation, Answer] = {}
        identities: dict[Continuation, str] = {}
        if self._answers is not None:
            for each in asking:
                identities[each] = request_hash("score", each.inputs, each.targets)
                if (stored := self._answers.get(identities[each])) is not None:
                    answers[each] = Answer(tuple(stored[0]), tuple(map(bool, stored[1])))
        self._resumed(sum(len(asking[each]) for each in answers) if on_progress else 0)
        open_ones = [each for each in asking if each not in answers]

        def store(each: Continuation, answer: Answer) -> None:
            if self._answers is not None and self._sharing.keeps_answers:
                self._answers.put(identities[each], [answer.log_probabilities, [int(flag) for flag in answer.greedy]])

        def receive(each: Continuation, answer: Answer) -> None:
            answers[each] = answer
            if on_progress is not None:
                on_progress(len(asking[each]))

        self._run(open_ones, store, receive)
        self.tokens_naive += sum(each.n_inputs for each in continuations)
        return [answers[each] for each in continuations]

    def _run(self, asked: Sequence[Continuation], store: OnScored, receive: OnScored) -> None:
        """Score these through the model: `store` is told here of what is computed here, `receive` of everything."""
        n_parts = self._sharing.n_parts(len(asked))
        parts = [list(asked)] if n_parts == 1 else cut_in_parts(asked, n_parts)

        def score(part: Sequence[Continuation]) -> tuple[list[Answer], int, int]:
            found: dict[int, Answer] = {}

            def on_answer(number: int, answer: Answer) -> None:
                found[number] = answer
                store(part[number], answer)
                if alone:
                    receive(part[number], answer)

            plan = plan_forwards(part, share_prefixes=self.share_prefixes)
            runner = PlanRunner(self.model, part, self.batch_size, on_answer)
            runner.run(plan)
            return [found[number] for number in range(len(part))], runner.n_forwards, plan.n_tokens

        alone = n_parts == 1
        for number, (answers, n_forwards, n_tokens) in self._sharing.map(parts, score):
            self.n_forwards += n_forwards
            self.tokens_computed += n_tokens
            for each, answer in () if alone else zip(parts[number], answers, strict=True):
                receive(each, answer)

    def _fit(self, context: npt.ArrayLike, continuation: npt.ArrayLike) -> Continuation:
        """The input and what is scored of it; what does not fit is cut from the left of the context."""
        before, scored = np.asarray(context, dtype=np.int64), np.asarray(continuation, dtype=np.int64)
        if not len(before) or not len(scored):
            raise UnscorableError(
                f"a request of {len(before)} context and {len(scored)} continuation tokens cannot be scored; "
                "each needs at least one: the tokenizer merges the continuation into its context"
            )
        if len(scored) > self.max_length:
            raise UnscorableError(
                f"a continuation of {len(scored)} tokens is longer than the model's context of {self.max_length}"
            )
        tokens = np.concatenate((before, scored))[-(self.max_length + 1) :]
        return Continuation.of(tokens[:-1], scored.tolist())


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
