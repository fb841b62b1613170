"""`megagpt plan`: what it lists can run, needs what --check says, and fits where it was told to fit."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from megagpt.cli import main
from megagpt.config.load import load_config
from megagpt.config.schema import TrainingRun
from megagpt.errors import ConfigError
from megagpt.parallel.plan import plan_batches
from megagpt.train.describe import describe_plan
from megagpt.train.layout_table import RECOMPUTE, plan_layouts
from tests.tiny import run_config, run_words


@pytest.fixture
def config(tmp_path, tokens):
    sizes = ["model.n_head=4", "model.d_model=32", "model.n_layer=4", "model.max_seq_len=256"]
    return run_config(tmp_path / "run", tokens, *sizes, "train.micro_batch_size=1", "train.global_batch_size=16")


def test_every_layout_can_run_and_needs_what_check_says(config, tmp_path):
    found = plan_layouts(config, 4, None, None)
    assert {(one.tensor, one.pipeline, one.zero_stage) for one in found} >= {(1, 1, 0), (1, 1, 3), (4, 1, 1), (2, 2, 1)}
    assert len({one.overrides for one in found}) == len(found)
    (tmp_path / "run.yaml").write_text(config.model_dump_json())
    for one in found[::7]:
        chosen = load_config(TrainingRun, [tmp_path / "run.yaml"], one.overrides.split())
        plan = plan_batches(chosen, 4)
        assert (plan.data_parallel, plan.grad_accum_steps) == (one.data, one.grad_accum_steps)
        assert describe_plan(chosen, plan)["memory_bytes"]["total_bytes"] == one.memory_bytes


def test_what_loses_least_time_comes_first(config):
    found = plan_layouts(config, 4, None, None)
    assert (found[0].tensor, found[0].pipeline, found[0].sequence, found[0].recompute) == (1, 1, 1, "none")
    assert [one.cost for one in found] == sorted(one.cost for one in found)
    fastest = {kind: next(i for i, one in enumerate(found) if one.recompute == kind) for kind in ("none", "full")}
    assert fastest["none"] < fastest["full"]


def test_recomputation_is_listed_only_where_it_saves_memory(config):
    by_layout = {}
    for one in plan_layouts(config, 2, None, None):
        by_layout.setdefault(one.overrides.rpartition(" ")[0], []).append(one)
    for same in by_layout.values():
        memory = [one.memory_bytes for one in sorted(same, key=lambda one: RECOMPUTE.index(one.recompute))]
        assert memory == sorted(set(memory), reverse=True)


def test_too_much_memory_and_groups_over_two_hosts_are_left_out(config):
    everything = plan_layouts(config, 4, None, None)
    limit = sorted(one.memory_bytes for one in everything)[len(everything) // 2] / 2**30
    fitting = plan_layouts(config, 4, limit, None)
    assert [one.overrides for one in fitting] == [o.overrides for o in everything if o.memory_bytes <= limit * 2**30]
    assert max(one.tensor for one in plan_layouts(config, 4, None, 2)) == 2
    with pytest.raises(ConfigError, match=r"fits into 1e-06 GiB; the smallest needs 0.0 GiB"):
        plan_layouts(config, 4, 1e-6, None)


def test_a_batch_that_does_not_divide_is_told(config):
    with pytest.raises(ConfigError, match=r"no layout of 7 processes can run: train\.global_batch_size=16"):
        plan_layouts(config, 7, None, None)


def test_the_command_shows_a_table_and_the_words_of_the_first(tmp_path, tokens):
    words = [*run_words(tmp_path / "run", tokens), "--world-size", "2"]
    shown = CliRunner().invoke(main, ["plan", *words, "--top", "3"])
    assert shown.exit_code == 0, shown.output
    rows = json.loads(CliRunner().invoke(main, ["plan", *words, "--json"]).output)
    assert shown.output.splitlines()[-1] == rows[0]["overrides"]
    assert f"3 of {len(rows)} layouts" in shown.output
