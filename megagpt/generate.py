"""Text from a model, token by token, with a key-value cache: greedy, temperature, top-k, top-p.

Rows of a batch may have prompts of different lengths. They are left-aligned in the cache (see `KVCache`), and a
finished row leaves the batch, so a row's tokens do not depend on what it is generated together with, but for rounding.
Prompts are read a few at a time, for their activations take memory; a step of writing has one token a row, or a few,
and costs hardly more for many rows than for few.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megagpt.checkpoint.open import Checkpoint, open_checkpoint
from megagpt.drafts import Drafts
from megagpt.errors import ConfigError
from megagpt.model.decoder import Decoder
from megagpt.model.layers import KVCache
from megagpt.parallel.decode import ParallelDecoder
from megagpt.tokenizer import Tokenizer

Model = Decoder | ParallelDecoder
"""Whole, or shared by several processes which all generate the same."""

OnToken = Callable[[int, int], bool | None]
"""Called with (row, token) as soon as a token is known; True ends that row after it."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. The default is greedy: the most likely one."""

    temperature: float = 0.0
    """0 is greedy; 1 the model's own distribution; between, sharper."""
    top_k: int | None = None
    """Only the k most likely tokens."""
    top_p: float | None = None
    """Only the most likely tokens that together reach this probability (Holtzman et al. 2020, section 3.1)."""
    seed: int = 0
    """Each row draws from a generator of its own, seeded by this and the row's name."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.temperature < 0:
            raise ConfigError(f"temperature {self.temperature} must be 0 (greedy) or above")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k {self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p} must be above 0 and at most 1")


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    on_token: OnToken | None = None,
    *,
    row_names: Sequence[str] | None = None,
    batch_size: int | None = None,
) -> list[list[int]]:
    """Continue each prompt.

    Args:
        model: on the device that is to be used; it runs in evaluation mode.
        prompts: token ids, at least one each; all are continued at the same time.
        max_new_tokens: the most tokens a row may get.
        sampling: greedy where None.
        stop_ids: a row ends before the first of these, which is not part of the result.
        on_token: sees every token of the result at once, and may end its row.
        row_names: what a sampled row draws depends on its name; by default its number, "0", "1" ...
        batch_size: prompts that run through the model together, before all of them are continued; by default all.

    Returns:
        The new tokens of each row: fewer than `max_new_tokens` only where the row was ended by one of the above.

    Raises:
        ConfigError: a prompt is empty, holds a token that the model has not, or leaves too little of its context.
    """
    _check_prompts(model, prompts, max_new_tokens)
    results: list[list[int]] = [[] for _ in prompts]
    if not prompts or max_new_tokens == 0:
        return results
    chooser = _Chooser(sampling or Sampling(), row_names or [str(row) for row in range(len(prompts))])
    recorder = _Recorder(results, frozenset(stop_ids), on_token)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            _decode(model, prompts, max_new_tokens, batch_size or len(prompts), chooser, recorder)
    finally:
        model.train(was_training)
    return results


def generate_text(
    *,
    checkpoint: Path,
    prompts: Sequence[str],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    load: Callable[[Checkpoint], Model] = Checkpoint.load_model,
) -> list[str]:
    """Continue texts with the model and the tokenizer of a checkpoint; what `megagpt generate` runs.

    Returns:
        Each prompt with what follows it.
    """
    opened = open_checkpoint(checkpoint)
    sampling = Sampling(temperature, top_k, top_p, seed)
    return continue_texts(load(opened), opened.tokenizer(), prompts, max_new_tokens, sampling)


def continue_texts(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling | None = None
) -> list[str]:
    """Each prompt with what follows it, up to the end of the text or `max_new_tokens`.

    An empty prompt starts behind the end-of-text token, where every document of the training data starts. Rows of
    the model's vocabulary that the tokenizer does not know (padding) have no text.
    """
    ids = [tokenizer.encode(prompt) or [tokenizer.eot_id] for prompt in prompts]
    continued = generate(model, ids, max_new_tokens, sampling, stop_ids=(tokenizer.eot_id,))
    known = [[token for token in tokens if token < tokenizer.vocab_size] for tokens in continued]
    return [prompt + tokenizer.decode(tokens) for prompt, tokens in zip(prompts, known, strict=True)]


def _decode(
    model: Model,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    chooser: _Chooser,
    recorder: _Recorder,
) -> None:
    """The loop: the prompts, then one token a row or more, until no row is left."""
    guesses = chooser.is_greedy and model.packing.invariant
    rows = [_Row(number, max_new_tokens, Drafts(prompt if guesses else ())) for number, prompt in enumerate(prompts)]
    cache = model.new_cache(len(prompts), max(map(len, prompts)) + max_new_tokens - 1)
    logits = _read(model, prompts, cache, batch_size)
    while True:
        tokens, start, ended = chooser.choose(logits, [row.number for row in rows]), 0, []
        for index, row in enumerate(rows):
            n_asked = 1 + len(row.drafts.guess)
            n_right, goes_on = row.take(tokens[start : start + n_asked], recorder)
            cache.lengths[index] -= len(row.drafts.guess) - n_right  # what is behind is overwritten before it is seen
            start += n_asked
            ended += [] if goes_on else [index]
        if len(ended) == len(rows):
            return
        if ended:
            rows = [rows[index] for index in cache.drop_rows(ended)]
        inputs = [[row.last, *(row.drafts.next(row.n_left - 1) if guesses else ())] for row in rows]
        counts = [len(each) for each in inputs]
        logits = model.decode(_block(inputs, model.device), cache, counts, counts)


def _read(model: Model, prompts: Sequence[Sequence[int]], cache: KVCache, batch_size: int) -> Tensor:
    """Run the prompts, so many at a time -> logits (B, V) of what follows each."""
    found = []
    for start in range(0, len(prompts), batch_size):
        few = prompts[start : start + batch_size]
        rows = slice(start, start + len(few))
        part = cache.part(rows)
        found.append(model.decode(_block(few, model.device), part, [len(prompt) for prompt in few]))
        cache.lengths[rows] = part.lengths
    return torch.cat(found)


def _block(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """(B, T) tokens, rows filled up with zeros."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)


