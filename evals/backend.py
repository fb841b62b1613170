"""Our decoder as lm-eval sees a model: log-likelihoods, rolling log-likelihoods and generation, in memory.

No response cache: lm-eval's is not keyed by the model. Nothing is cut without being counted: `truncated` says for each
task which documents lost the beginning of their prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from evals.decoding import GenerationSettings, generate_texts
from megagpt.errors import EvalError
from megagpt.model.decoder import Decoder
from megagpt.tokenizer import Tokenizer

DEFAULT_MAX_GEN_TOKS = 256
"""Tokens to generate where a task does not say. Source: lm-eval 0.4.13, HFLM.max_gen_toks."""

LOGIT_BYTES = 256 << 20
"""Most memory that the logits of one projection may take, in fp32."""

T = TypeVar("T")

Request = tuple[Any, list[int], list[int]]
"""lm-eval's (strings, context tokens, continuation tokens)."""


class UnscorableError(EvalError):
    """A request that this model cannot answer at any batch size, such as one longer than its context."""


@dataclass(frozen=True, slots=True)
class Continuation:
    """The last `n_scored` predictions of one input."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def n_scored(self) -> int:
        """Tokens that are scored."""
        return len(self.targets)


class MegaGPTLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A live decoder behind lm-eval's interface."""

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        max_seq_len: int,
        device: str | torch.device = "cpu",
        batch_size: int = 16,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Wrap a model that is in evaluation mode and on `device`.

        Args:
            model: the decoder.
            tokenizer: the one it was trained with.
            max_seq_len: longest input, in tokens.
            device: where the model is.
            batch_size: sequences a forward pass.
            on_progress: told how many requests of the present kind are answered, and of how many.

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
        self.truncated: dict[str, set[int]] = {}
        """Task -> documents whose prompt lost its beginning in at least one request."""
        self._device = torch.device(device)
        self._on_progress = on_progress or (lambda _done, _total: None)
        self._done = self._total = 0

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
        self._begin(len(requests))
        encoded = [(request.args, *self._encode_request(*request.args)) for request in requests]
        for request, (_, context, continuation) in zip(requests, encoded, strict=True):
            if len(context) + len(continuation) > self.max_length + 1:
                self._count_truncated(request)
        return self._loglikelihood_tokens(encoded)

    def loglikelihood_rolling(
        self,
        requests: list[Instance],
        disable_tqdm: bool = True,  # noqa: ARG002, FBT001, FBT002 - lm-eval's signature
    ) -> list[float]:
        """Log-probability of each whole text, in nats; every token is predicted once, none is cut."""
        self._begin(len(requests))
        windows: list[Request] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            ):
                context, continuation = make_disjoint_window(window)
                windows.append((None, context, continuation))
                owners.append(index)
        totals = [0.0] * len(requests)
        for owner, (log_probability, _) in zip(owners, self._score_all(windows), strict=True):
            totals[owner] += log_probability
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
        self._begin(len(requests))
        by_settings: dict[GenerationSettings, list[tuple[int, list[int]]]] = {}
        for index, request in enumerate(requests):
            context, arguments = request.args
            settings = self._generation_settings(request, arguments)
            room = self.max_length - settings.max_new_tokens
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            if len(tokens) > room:
                self._count_truncated(request)
            by_settings.setdefault(settings, []).append((index, tokens[-room:]))
        texts: dict[int, str] = {}
        for settings, prompts in by_settings.items():
            # Longest first: what runs out of memory does so at once. Similar lengths share a batch.
            prompts.sort(key=lambda prompt: (-len(prompt[1]), prompt[1]))
            for number, batch in enumerate(_chunks(prompts, self.batch_size)):
                found = generate_texts(self.model, self.tokenizer, [tokens for _, tokens in batch], settings, number)
                texts.update(zip((index for index, _ in batch), found, strict=True))
                self._advance(len(batch))
        return [texts[index] for index in range(len(requests))]

    def _encode_request(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As `TemplateLM.loglikelihood`: an empty context becomes the end-of-text token."""
        if context:
            pair: tuple[list[int], list[int]] = self._encode_pair(context, continuation)
            return pair
        tokens = self.tok_encode(continuation)
        if tokens[:1] == [self.prefix_token_id]:
            return tokens[:1], tokens[1:]
        return [self.prefix_token_id], tokens

    def _generation_settings(self, request: Instance, arguments: dict[str, Any]) -> GenerationSettings:
        known = dict(normalize_gen_kwargs(arguments, DEFAULT_MAX_GEN_TOKS))
        settings = GenerationSettings.from_lm_eval(known, task=str(request.task_name))
        if settings.max_new_tokens >= self.max_length:
            raise UnscorableError(
                f"task {request.task_name} generates {settings.max_new_tokens} tokens, but the model's context is "
                f"{self.max_length}: no room is left for the prompt"
            )
        return settings

    def _begin(self, total: int) -> None:
        self._done, self._total = 0, total

    def _advance(self, n: int) -> None:
        self._done += n
        self._on_progress(self._done, self._total)

    def _count_truncated(self, request: Instance) -> None:
        self.truncated.setdefault(str(request.task_name), set()).add(int(request.doc_id or 0))

    def _loglikelihood_tokens(self, requests: Sequence[Request], **_: Any) -> list[tuple[float, bool]]:
        return self._score_all(requests, self._advance)

    def _score_all(
        self, requests: Sequence[Request], on_progress: Callable[[int], None] | None = None
    ) -> list[tuple[float, bool]]:
        """Score token requests; equal inputs run once (the four letters of a multiple-choice question)."""
        continuations = [self._fit(context, continuation) for _, context, continuation in requests]
        sharing: dict[tuple[int, ...], list[int]] = {}
        for index, continuation in enumerate(continuations):
            sharing.setdefault(continuation.inputs, []).append(index)
        answers: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        inputs = sorted(sharing, key=lambda tokens: (-len(tokens), tokens))
        for batch in _chunks(inputs, self.batch_size):
            rows = [(row, index) for row, tokens in enumerate(batch) for index in sharing[tokens]]
            found = self._score(batch, [(row, continuations[index]) for row, index in rows])
            for (_, index), answer in zip(rows, found, strict=True):
                answers[index] = answer
            if on_progress is not None:
                on_progress(len(rows))
        return answers

    def _fit(self, context: list[int], continuation: list[int]) -> Continuation:
        """The input and what is scored of it; what does not fit is cut from the left of the context."""
        if not context or not continuation:
            raise UnscorableError(
                f"a request of {len(context)} context and {len(continuation)} continuation tokens cannot be scored; "
                "each needs at least one: the tokenizer merges the continuation into its context"
            )
        if len(continuation) > self.max_length:
            raise UnscorableError(
                f"a continuation of {len(continuation)} tokens is longer than the model's context of {self.max_length}"
            )
        tokens = (context + continuation)[-(self.max_length + 1) :]
        return Continuation(tuple(tokens[:-1]), tuple(continuation))

    @torch.inference_mode()
    def _score(
        self, inputs: Sequence[tuple[int, ...]], wanted: Sequence[tuple[int, Continuation]]
    ) -> list[tuple[float, bool]]:
        """One forward pass; the head sees only the positions before scored tokens.

        Args:
            inputs: longest first. They are padded on the right, which a causal model does not see.
            wanted: (row of `inputs`, continuation).
        """
        width = len(inputs[0])
        padded = [[*tokens, *[0] * (width - len(tokens))] for tokens in inputs]
        hidden = self.model.hidden(torch.tensor(padded, device=self.device))  # (B, T, C)
        flat = hidden.flatten(0, 1)
        positions: list[int] = []
        targets: list[int] = []
        for row, continuation in wanted:
            end = row * width + len(inputs[row])
            positions += range(end - continuation.n_scored, end)
            targets += continuation.targets
        chosen = flat[torch.tensor(positions, device=self.device)]
        log_probabilities, greedy = self._project(chosen, torch.tensor(targets, device=self.device))
        answers = []
        start = 0
        for _, continuation in wanted:
            part = slice(start, start + continuation.n_scored)
            answers.append((float(log_probabilities[part].sum()), bool(greedy[part].all())))
            start = part.stop
        return answers

    def _project(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(N, C) and (N,) -> fp32 log-probabilities of the targets (N,), and whether each is the argmax (N,)."""
        rows = max(1, LOGIT_BYTES // (4 * self.model.sizes.vocab_size))
        values, greedy = [], []
        for part, target in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            logits = self.model.head(part).float()
            values.append(logits.log_softmax(dim=-1).gather(1, target[:, None])[:, 0])
            greedy.append(logits.argmax(dim=-1) == target)
        return torch.cat(values).cpu(), torch.cat(greedy).cpu()


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
