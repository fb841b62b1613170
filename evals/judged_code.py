"""Which code made an answer or a judgement: both are kept for good, and text of other code is another text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from evals.answers import code_version

ANSWERING = ("chat.py", "judged_model.py", "mt_bench/answers.py")
"""Of this package: how a question becomes a model's input, beside what `evals.answers.code_version` covers."""
JUDGING = ("chat.py", "judge/local.py")
"""Likewise how a checkpoint is asked to judge."""


_FOLDER = Path(__file__).resolve().parent


def judged_code(files: Sequence[str], folder: Path = _FOLDER) -> str:
    """Hash of these files, of the sources that decide a model's answers, and of the libraries that compute.

    Args:
        files: below `folder`.
        folder: of this package.
    """
    digest = hashlib.sha256(code_version().encode())
    for name in files:
        digest.update(f"{name}\n".encode() + (folder / name).read_bytes())
    return digest.hexdigest()
