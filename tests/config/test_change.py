"""A configuration with some of its values said anew."""

from __future__ import annotations

import pytest

from megagpt.config.load import change_config
from megagpt.errors import ConfigError
from tests.tiny import run_config


@pytest.fixture
def config(tmp_path):
    return run_config(tmp_path / "run", tmp_path / "tokens", "parallel.extra={a: {b: 1}}")


def test_what_is_said_is_taken_and_the_rest_stays(config, tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("parallel: {tensor: 2, zero_stage: 3}\ntrain: {micro_batch_size: 1}\n")
    changed = change_config(config, [str(file), "parallel.zero_stage=2", "run.seed=7"])
    assert (changed.parallel.tensor, changed.parallel.zero_stage) == (2, 2)
    assert (changed.train.micro_batch_size, changed.run.seed) == (1, 7)
    assert changed.parallel.extra == {"a": {"b": 1}}
    assert (changed.model, changed.optim, changed.data) == (config.model, config.optim, config.data)


def test_nothing_said_changes_nothing(config):
    assert change_config(config, []) == config


def test_complaints_name_where_it_was_said(config, tmp_path):
    file = tmp_path / "cluster.yaml"
    file.write_text("parallel: {tensr: 2}\n")
    with pytest.raises(ConfigError, match=rf"{file}: unknown key 'parallel.tensr'; did you mean 'tensor'"):
        change_config(config, [str(file)])
    with pytest.raises(ConfigError, match=r"command line: parallel.tensor: .*greater than 0, got 0"):
        change_config(config, ["parallel.tensor=0"])
