"""A run small enough for hundreds of them: token files, and the words that configure it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megagpt.config.load import load_arguments
from megagpt.config.schema import TrainingRun
from megagpt.data.indexed import TokenFileWriter

VOCAB_SIZE = 61
SEQ_LEN = 16

MODELS = {
    "gpt2": {"family": "gpt2", "n_layer": 2, "n_head": 2, "d_model": 24},
    "llama": {"family": "llama", "n_layer": 2, "n_head": 4, "n_kv_head": 2, "d_model": 24, "d_ff": 40},
}


def write_tokens(prefix: Path, n_documents: int = 120, seed: int = 0) -> Path:
    """Documents in which the next token mostly follows from the last: there is something to learn."""
    random = np.random.default_rng(seed)
    with TokenFileWriter(prefix, "<u2") as writer:
        for _ in range(n_documents):
            token, document = int(random.integers(1, VOCAB_SIZE)), []
            for _ in range(int(random.integers(10, 60))):
                document.append(token)
                token = 1 + (3 * token + int(random.integers(0, 4))) % (VOCAB_SIZE - 1)
            writer.add_document([*document, 0])
    return prefix


def run_words(run_dir: Path, tokens: Path, *overrides: str, family: str = "gpt2") -> list[str]:
    """The command line of a run; later words override earlier ones."""
    model = MODELS[family] | {"vocab_size": VOCAB_SIZE, "max_seq_len": SEQ_LEN}
    return [
        f"run.dir={run_dir}",
        f"data.train={tokens}",
        *(f"model.{key}={value}" for key, value in model.items()),
        "optim.lr=1e-2",
        "optim.warmup_steps=3",
        "optim.grad_clip=0.5",
        "train.max_steps=12",
        "train.global_batch_size=8",
        "train.micro_batch_size=2",
        "train.dtype=fp32",
        "checkpoint.save_every=0",
        "log.tensorboard=false",
        "log.progress=false",
        *overrides,
    ]


def run_config(run_dir: Path, tokens: Path, *overrides: str, family: str = "gpt2") -> TrainingRun:
    """The configuration that `run_words` add up to."""
    return load_arguments(TrainingRun, run_words(run_dir, tokens, *overrides, family=family))
