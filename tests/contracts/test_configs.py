"""Every YAML file under configs/ is right as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import TypeAdapter
from ruamel.yaml import YAML

from data_pipeline.config import DataJob
from data_pipeline.filters.registry import build_filters
from megagpt.config.load import load_config
from megagpt.config.schema import ModelSection, TrainingRun
from megagpt.model.flops import parameter_count
from megagpt.parallel.plan import plan_batches

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
BY_FOLDER = {name: sorted((CONFIGS / name).glob("*.yaml")) for name in ("", "model", "data", "data/filters", "evals")}
REST = ["run.dir=r", "data.train=d", "optim.lr=1e-3", "train.max_steps=1"]
REST += ["train.global_batch_size=1", "train.micro_batch_size=1"]


def name_of(path):
    return str(path.relative_to(CONFIGS))


def test_every_file_is_of_a_kind_that_is_tested_here_or_with_the_evals():
    known = {path for paths in BY_FOLDER.values() for path in paths}
    assert set(CONFIGS.rglob("*.yaml")) == known
    assert set(CONFIGS.rglob("*.yml")) == set()


@pytest.mark.parametrize("path", BY_FOLDER[""], ids=name_of)
def test_a_training_run_loads_and_its_batch_divides_over_one_and_two_processes(path):
    config = load_config(TrainingRun, [path])
    for world_size in (1, 2):
        assert plan_batches(config, world_size).global_batch_size == config.train.global_batch_size


@pytest.mark.parametrize("path", BY_FOLDER["model"], ids=name_of)
def test_a_model_file_holds_a_model_and_nothing_else(path):
    content = YAML(typ="safe", pure=True).load(path.read_text())
    assert content.keys() == {"model"}
    model = TypeAdapter(ModelSection).validate_python(content["model"])
    assert load_config(TrainingRun, [path], REST).model == model
    assert parameter_count(model) > 0


@pytest.mark.parametrize("path", BY_FOLDER["data"], ids=name_of)
def test_a_data_job_loads(path):
    assert load_config(DataJob, [path]).sources


@pytest.mark.parametrize("path", BY_FOLDER["data/filters"], ids=name_of)
def test_a_filter_preset_loads_beside_a_job_and_holds_no_other_section(path, tmp_path):
    minimal = tmp_path / "job.yaml"
    minimal.write_text("out: x\nsources: [a.jsonl]\n")
    content = YAML(typ="safe", pure=True).load(path.read_text())
    assert content.keys() == {"filters", "language"}
    for files in ([path, minimal], [minimal, path]):
        job = load_config(DataJob, files)
        assert job.filters == content["filters"]
        assert list(job.filters) == list(content["filters"])


@pytest.mark.parametrize("path", BY_FOLDER["data/filters"], ids=name_of)
def test_a_filter_preset_writes_every_setting_out(path):
    content = YAML(typ="safe", pure=True).load(path.read_text())
    for name, settings in build_filters(content["filters"]).thresholds.items():
        assert content["filters"][name].keys() == settings.keys()


# What the recipes change of the defaults, which are the numbers of each rule set's own paper or code.
DEVIATIONS = {
    "c4": {},
    "dclm": {},
    "fineweb": {
        "gopher_quality.shares_of": "tokens",
        "c4.terminal_punctuation": False,
        "c4.words_per_line": 3,
        "c4.min_sentences": 5,
        "c4.max_page_characters": None,
    },
    "gopher": {},
}


@pytest.mark.parametrize("path", BY_FOLDER["data/filters"], ids=name_of)
def test_a_filter_preset_has_the_numbers_of_its_source(path):
    section = YAML(typ="safe", pure=True).load(path.read_text())["filters"]
    chosen = build_filters(section).thresholds
    defaults = build_filters({name: {} for name in section}).thresholds
    changed = {
        f"{name}.{key}": value
        for name, settings in chosen.items()
        for key, value in settings.items()
        if value != defaults[name][key]
    }
    assert changed == DEVIATIONS[path.stem]


def test_the_quickstart_trains_on_what_its_data_job_writes():
    run, job = (
        load_config(TrainingRun, [CONFIGS / "quickstart.yaml"]),
        load_config(DataJob, [CONFIGS / "data/quickstart.yaml"]),
    )
    name = job.pack.name
    assert run.data.train == job.out / f"{name}_train"
    assert run.data.val == job.out / f"{name}_val"
    assert run.model.vocab_size >= job.tokenizer.vocab_size
