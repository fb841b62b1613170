"""`--judge` -> a judge: a URL, `checkpoint:PATH`, or `replay:FILE`."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from evals.backend import MegaGPTLM
from evals.chat import TEMPLATES
from evals.invariance import make_batch_invariant
from evals.judge.ask import Judge
from evals.judge.http import ServerJudge, ServerSettings
from evals.judge.local import CheckpointJudge, describe_arithmetic
from evals.judge.replay import ReplayJudge
from evals.judged_code import JUDGING, judged_code
from megagpt.checkpoint.open import open_checkpoint
from megagpt.errors import EvalError

HELP = "http://HOST/v1 (OpenAI-compatible), checkpoint:PATH, or replay:FILE"


@dataclass(frozen=True)
class JudgeOptions:
    """What the user said about the judge."""

    spec: str
    model: str | None = None
    """A server's model; of a replayed file, whose answers."""
    key: str | None = None
    """From the environment variable that the user named; never stored."""
    parallel: int = 4
    timeout_seconds: float = 120.0
    tries: int = 5
    template: str = "plain"
    """Of a checkpoint that judges."""
    device: str = "cpu"
    batch_size: int = 8

    def __repr__(self) -> str:
        spec = re.split(r"[?#]", re.sub(r"//[^/@]*@", "//", self.spec))[0]  # no password, no key
        return f"JudgeOptions({spec!r}, model={self.model!r})"


def open_judge(options: JudgeOptions, parse: Callable[[str], float]) -> Judge:
    """The judge; nothing is asked yet.

    Args:
        options: the user's.
        parse: a judgement's text -> its rating.

    Raises:
        EvalError: no such judge, or a server's model is not named.
    """
    kind, _, rest = options.spec.partition(":")
    if kind in ("http", "https"):
        if options.model is None:
            raise EvalError(f"judge {options.spec}: say which model of that server with --judge-model")
        settings = ServerSettings(
            options.model, timeout_seconds=options.timeout_seconds, tries=options.tries, parallel=options.parallel
        )
        return ServerJudge(options.spec, settings, options.key)
    if kind == "replay" and rest:
        return ReplayJudge(Path(rest), parse, options.model)
    if kind == "checkpoint" and rest:
        return _open_checkpoint(Path(rest), options)
    raise EvalError(f"judge '{options.spec}' is none; expected {HELP}")


def _open_checkpoint(path: Path, options: JudgeOptions) -> CheckpointJudge:
    if options.template not in TEMPLATES:
        raise EvalError(f"the judge's template '{options.template}' is none; known are {', '.join(TEMPLATES)}")
    found = open_checkpoint(path)
    model, tokenizer = found.load_model(torch.float32, options.device), found.tokenizer()
    # A judge whose last digits follow from its neighbours would now and then write another word.
    is_row_invariant = make_batch_invariant(model)
    lm = MegaGPTLM(model, tokenizer, max_seq_len=found.model_config.max_seq_len, batch_size=options.batch_size)
    described = {
        "weights": found.hash,
        "step": found.step,
        "dtype": "fp32",
        "arithmetic": describe_arithmetic(lm, is_row_invariant=is_row_invariant),
        "tokenizer": tokenizer.fingerprint,
        "code": judged_code(JUDGING),
    }
    identity = f"checkpoint {found.hash[:16]} step {found.step}"
    return CheckpointJudge(lm, identity, TEMPLATES[options.template], described)
