"""Exit codes are part of the interface."""

import pytest

from megagpt import errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.MegaGPTError, 2),
        (errors.ConfigError, 2),
        (errors.DataError, 2),
        (errors.CheckpointError, 2),
        (errors.EvalError, 2),
        (errors.TrainingDiverged, 3),
        (errors.TrainingHung, 4),
        (errors.SaveFailed, 6),
        (errors.RunBusy, 5),
        (errors.CheckpointIncomplete, 2),
        (errors.CheckpointDamaged, 2),
        (errors.NoRoom, 2),
        (errors.CheckpointUnreadable, 7),
        (errors.SystemFailed, 7),
    ],
)
def test_each_error_has_its_exit_code(error, code):
    assert issubclass(error, errors.MegaGPTError)
    assert error.exit_code == code
    assert str(error("what is wrong")) == "what is wrong"


def test_every_error_class_is_in_the_table():
    defined = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)}
    assert len(defined) == 14
