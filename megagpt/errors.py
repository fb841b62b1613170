"""What can go wrong in a way that a user can mend.

    MegaGPTError                  exit code 2: one message, no traceback
     |- ConfigError               a key, a value or a combination in the run's configuration
     |- DataError                 a source, a token file, a tokenizer
     |- CheckpointError           no usable checkpoint, or one that belongs to something else
     |   '- SaveFailed            exit code 6: the state could not be saved; older checkpoints stand
     |- EvalError                 benchmark data or a task that cannot be used
     |- TrainingDiverged          exit code 3: loss or gradient is not finite, or replicas differ
     |- TrainingHung              exit code 4: a rank came to no end of what it did, or is gone
     '- RunBusy                   exit code 5: another process trains in the run's folder

Each message says what is wrong, the value, where it stands, and what would be right.
"""

from collections.abc import Mapping
from typing import Any


class MegaGPTError(Exception):
    """Base of every error that is the user's to mend; the message is all they need to see."""

    exit_code = 2


class ConfigError(MegaGPTError):
    """A configuration key, value or combination that cannot work."""


class DataError(MegaGPTError):
    """A source, token file or tokenizer that is missing, damaged or does not fit."""


class CheckpointError(MegaGPTError):
    """No checkpoint that can be used, or one of another model."""


class SaveFailed(CheckpointError):  # noqa: N818 - it says what is
    """The last save of a run failed, or too many in a row; older checkpoints stand."""

    exit_code = 6


class EvalError(MegaGPTError):
    """Benchmark data or a task that cannot be used as asked."""


class TrainingDiverged(MegaGPTError):  # noqa: N818 - the field's name for it
    """The loss or the gradient norm is not finite, or replicas differ; no checkpoint holds the step."""

    exit_code = 3
    details: Mapping[str, Any] = {}
    """For the run's history: ranks, samples, tensors, as plain values."""


class TrainingHung(MegaGPTError):  # noqa: N818 - the field's name for it
    """A rank exceeded the deadline of its phase, or has ended while the others go on; the last checkpoint stands."""

    exit_code = 4


class RunBusy(MegaGPTError):  # noqa: N818 - it says what is
    """Another process trains in the run's folder; it may be about to end."""

    exit_code = 5
