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
from megagpt.errors import ConfigError
from megagpt.model.flops import parameter_count
from megagpt.parallel.memory import worst_stage
from megagpt.parallel.plan import REFUSALS, BatchPlan, plan_batches

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FOLDERS = ("", "model", "data", "data/filters", "evals", "cluster")
BY_FOLDER = {name: sorted((CONFIGS / name).glob("*.yaml")) for name in FOLDERS}
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


GPU_BYTES = 80e9
CLUSTERS = {"a100_1x8", "a100_8x8", "a100_16x8", "a100_128x8", "h100_8x8"}


def parts_of(path):
    """`a100_16x8_llama_7b` -> the cluster, hosts, GPUs a host, the model's file."""
    gpu, shape, model = path.stem.split("_", 2)
    hosts, gpus = map(int, shape.split("x"))
    return f"{gpu}_{shape}", hosts, gpus, CONFIGS / "model" / f"{model}.yaml"


def cluster_run(path):
    words = [word for word in REST if not word.startswith("train.") or "max_steps" in word]
    return load_config(TrainingRun, [parts_of(path)[3], path], words)


def test_every_cluster_has_layouts():
    assert {parts_of(path)[0] for path in BY_FOLDER["cluster"]} == CLUSTERS


@pytest.mark.parametrize("path", BY_FOLDER["cluster"], ids=name_of)
def test_a_cluster_file_lays_its_model_over_exactly_its_gpus(path):
    _, hosts, gpus, _ = parts_of(path)
    config = cluster_run(path)
    parallel, model = config.parallel, config.model
    model_parallel = parallel.tensor * parallel.pipeline * parallel.sequence
    data_parallel, rest = divmod(hosts * gpus, model_parallel)
    assert rest == 0
    assert gpus % (parallel.tensor * parallel.sequence) == 0, "tensor and sequence groups stay inside a host"
    assert config.train.global_batch_size % (data_parallel * config.train.micro_batch_size) == 0
    assert model.n_head % parallel.tensor == 0
    assert model.n_layer % parallel.pipeline == 0
    assert not (parallel.pipeline > 1 and parallel.zero_stage > 1), "DeepSpeed's pipeline engine takes ZeRO-1 at most"
    micro_batches = config.train.global_batch_size // (data_parallel * config.train.micro_batch_size)
    assert (parallel.pipeline - 1) / micro_batches < 0.1, "share of a step that the pipeline stands still"
    assert 0.4e6 <= config.train.global_batch_size * model.max_seq_len <= 4.3e6


@pytest.mark.parametrize("path", BY_FOLDER["cluster"], ids=name_of)
def test_a_cluster_file_fits_into_its_gpus(path):
    """80 GB, a twentieth of it left for the allocator, CUDA and NCCL."""
    _, hosts, gpus, _ = parts_of(path)
    config = cluster_run(path)
    parallel = config.parallel
    model_parallel = parallel.tensor * parallel.pipeline * parallel.sequence
    data_parallel = hosts * gpus // model_parallel
    micro = config.train.micro_batch_size
    accumulation = config.train.global_batch_size // (data_parallel * micro)
    plan = BatchPlan(data_parallel, micro, accumulation, config.model.max_seq_len, model_parallel)
    _, estimate = worst_stage(config, plan)
    assert estimate.total_bytes < 0.95 * GPU_BYTES


@pytest.mark.parametrize("path", BY_FOLDER["cluster"], ids=name_of)
def test_a_cluster_file_is_planned_or_refused_for_what_this_version_lacks_alone(path):
    """A layout that is not built yet is refused in the table's words; the day it is built, it must plan."""
    _, hosts, gpus, _ = parts_of(path)
    config = cluster_run(path)
    refused = [rule for rule in REFUSALS if rule.applies(config)]
    assert [rule.reason for rule in refused if "this version has no" not in rule.reason] == []
    if refused:
        with pytest.raises(ConfigError) as caught:
            plan_batches(config, hosts * gpus)
        assert all(rule.reason in str(caught.value) for rule in refused)
    else:
        plan = plan_batches(config, hosts * gpus)
        assert plan.global_batch_size == config.train.global_batch_size
