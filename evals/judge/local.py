"""A checkpoint as a judge: greedy, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lm_eval.api.instance import Instance

from evals.backend import MegaGPTLM
from evals.chat import ChatTemplate
from evals.judge.ask import JudgeRequest
from evals.judge.http import MAX_TOKENS
from megagpt.errors import EvalError


@dataclass(frozen=True)
class CheckpointJudge:
    """Asks a decoder; what does not fit into its context is refused, since half a question cannot be judged."""

    lm: MegaGPTLM
    identity: str
    template: ChatTemplate

    @property
    def name(self) -> str:
        """The checkpoint's hash."""
        return self.identity

    def ask_all(self, requests: Sequence[JudgeRequest]) -> Iterator[tuple[JudgeRequest, str]]:
        """A batch at a time.

        Raises:
            EvalError: a prompt leaves no room for a judgement.
        """
        size = self.lm.batch_size
        for start in range(0, len(requests), size):
            batch = requests[start : start + size]
            yield from zip(batch, self._answer(batch), strict=True)

    def _answer(self, batch: Sequence[JudgeRequest]) -> list[str]:
        prompts = [self.template.prompt([(f"{request.system}\n\n{request.user}".strip(), None)]) for request in batch]
        rooms = [self.lm.max_length - len(self.lm.tok_encode(prompt)) for prompt in prompts]
        for request, room in zip(batch, rooms, strict=True):
            if room < 1:
                raise EvalError(
                    f"judge {self.name}: question {request.question_id} turn {request.turn} has "
                    f"{self.lm.max_length - room} tokens, its context holds {self.lm.max_length}; take a larger judge"
                )
        arguments = {
            "until": list(self.template.stops),
            "max_gen_toks": min(MAX_TOKENS, *rooms),
            "do_sample": False,
        }
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
