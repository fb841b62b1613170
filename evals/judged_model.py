"""What every judged evaluation needs: a checkpoint that answers, where its files go, how its result is headed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lm_eval

from evals.backend import MegaGPTLM
from evals.chat import TEMPLATES, ChatTemplate
from evals.judged_code import ANSWERING, judged_code
from evals.results import hash_settings
from evals.run import DTYPES
from megagpt.checkpoint.open import Checkpoint, open_checkpoint
from megagpt.errors import EvalError
from megagpt.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelRequest:
    """Which checkpoint answers, and how."""

    checkpoint: Path
    template: str = "plain"
    """How a conversation is written (`evals.chat.TEMPLATES`)."""
    batch_size: int = 16
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = "cpu"
    out: Path | None = None
    """Folder of the result; None for <run>/evals/step_<step>."""


class JudgedModel:
    """A checkpoint whose answers are to be judged; weights are loaded when the first answer is missing."""

    def __init__(self, request: ModelRequest) -> None:
        self.request = request
        self.checkpoint: Checkpoint = open_checkpoint(request.checkpoint)
        self.out = request.out or self.checkpoint.run_dir / "evals" / f"step_{self.checkpoint.step:08d}"
        self.max_seq_len = self.checkpoint.model_config.max_seq_len

    @property
    def template(self) -> ChatTemplate:
        """How a conversation is written.

        Raises:
            EvalError: there is none of that name.
        """
        if self.request.template not in TEMPLATES:
            raise EvalError(f"template '{self.request.template}' is none; known are {', '.join(TEMPLATES)}")
        return TEMPLATES[self.request.template]

    @property
    def model_id(self) -> str:
        """Run, step and weights: two checkpoints never have the same."""
        return f"{self.checkpoint.run_dir.resolve().name}-{self.checkpoint.step}-{self.checkpoint.hash[:12]}"

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The one that the weights were trained with."""
        return self.checkpoint.tokenizer()

    @functools.cached_property
    def code(self) -> str:
        """Fingerprint of what computes and writes answers."""
        return judged_code(ANSWERING)

    @functools.cached_property
    def lm(self) -> MegaGPTLM:
        """The weights behind lm-eval's interface."""
        return self.backend(lambda _done, _total: None)

    def backend(self, on_progress: Callable[[int, int], None]) -> MegaGPTLM:
        """A fresh one."""
        return MegaGPTLM(
            self.checkpoint.load_model(DTYPES[self.request.dtype], self.request.device),
            self.tokenizer,
            max_seq_len=self.max_seq_len,
            batch_size=self.request.batch_size,
            on_progress=on_progress,
        )

    def header(self, task: str, settings: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        """The fields of a `TaskResult` that say what was measured on what."""
        whole = {
            "batch_size": self.request.batch_size,
            "dtype": self.request.dtype,
            "max_seq_len": self.max_seq_len,
            "template": self.request.template,
            "tokenizer": self.tokenizer.fingerprint,
            "answers_code": self.code,
            **settings,
        }
        return {
            "task": task,
            "checkpoint": {
                "run": str(self.checkpoint.run_dir),
                "step": self.checkpoint.step,
                "hash": self.checkpoint.hash,
            },
            "settings": whole,
            "settings_hash": hash_settings(whole),
            "lm_eval_version": lm_eval.__version__,
            "data": {"origin": "local", "absent_splits": [], **data},
            **self._tokens(),
        }

    def _tokens(self) -> dict[str, int]:
        """Of the answers that were made now; those of earlier calls ran then."""
        lm = self.__dict__.get("lm")  # where no answer was missing, the weights were never loaded
        return {} if lm is None else {"tokens_computed": lm.tokens_computed, "tokens_naive": lm.tokens_naive}


def explain_other_code(n: int) -> list[str]:
    """That stored answers were not used, where some were not."""
    return [f"{n} stored answers were made by other code or another tokenizer: answered again"] if n else []
