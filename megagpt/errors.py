"""What can go wrong in a way that a user can mend.

    MegaGPTError                  exit code 2: one message, no traceback
     |- ConfigError               a key, a value or a combination in the run's configuration
     |- DataError                 a source, a token file, a tokenizer
     |- CheckpointError           no usable checkpoint, or one that belongs to something else
     |   |- CheckpointIncomplete  no manifest: nothing that a save has finished
     |   |- CheckpointDamaged     its bytes were read, and are not those that were written
     |   |- NoRoom                the disk has too little room for a checkpoint
     |   |- CheckpointUnreadable  exit code 7: its bytes could not be read, so that nothing is known about them
     |   '- SaveFailed            exit code 6: the state could not be saved; older checkpoints stand
     |- EvalError                 benchmark data or a task that cannot be used
     |- TrainingDiverged          exit code 3: loss or gradient is not finite, or replicas differ
     |- TrainingHung              exit code 4: a rank came to no end of what it did, or is gone
     |- RunBusy                   exit code 5: another process trains in the run's folder
     '- SystemFailed              exit code 7: a disk, a network or a host did not do what it was asked; it may again

Each message says what is wrong, the value, where it stands, and what would be right.
"""

import errno
from collections.abc import Mapping
from typing import Any

_WRONG_PATHS = (errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
"""What a path in the configuration can be wrong by, and no waiting mends."""
_READING_MAY_WORK = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOTCONN,
    errno.EHOSTDOWN,
    errno.EREMOTEIO,
)
"""What a file that the user has named may be read in spite of, later."""
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class MegaGPTError(Exception):
    """Base of every error that is the user's to mend; the message is all they need to see."""

    exit_code = 2


class ConfigError(MegaGPTError):
    """A configuration key, value or combination that cannot work."""


class DataError(MegaGPTError):
    """A source, token file or tokenizer that is missing, damaged or does not fit."""


class CheckpointError(MegaGPTError):
    """No checkpoint that can be used, or one of another model."""


class CheckpointIncomplete(CheckpointError):  # noqa: N818 - it says what is
    """A folder without a manifest: no save has finished there."""


class CheckpointDamaged(CheckpointError):  # noqa: N818 - it says what is
    """Bytes were read that are not those that were written: a size, a checksum or a manifest is wrong."""


class CheckpointUnreadable(CheckpointError):  # noqa: N818 - it says what is
    """A file of a checkpoint, or its folder, could not be read. That proves no damage: a mount may be missing."""

    exit_code = 7


class NoRoom(CheckpointError):  # noqa: N818 - it says what is
    """A checkpoint was not saved because its disk, or a quota, has too little room."""


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


class SystemFailed(MegaGPTError):  # noqa: N818 - it says what is
    """A disk, a network or a host did not do what it was asked to; the same command may go on when it does again."""

    exit_code = 7
    no_room = False
    """Whether a disk or a quota was full."""


def of_system(error: OSError, who: str = "") -> MegaGPTError:
    """An error of the operating system in its own words, for a person: what may pass as SystemFailed.

    Args:
        error: with the file's name, where it is about one.
        who: whose it is, put before the words.
    """
    if error.errno in _WRONG_PATHS:
        return MegaGPTError(f"{who}{error}")
    failed = SystemFailed(f"{who}{error}")
    failed.no_room = lacks_room(error)
    return failed


def unread(error: OSError, otherwise: type[MegaGPTError], message: str) -> MegaGPTError:
    """What to raise where a file that the user has named could not be read.

    Args:
        error: of the operating system.
        otherwise: what it is where the name is wrong, or no right to read it was given.
        message: for a person.
    """
    return (SystemFailed if error.errno in _READING_MAY_WORK else otherwise)(message)


def lacks_room(error: BaseException) -> bool:
    """Whether something could not be done because a disk or a quota is full."""
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    return isinstance(error, NoRoom) or (isinstance(error, SystemFailed) and error.no_room)
