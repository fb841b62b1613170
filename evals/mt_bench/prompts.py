"""What the judge is told: the official templates where the user has them, else these, in megagpt's own words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megagpt.errors import EvalError

FIRST, SECOND = ("question", "answer"), ("question_1", "answer_1", "question_2", "answer_2")
PAIR = ("question", "answer_a", "answer_b")
PAIR_SECOND = ("question_1", "question_2", "answer_a_1", "answer_a_2", "answer_b_1", "answer_b_2")
NAMES: dict[str, tuple[str, ...]] = {
    "single-v1": FIRST,
    "single-math-v1": (*FIRST, "ref_answer_1"),
    "single-v1-multi-turn": SECOND,
    "single-math-v1-multi-turn": (*SECOND, "ref_answer_1", "ref_answer_2"),
    "pair-v2": PAIR,
    "pair-math-v1": (*PAIR, "ref_answer_1"),
    "pair-v2-multi-turn": PAIR_SECOND,
    "pair-math-v1-multi-turn": (*PAIR_SECOND, "ref_answer_1", "ref_answer_2"),
}
"""Name in FastChat's judge_prompts.jsonl -> fields of its template."""


@dataclass(frozen=True)
class JudgePrompt:
    """A template of what is judged, and what stands before it."""

    name: str
    system: str
    template: str

    def fill(self, fields: Mapping[str, str]) -> str:
        """The template with its fields.

        Raises:
            EvalError: it has other fields, or braces that are none.
        """
        try:
            return self.template.format_map(fields)
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise EvalError(
                f"judge prompt {self.name}: its template cannot be filled ({type(error).__name__}: {error}); known are "
                f"{', '.join(fields)}"
            ) from None


_SCALE = (
    "Write two or three sentences about what is good and what is missing. Then give a rating from 1 (useless) to 10 "
    "(could not be better) on a line of its own and in double square brackets, like this: Rating: [[4]]"
)
_QUALITY = (
    "Look at whether it does what was asked, whether it is true, complete, clear and no longer than it should be."
)
_RIGHT = (
    "A reference answer is given. Compare the two: a result that differs from the reference is a mistake, unless the "
    "reference itself is plainly wrong. A right result on another way is as good."
)
_REFERENCES = "[First reference]\n{ref_answer_1}\n\n[Second reference]\n{ref_answer_2}\n\n"
_TWO_TURNS = (
    "[First question]\n{question_1}\n\n[First answer]\n{answer_1}\n\n"
    "[Second question]\n{question_2}\n\n[Second answer]\n{answer_2}\n[End]"
)
_VERDICT = (
    "Write two or three sentences about the difference. Neither place nor length is a merit. Then give the verdict on "
    "a line of its own: [[A]] if answer A is better, [[B]] if answer B is better, [[C]] if neither is."
)
_PAIR = "[Question]\n{question}\n\n[Answer A]\n{answer_a}\n\n[Answer B]\n{answer_b}\n[End]"
_PAIR_TURNS = (
    "[First question]\n{question_1}\n\n[Answer A]\n{answer_a_1}\n\n[Answer B]\n{answer_b_1}\n\n"
    "[Second question]\n{question_2}\n\n[Answer A]\n{answer_a_2}\n\n[Answer B]\n{answer_b_2}\n[End]"
)
_COMPARE = "You compare the answers of two language models, A and B."
_COMPARE_SECOND = f"{_COMPARE} The second answers are compared; the first are there for context."

OWN_PROMPTS: dict[str, JudgePrompt] = {
    prompt.name: prompt
    for prompt in (
        JudgePrompt(
            "single-v1",
            "",
            f"You grade one answer of a language model. {_QUALITY} {_SCALE}\n\n"
            "[Question]\n{question}\n\n[Answer]\n{answer}\n[End]",
        ),
        JudgePrompt(
            "single-math-v1",
            "",
            f"You grade one answer of a language model. {_RIGHT} {_SCALE}\n\n"
            "[Question]\n{question}\n\n[Reference]\n{ref_answer_1}\n\n[Answer]\n{answer}\n[End]",
        ),
        JudgePrompt(
            "single-v1-multi-turn",
            f"You grade the second answer in a conversation with a language model; the first is there for context. "
            f"{_QUALITY} {_SCALE}",
            _TWO_TURNS,
        ),
        JudgePrompt(
            "single-math-v1-multi-turn",
            f"You grade the second answer in a conversation with a language model; the first is there for context. "
            f"{_RIGHT} {_SCALE}",
            f"{_REFERENCES}{_TWO_TURNS}",
        ),
        JudgePrompt("pair-v2", f"{_COMPARE} {_QUALITY} {_VERDICT}", _PAIR),
        JudgePrompt("pair-math-v1", f"{_COMPARE} {_RIGHT} {_VERDICT}", f"[Reference]\n{{ref_answer_1}}\n\n{_PAIR}"),
        JudgePrompt("pair-v2-multi-turn", f"{_COMPARE_SECOND} {_QUALITY} {_VERDICT}", _PAIR_TURNS),
        JudgePrompt("pair-math-v1-multi-turn", f"{_COMPARE_SECOND} {_RIGHT} {_VERDICT}", f"{_REFERENCES}{_PAIR_TURNS}"),
    )
}
