"""Does the tokenizer fit the tokens, the tokens the model, and the checkpoint the run?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megagpt.checkpoint.store import Manifest
from megagpt.config.schema import TrainingRun
from megagpt.data.manifest import read_manifest
from megagpt.data.mixture import Mixture, open_mixture
from megagpt.errors import CheckpointError, ConfigError, DataError
from megagpt.tokenizer import Tokenizer, open_recorded_tokenizer, open_tokenizer

UNCHANGEABLE = ("model", "run.seed", "train.global_batch_size", "optim.name", "data.isolate_documents")
"""Keys that a resumed run must keep: what the weights mean, which sample comes when, what the optimizer remembers, and
what attention sees and which tokens are predicted. `data.train` is compared by its tokens; all others may change, and
every change is told and recorded."""
_BEFORE_THEY_WERE_KEYS: Mapping[str, Mapping[str, Any]] = {
    "optim": {"name": "adamw"},
    "data": {"isolate_documents": False},
}
"""What checkpoints of older versions do not say."""


def check_tokens(config: TrainingRun, mixture: Mixture) -> Tokenizer | None:
    """Open the tokenizer that the token files name and check that everything fits, the validation tokens too.

    Returns:
        the tokenizer, or None for token files without manifest.json where `data.tokenizer` is not set.

    Raises:
        ConfigError: the model's vocabulary is smaller than the tokenizer's or the tokens'.
        DataError: the tokens were made with another tokenizer than `data.tokenizer` or the validation tokens, or these
            are missing, damaged or too few.
    """
    recorded = _recorded_tokenizers(config)
    tokenizer = _open(config, recorded)
    for prefix, described in recorded.items():
        if tokenizer is not None and described["fingerprint"] != tokenizer.fingerprint:
            raise DataError(
                f"{prefix} was made with another tokenizer ({described['fingerprint']}) than "
                f"{config.data.tokenizer or next(iter(recorded))} ({tokenizer.fingerprint}); "
                "use token files of one tokenizer, and leave data.tokenizer out where they name theirs"
            )
    opened = [mixture]
    if config.data.val is not None:
        opened.append(open_mixture(config.data.val, config.model.max_seq_len, config.run.seed))
    largest = max(-1 if tokens.max_token_id is None else tokens.max_token_id for tokens in opened)
    needed = max(tokenizer.vocab_size if tokenizer is not None else 0, largest + 1)
    if needed > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {config.model.vocab_size} but the tokenizer has {needed} tokens; "
            f"set model.vocab_size={needed} or more"
        )
    return tokenizer


def check_resumable(config: TrainingRun, manifest: Manifest, data_fingerprint: str, step_dir: Path) -> None:
    """Refuse to go on from a checkpoint of another model, optimizer or other data.

    Raises:
        CheckpointError: naming each difference, both values.
    """
    current = config.model_dump(mode="json")
    imported = manifest.data_fingerprint is None  # it has seen no samples yet, so any may come
    keys = UNCHANGEABLE[:1] if imported else UNCHANGEABLE
    older = {name: {**keys, **manifest.config.get(name, {})} for name, keys in _BEFORE_THEY_WERE_KEYS.items()}
    saved_config = {**manifest.config, **older}
    differences = [
        f"{at} is {saved!r} in the checkpoint, {now!r} in the configuration"
        for at, (saved, now) in changed_values(saved_config, current).items()
        if any(f"{at}.".startswith(f"{key}.") for key in keys)
    ]
    if not imported and manifest.data_fingerprint != data_fingerprint and not differences:
        differences.append("data.train holds other tokens, weights or sequence length")
    if differences:
        raise CheckpointError(
            f"{step_dir}: checkpoint of another run: {'; '.join(differences)}. "
            "Choose another run.dir, or restore these settings"
        )


def changed_values(saved: Mapping[str, Any], current: Mapping[str, Any], at: str = "") -> dict[str, tuple[Any, Any]]:
    """Every leaf that is not the same in two nested mappings: its dotted path -> (saved, current)."""
    changed: dict[str, tuple[Any, Any]] = {}
    for key in sorted(saved.keys() | current.keys()):
        before, now = saved.get(key), current.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            changed |= changed_values(before, now, f"{at}{key}.")
        elif before != now:
            changed[f"{at}{key}"] = (before, now)
    return changed


def _recorded_tokenizers(config: TrainingRun) -> dict[Path, dict[str, Any]]:
    """What manifest.json beside each token file says, where there is one."""
    train = config.data.train
    prefixes = [train] if isinstance(train, Path) else [part.prefix for part in train]
    manifests = {prefix: read_manifest(prefix) for prefix in [*prefixes, config.data.val] if prefix is not None}
    return {prefix: manifest.tokenizer for prefix, manifest in manifests.items() if manifest is not None}


def _open(config: TrainingRun, recorded: Mapping[Path, dict[str, Any]]) -> Tokenizer | None:
    """The configured tokenizer, or the one that the first token file with a manifest was made with."""
    if config.data.tokenizer is not None:
        return open_tokenizer(config.data.tokenizer)
    if not recorded:
        return None
    prefix, described = next(iter(recorded.items()))
    return open_recorded_tokenizer(prefix.parent, described)
