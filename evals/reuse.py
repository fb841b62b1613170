"""Whether an earlier score stands for what would be evaluated now, and if not, why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import lm_eval
import torch

from evals.answers import sources_hash
from evals.results import TaskResult

SHORT = 12
"""Characters of a hash that people are told."""


def device_name(device: torch.device) -> str:
    """The GPU, or what instructions the CPU has."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


def describe_environment(
    device: torch.device,
    layout: str,
    tokenizer: Mapping[str, Any] | None,
    *,
    wants_invariant: bool,
    share_prefixes: bool,
) -> dict[str, Any]:
    """What beside weights, settings and data decides a score, or its last digits.

    Args:
        device: that computes.
        layout: processes that share the work x pipeline x tensor.
        tokenizer: as the checkpoint describes it.
        wants_invariant: whether row-invariant arithmetic is asked for; `TaskResult.batch_invariant` says whether it
            was found.
        share_prefixes: whether what inputs have in common at the beginning runs once.
    """
    return {
        "code": sources_hash(),
        "torch": str(torch.__version__),
        "lm_eval": lm_eval.__version__,
        "tokenizer": None if tokenizer is None else tokenizer.get("fingerprint"),
        "device": device.type,
        "device_name": device_name(device),
        "threads": torch.get_num_threads(),
        "layout": layout,
        "share_prefixes": share_prefixes,
        "wants_invariant": wants_invariant,
    }


_ALWAYS = {
    "code": "the evaluation's code",
    "torch": "torch",
    "tokenizer": "tokenizer",
    "device": "device",
    "wants_invariant": "batch-invariant arithmetic",
}
_UNLESS_INVARIANT = {
    "device_name": "device",
    "threads": "threads",
    "layout": "layout (work x pipeline x tensor)",
    "share_prefixes": "shared prefixes",
}
"""Row-invariant arithmetic was checked not to depend on the batch, so that its scores are those of any layout."""


def differences(before: TaskResult, wanted: Mapping[str, Any]) -> list[str]:
    """What an earlier score was found with and this one would not be; nothing where the one stands for the other.

    Args:
        before: the earlier one.
        wanted: checkpoint, settings, lm_eval_version, data and environment of the evaluation that is asked for.
    """
    return list(_differences(before, wanted))


def _differences(before: TaskResult, wanted: Mapping[str, Any]) -> Iterator[str]:
    if before.checkpoint.get("hash") != wanted["checkpoint"]["hash"]:
        yield "other weights"
    if before.settings_hash != wanted["settings_hash"]:
        keys = [*wanted["settings"], *(key for key in before.settings if key not in wanted["settings"])]
        changed = [_said(key, before.settings.get(key), wanted["settings"].get(key)) for key in keys]
        yield "; ".join(filter(None, changed)) or "other settings"
    if before.lm_eval_version != wanted["lm_eval_version"]:
        yield _said("lm-eval", before.lm_eval_version, wanted["lm_eval_version"])
    data, now = before.data, wanted["data"]
    if any(data.get(key) != now[key] for key in ("origin", "sha256")) or (
        now["sha256"] is None and data.get("path_or_id") != now["path_or_id"]
    ):
        yield "other data"
    if not before.environment:
        yield "it does not say with which code, torch and tokenizer it was made"
        return
    names = _ALWAYS if before.batch_invariant else _ALWAYS | _UNLESS_INVARIANT
    for key, name in names.items():
        told = _said(name, before.environment.get(key), wanted["environment"][key])
        if told:
            yield told


def _said(name: str, before: Any, now: Any) -> str:
    """`name before -> now`; nothing where both are the same."""
    return "" if before == now else f"{name} {_short(before)} -> {_short(now)}"


def _short(value: Any) -> str:
    text = str(value)
    return text[:SHORT] if len(text) > 2 * SHORT and " " not in text else text
