"""A checkpoint as a judge: greedy, in batches.

How long a judgement may be follows from its own prompt alone: requests of equal room share batches, so that neither the
batch size nor what an earlier call has judged changes a judgement.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval.api.instance import Instance

from evals.backend import MegaGPTLM
from evals.chat import ChatTemplate
from evals.judge.ask import JudgeRequest
from evals.judge.http import MAX_TOKENS
from megagpt.errors import EvalError

LEAST_TOKENS = 128
"""Room that a judgement needs: two or three sentences and the rating behind them, which comes last."""
ROOM_STEP = 64
"""Where the context leaves less than MAX_TOKENS, rooms are multiples of this, so that requests can share batches."""


@dataclass(frozen=True)
class CheckpointJudge:
    """Asks a decoder; what does not fit into its context is refused, since half a question cannot be judged."""

    lm: MegaGPTLM
    identity: str
    template: ChatTemplate
    described: Mapping[str, Any] = field(default_factory=dict)
    """What else decides its words: weights, precision, tokenizer, code."""

    @property
    def name(self) -> str:
        """The checkpoint's hash."""
        return self.identity

    @property
    def settings(self) -> dict[str, Any]:
        """The model, its chat format, and how long its judgements may be."""
        return {
            "kind": "checkpoint",
            **self.described,
            "template": self.template.name,
            "template_text": self.template.prompt([("...", None)]),
            "stops": list(self.template.stops),
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "least_tokens": LEAST_TOKENS,
            "context": self.lm.max_length,
        }

    def ask_all(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[JudgeRequest, str]]:
        """A batch at a time; those with the least room first.

        Raises:
            EvalError: a prompt leaves too little room for a judgement; nothing has been asked then.
        """
        prompts = [self._prompt(request) for request in requests]
        by_room: dict[int, list[int]] = {}
        for number, room in enumerate(self._rooms(requests, prompts)):
            by_room.setdefault(room, []).append(number)
        size = self.lm.batch_size
        for room, numbers in sorted(by_room.items()):
            for start in range(0, len(numbers), size):
                batch = numbers[start : start + size]
                texts = self._answer([prompts[number] for number in batch], room)
                yield from zip([requests[number] for number in batch], texts, strict=True)

    def _prompt(self, request: JudgeRequest) -> str:
        return self.template.prompt([(f"{request.system}\n\n{request.user}".strip(), None)])

    def _rooms(self, requests: Sequence[JudgeRequest], prompts: Sequence[str]) -> list[int]:
        """Tokens that each judgement may have."""
        lengths = [len(self.lm.tok_encode(prompt)) for prompt in prompts]
        context = self.lm.max_length
        long = [number for number, length in enumerate(lengths) if context - length < LEAST_TOKENS]
        if long:
            worst = max(long, key=lambda number: lengths[number])
            request, others = requests[worst], len(long) - 1
            also = f" ({others} more leave too little, too)" if others else ""
            raise EvalError(
                f"judge {self.name}: question {request.question_id} turn {request.turn} has {lengths[worst]} tokens, "
                f"its context holds {context}; take a larger judge: a judgement needs room for {LEAST_TOKENS}{also}"
            )
        return [
            MAX_TOKENS if context - length >= MAX_TOKENS else (context - length) // ROOM_STEP * ROOM_STEP
            for length in lengths
        ]

    def _answer(self, prompts: Sequence[str], room: int) -> list[str]:
        arguments = {"until": list(self.template.stops), "max_gen_toks": room, "do_sample": False}
        return self.lm.generate_until(
            [
                Instance(
                    request_type="generate_until",
                    doc={},
                    arguments=(prompt, arguments),
                    idx=0,
                    metadata=("judge", number, 1),
                )
                for number, prompt in enumerate(prompts)
            ]
        )


def describe_arithmetic(lm: MegaGPTLM, *, is_row_invariant: bool) -> str:
    """What decides the last digits, and so now and then a word: nothing but the model, or the device and the batch."""
    return "row-invariant" if is_row_invariant else f"{lm.model.device.type}, batches of {lm.batch_size}"
