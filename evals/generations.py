"""Sample texts of a checkpoint for the report: greedy and sampled, made once for each weights and settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evals.sample_files import GENERATIONS_FILE
from megagpt.atomic import write_file
from megagpt.checkpoint.open import open_checkpoint
from megagpt.errors import EvalError
from megagpt.generate import Sampling, generate

DEFAULT_PROMPTS = (
    "Return the",
    "This module provides",
    "Raises ValueError if",
    "The following example shows",
    "Once upon a time",
)
"""Two kinds: what documentation of Python says often, and what it does not say."""

FORMAT = 1


def write_generations(checkpoint_path: Path, prompts: tuple[str, ...], n_tokens: int, seed: int) -> Path:
    """Continue the prompts greedily and by sampling; the file is kept where weights and settings are the same.

    Args:
        checkpoint_path: a run (its newest complete checkpoint), or one step's folder.
        prompts: texts; none may be empty.
        n_tokens: the most new tokens of a text; fewer where the model's context or the end of the text comes first.
        seed: of the sampled texts.

    Returns:
        runs/NAME/evals/step_XXXXXXXX/generations.json.

    Raises:
        CheckpointError: no usable checkpoint, or one that names no tokenizer.
        EvalError: a prompt is empty or fills the model's context.
    """
    checkpoint = open_checkpoint(checkpoint_path)
    path = checkpoint.run_dir / "evals" / f"step_{checkpoint.step:08d}" / GENERATIONS_FILE
    samplings = (Sampling(), Sampling(temperature=0.8, top_k=50, seed=seed))
    identity = {
        "format": FORMAT,
        "hash": checkpoint.hash,
        "prompts": list(prompts),
        "n_tokens": n_tokens,
        "samplings": [asdict(sampling) for sampling in samplings],
    }
    if _is_reusable(path, identity):
        return path
    tokenizer = checkpoint.tokenizer()
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    room = _room(prompts, ids, checkpoint.model_config.max_seq_len, n_tokens)
    model = checkpoint.load_model()
    samples = []
    for sampling in samplings:
        texts = generate(model, ids, room, sampling, stop_ids=(tokenizer.eot_id,))
        samples += [
            {
                "prompt": prompt,
                "text": tokenizer.decode(text_ids),
                "sampling": _named(sampling),
                "reason": _why_it_ends(len(text_ids), room, n_tokens),
            }
            for prompt, text_ids in zip(prompts, texts, strict=True)
        ]
    write_file(path, (json.dumps({**identity, "samples": samples}, indent=1, ensure_ascii=False) + "\n").encode())
    return path


def _is_reusable(path: Path, identity: dict[str, Any]) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise EvalError(f"{path}: damaged: {error}; delete it to generate again") from None
    return isinstance(content, dict) and {key: content.get(key) for key in identity} == identity


def _room(prompts: Sequence[str], ids: Sequence[Sequence[int]], max_seq_len: int, n_tokens: int) -> int:
    """New tokens that fit behind the longest prompt."""
    for prompt, prompt_ids in zip(prompts, ids, strict=True):
        if not prompt_ids or len(prompt_ids) >= max_seq_len:
            raise EvalError(
                f"prompt {prompt[:60]!r} has {len(prompt_ids)} tokens; must be 1 to {max_seq_len - 1} for this model"
            )
    return min(n_tokens, max_seq_len - max(len(prompt_ids) for prompt_ids in ids))


def _why_it_ends(length: int, room: int, n_tokens: int) -> str:
    if length < room:
        return f"ended by the model after {length} tokens"
    return f"{length} tokens" if room == n_tokens else f"{length} of {n_tokens} tokens: the context holds no more"


def _named(sampling: Sampling) -> str:
    if sampling.temperature == 0:
        return "greedy"
    return f"temperature {sampling.temperature:g}, top-k {sampling.top_k}, seed {sampling.seed}"
