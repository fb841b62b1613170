"""How a conversation is written for a model that only continues text. The result says which way was taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ChatTemplate:
    """Plain text around turns."""

    name: str
    intro: str
    user: str
    """Around what the user says."""
    assistant: str
    """Before what the model says."""
    before_answer: str
    """Behind that, in turns that are over: models begin their answer with it themselves."""
    between: str
    """Behind what the model said, before the next turn."""
    stops: tuple[str, ...]
    """Where a model goes on with the other side's turn, its answer ends."""

    def prompt(self, turns: Sequence[tuple[str, str | None]]) -> str:
        """The text that the model continues.

        Args:
            turns: (user, assistant) pairs; the last one's assistant is None.
        """
        parts = [self.intro]
        for said, answered in turns:
            parts.append(self.user.replace("{text}", said) + self.assistant)
            if answered is not None:
                parts.append(f"{self.before_answer}{answered.strip()}{self.between}")
        return "".join(parts)


TEMPLATES: dict[str, ChatTemplate] = {
    "plain": ChatTemplate(
        name="plain",
        intro="",
        user="User: {text}\n\n",
        assistant="Assistant:",
        before_answer=" ",
        between="\n\n",
        stops=("\nUser:", "\nAssistant:"),
    ),
    "alpaca": ChatTemplate(
        name="alpaca",
        intro=(
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n"
        ),
        user="### Instruction:\n{text}\n\n",
        assistant="### Response:\n",
        before_answer="",
        between="\n\n",
        stops=("\n### Instruction:", "\n### Response:"),
    ),
}
"""`alpaca` is the format that Stanford's Alpaca data trains, word for word; an input stands behind its instruction,
under `### Input:`."""