@dataclass(slots=True)
class _Row:
    """A row that is being written."""

    number: int
    n_left: int
    """Tokens that it may still get."""
    drafts: Drafts
    last: int = 0
    """Its newest token, which the model has not seen yet."""

    def take(self, tokens: Sequence[int], recorder: _Recorder) -> tuple[int, bool]:
        """The model's choices behind the newest token and behind each guessed one.

        Returns:
            How many guesses were right, and whether the row goes on.
        """
        n_right = 0
        for token, guess in zip(tokens, [*self.drafts.guess, None], strict=True):
            if not recorder.record(self.number, token):
                return n_right, False
            self.drafts.add(token)
            self.last, self.n_left = token, self.n_left - 1
            if self.n_left == 0:
                return n_right, False
            if token != guess:
                break
            n_right += 1
        return n_right, True


@dataclass(frozen=True, slots=True)
class _Recorder:
    """Where tokens go, and what ends a row."""

    results: list[list[int]]
    stop_ids: frozenset[int]
    on_token: OnToken | None

    def record(self, row: int, token: int) -> bool:
        """Whether the row goes on."""
        if token in self.stop_ids:
            return False
        self.results[row].append(token)
        return self.on_token is None or self.on_token(row, token) is not True


class _Chooser:
    """Next tokens from logits."""

    def __init__(self, sampling: Sampling, row_names: Sequence[str]) -> None:
        self.sampling = sampling
        self.generators = [torch.Generator().manual_seed(_row_seed(sampling.seed, name)) for name in row_names]

    @property
    def is_greedy(self) -> bool:
        """Nothing is drawn."""
        return self.sampling.temperature == 0

    def choose(self, logits: Tensor, rows: Sequence[int]) -> list[int]:
        """(B, V) logits of these rows -> B tokens; of greedy rows there may be several logits each."""
        sampling = self.sampling
        if self.is_greedy:
            return logits.argmax(-1).tolist()
        uniforms = torch.stack([torch.rand((), generator=self.generators[row]) for row in rows]).to(logits.device)
        return sample(logits, sampling, uniforms).tolist()


def sample(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> Tensor:
    """(B, V) logits and B numbers from [0, 1) -> B tokens, by inverting the cumulative distribution.

    Top-k is applied before top-p, as in Hugging Face's `generate`.
    """
    ranked, tokens = (logits.float() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        ranked = ranked[:, : sampling.top_k]
    probabilities = ranked.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    if sampling.top_p is not None:
        outside = cumulative - probabilities >= sampling.top_p  # the mass before it is enough already
        probabilities = probabilities.masked_fill(outside, 0.0)
        cumulative = probabilities.cumsum(-1)
    wanted = uniforms[:, None] * cumulative[:, -1:]
    picked = torch.searchsorted(cumulative, wanted, right=True)
    kept = torch.count_nonzero(probabilities, dim=-1)[:, None]  # rounding may not pick what was cut off
    return tokens.gather(-1, torch.minimum(picked, kept - 1)).squeeze(-1)


def _row_seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def _check_prompts(model: Model, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    vocab_size, max_seq_len = model.sizes.vocab_size, model.sizes.max_seq_len
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens {max_new_tokens} must be 0 or above")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {row} is empty; give at least one token, for example the end-of-text token")
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise ConfigError(
                f"prompt {row} holds token {max(prompt) if max(prompt) >= vocab_size else min(prompt)}, but the model "
                f"knows 0 to {vocab_size - 1}; is it the model's tokenizer?"
            )
        if len(prompt) + max_new_tokens > max_seq_len:
            raise ConfigError(
                f"prompt {row} of {len(prompt)} tokens and {max_new_tokens} new ones exceed the model's context of "
                f"{max_seq_len}; shorten the prompt, or ask for at most {max(0, max_seq_len - len(prompt))} new tokens"
            )
