from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.config import DataJob
from megagpt.config.load import Section, dump_config, load_config
from megagpt.config.schema import GPT2Model, LlamaModel, TrainingRun
from megagpt.errors import ConfigError

MODEL = "model: {family: gpt2, n_layer: 2, n_head: 2, d_model: 8}\n"
REST = """\
run: {dir: runs/x}
data: {train: tokens}
optim: {lr: 6e-4}
train: {max_steps: 4, global_batch_size: 4, micro_batch_size: 2}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path / "base.yaml", MODEL + REST)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def complaint(files: list[Path], *overrides: str, schema: type[Section] = TrainingRun) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(schema, files, overrides)
    return str(caught.value)


def test_files_add_up_within_and_across_sections(tmp_path):
    first = write(tmp_path / "a.yaml", MODEL + "train: {max_steps: 4}\nrun: {dir: r}\n")
    second = write(tmp_path / "b.yaml", "train: {global_batch_size: 4, micro_batch_size: 2}\ndata: {train: t}\n")
    third = write(tmp_path / "c.yaml", "optim: {lr: 1e-3}\n")
    config = load_config(TrainingRun, [first, second, third])
    assert (config.train.max_steps, config.train.global_batch_size, config.optim.lr) == (4, 4, 0.001)
    assert config.data.train == Path("t")


@pytest.mark.parametrize("again", ["4", "5"])
def test_the_same_key_in_two_files_is_an_error_that_names_both(base, tmp_path, again):
    other = write(tmp_path / "other.yaml", f"train: {{max_steps: {again}}}\n")
    assert complaint([base, other]) == (
        f"{other}: train.max_steps = {again} is already set in {base}; "
        "files add up, so say it in one of them (the command line may override it)"
    )


@pytest.mark.parametrize("text", ["train: null\n", "train: 5\n", "train: [1]\n"])
def test_a_file_cannot_wipe_out_another_files_section(base, tmp_path, text):
    other = write(tmp_path / "other.yaml", text)
    message = complaint([base, other])
    assert message.startswith(f"{other}: train = ")
    assert f"is already set in {base} as train.max_steps" in message


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_an_empty_section_adds_nothing(base, tmp_path, order):
    files = [base, write(tmp_path / "other.yaml", "train: {}\nparallel: {extra: {}}\n")]
    assert load_config(TrainingRun, [files[i] for i in order]) == load_config(TrainingRun, [base])


def test_overrides_win_and_the_last_one_counts(base):
    config = load_config(TrainingRun, [base], ["optim.lr=1e-3", "optim.lr=2e-3", "run.seed=7", "log.progress=false"])
    assert (config.optim.lr, config.run.seed, config.log.progress) == (0.002, 7, False)


def test_an_override_may_replace_a_whole_section(base):
    llama = "model={family: llama, n_layer: 1, n_head: 2, n_kv_head: 1, d_model: 8, d_ff: 16, vocab_size: 32}"
    config = load_config(TrainingRun, [base], [llama, "model.n_layer=3"])
    assert isinstance(config.model, LlamaModel)
    assert config.model.n_layer == 3


def test_an_override_may_be_a_list_or_hold_equals_signs(base):
    overrides = ["data.train=[{prefix: a, weight: 1}, {prefix: b, weight: 0.5}]", "run.dir=runs/lr=3"]
    config = load_config(TrainingRun, [base], overrides)
    assert [item.weight for item in config.data.train] == [1.0, 0.5]
    assert config.run.dir == Path("runs/lr=3")


@pytest.mark.parametrize(("text", "value"), [("6e-4", 6e-4), ("1E-3", 1e-3), ("1", 1.0), ("+.5", 0.5)])
def test_numbers_are_read_as_yaml_1_2(tmp_path, base, text, value):
    assert load_config(TrainingRun, [base], [f"optim.lr={text}"]).optim.lr == value
    file = write(tmp_path / "in_file.yaml", (MODEL + REST).replace("6e-4", text))
    assert load_config(TrainingRun, [file]).optim.lr == value


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ('train.max_steps="12"', "train.max_steps: input should be a valid integer, got '12'"),
        ("train.max_steps=true", "train.max_steps: input should be a valid integer, got True"),
        ("train.max_steps=1e3", "train.max_steps: input should be a valid integer, got 1000.0"),
        ('optim.lr="6e-4"', "optim.lr: input should be a valid number, got '6e-4'"),
        ("optim.lr=true", "optim.lr: input should be a valid number, got True"),
        ("optim.lr=", "optim.lr: input should be a valid number, got None"),
        ("optim.lr=0", "optim.lr: input should be greater than 0, got 0"),
        ("optim.lr=.nan", "optim.lr: must be finite numbers and plain text, got nan"),
        ("optim.betas=[0.9]", "optim.betas.1 is missing and has no default"),
        ("optim.betas=[0.9, 2]", "optim.betas.1: input should be less than 1, got 2"),
        ("optim.schedule=linear", "optim.schedule: input should be 'cosine', 'wsd' or 'constant', got 'linear'"),
        ("log.progress=yes", "log.progress: input should be a valid boolean, got 'yes'"),
        ("run.dir=3", "run.dir: input should be text, got 3"),
        ("optim=3", "optim: input should be a mapping, got 3"),
        ("parallel.zero_stage=true", "parallel.zero_stage: must be a whole number, got True"),
        ("parallel.zero_stage=1.0", "parallel.zero_stage: must be a whole number, got 1.0"),
        ("parallel.zero_stage=7", "parallel.zero_stage: input should be 0, 1, 2 or 3, got 7"),
        ("parallel.extra={a: !!set {x}}", "parallel.extra.a: must be finite numbers and plain text, got {'x'}"),
        ("model.family=bert", "model.family is 'bert'; must be one of 'gpt2', 'llama'"),
        ("model={n_layer: 2}", "model.family is missing; must be one of 'gpt2', 'llama'"),
        ("data.train=[{prefix: a}]", "data.train.0.weight is missing and has no default"),
        ("data.train=[]", "data: train is an empty list; name at least one {prefix, weight}"),
        ("data.train.x=3", "data.train.x: data.train is a value, not a section"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key_and_what_would_be_right(base, override, problem):
    assert complaint([base], override) == f"command line: {problem}"


@pytest.mark.parametrize(
    ("override", "unknown", "hint"),
    [
        ("optm.lr=3", "optm", "; did you mean 'optim'?"),
        ("optim.lrr=3", "optim.lrr", "; did you mean 'lr'?"),
        ("model.n_layers=3", "model.n_layers", "; did you mean 'n_layer'?"),
        ("model.n_kv_head=1", "model.n_kv_head", "; did you mean 'n_head'?"),  # a key of the other family only
        ("data.train=[{prefix: a, weight: 1, wieght: 2}]", "data.train.0.wieght", "; did you mean 'weight'?"),
        ("run.zzz=1", "run.zzz", "; known keys here: dir, seed"),
        (
            "model.gpt2=1",
            "model.gpt2",
            "; known keys here: d_model, dropout, family, max_seq_len, n_head, n_layer, norm_eps, vocab_size",
        ),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_right_one(base, override, unknown, hint):
    assert complaint([base], override) == f"command line: unknown key '{unknown}'{hint}"


def test_an_unknown_key_in_a_file_names_that_file(base, tmp_path):
    other = write(tmp_path / "other.yaml", "optim: {wieght_decay: 0.1}\n")
    assert complaint([base, other]) == f"{other}: unknown key 'optim.wieght_decay'; did you mean 'weight_decay'?"


def test_all_problems_come_at_once(tmp_path):
    file = write(tmp_path / "a.yaml", MODEL + "run: {dir: r}\ntrain: {max_steps: x}\noptim: {lr: -1}\n")
    assert complaint([file]).splitlines() == [
        f"{file}: data is missing and has no default",
        f"{file}: optim.lr: input should be greater than 0, got -1",
        f"{file}: train.max_steps: input should be a valid integer, got 'x'",
        f"{file}: train.global_batch_size is missing and has no default",
        f"{file}: train.micro_batch_size is missing and has no default",
    ]


def test_keys_of_muon_are_not_passed_over_under_another_optimizer(base):
    assert "muon is set, but name is 'adamw'" in complaint([base], "optim.muon.momentum=0.9")
    config = load_config(TrainingRun, [base], ["optim.name=muon", "optim.muon.momentum=0.9"])
    assert config.optim.muon.momentum == 0.9


def test_a_combination_that_cannot_work_names_where_its_keys_stand(base):
    assert complaint([base], "model.n_head=3") == (
        f"{base}, command line: model: d_model (8) must be a multiple of n_head (3)"
    )
    assert complaint([base], "eval.every=3") == (
        f"{base}, command line: eval.every is 3 but data.val is not set; name validation tokens or set eval.every=0"
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("model: {", "not valid YAML: "),
        ("a: 1\na: 2\n", "not valid YAML: while constructing a mapping"),
        ("train: {max_steps: 1, max_steps: 2}\n", "not valid YAML: while constructing a mapping"),
        ("- a\n- b\n", "must hold `section: {key: value}` mappings, found list"),
        ("hello\n", "must hold `section: {key: value}` mappings, found str"),
        ("a: !!python/object:os.system {}\n", "not valid YAML: "),
        ("a: \x07\n", "not valid YAML: "),
        ("--- {a: 1}\n--- {b: 2}\n", "not valid YAML: "),
    ],
)
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path, text, problem):
    file = write(tmp_path / "bad.yaml", text)
    assert complaint([file]).startswith(f"{file}: {problem}")


def test_a_missing_file_a_folder_and_bytes_are_refused_by_name(tmp_path):
    absent = tmp_path / "absent.yaml"
    assert complaint([absent]) == f"{absent}: no such configuration file"
    assert complaint([tmp_path]).startswith(f"{tmp_path}: cannot be read as text: ")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert complaint([binary]).startswith(f"{binary}: cannot be read as text: ")


def test_an_empty_file_adds_nothing(base, tmp_path):
    empty = write(tmp_path / "empty.yaml", "# only a comment\n")
    assert load_config(TrainingRun, [empty, base]) == load_config(TrainingRun, [base])
    assert "run is missing and has no default" in complaint([empty])


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("optim.lr", "'optim.lr' is neither a .yaml file nor an override like `optim.lr=3e-4`"),
        ("=3", "'=3' is neither a .yaml file nor an override like `optim.lr=3e-4`"),
        ("optim.lr=[", "optim.lr: '[' is not a YAML value: "),
    ],
)
def test_a_malformed_override_is_refused(base, override, problem):
    assert complaint([base], override).startswith(f"command line: {problem}")


def test_a_path_that_looks_like_a_date_stays_a_path(base):
    assert load_config(TrainingRun, [base], ["run.dir=2026-01-02"]).run.dir == Path("2026-01-02")


def test_a_data_job_takes_bare_paths_and_complains_inside_lists(tmp_path):
    file = write(tmp_path / "job.yaml", "out: o\nsources: [a.txt, {path: b, kind: wet}]\n")
    job = load_config(DataJob, [file])
    assert [(source.path, source.kind) for source in job.sources] == [("a.txt", "auto"), ("b", "wet")]
    wrong = "sources=[a, {path: b, knid: txt}]"
    assert complaint([file], wrong, schema=DataJob) == (
        "command line: unknown key 'sources.1.knid'; did you mean 'kind'?"
    )
    assert complaint([file], "sources=[]", schema=DataJob) == (
        "command line: sources: list should have at least 1 item, got []"
    )


def test_a_loaded_configuration_cannot_be_changed(base):
    config = load_config(TrainingRun, [base])
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.run = config.run  # type: ignore[misc]


sizes = st.integers(1, 8)
rates = st.floats(1e-12, 1e6, allow_nan=False)
names = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=12)


@st.composite
def models(draw: st.DrawFn) -> GPT2Model | LlamaModel:
    heads, layers = draw(sizes), draw(sizes)
    if draw(st.booleans()):
        width = heads * draw(sizes)
        return GPT2Model(family="gpt2", n_layer=layers, n_head=heads, d_model=width, dropout=draw(st.floats(0, 0.99)))
    return LlamaModel(
        family="llama",
        n_layer=layers,
        n_head=heads,
        n_kv_head=1,
        d_model=heads * 2 * draw(sizes),
        d_ff=draw(sizes),
        vocab_size=draw(sizes),
        rope_theta=draw(rates),
        qk_norm=draw(st.booleans()),
    )


@st.composite
def runs(draw: st.DrawFn) -> TrainingRun:
    micro = draw(sizes)
    mixture = st.lists(st.fixed_dictionaries({"prefix": names.map(Path), "weight": rates}), min_size=1, max_size=3)
    extra: Any = st.dictionaries(names, st.one_of(st.none(), st.booleans(), st.integers(), names, rates), max_size=3)
    return TrainingRun.model_validate(
        {
            "run": {"dir": Path(draw(names)), "seed": draw(st.integers(0, 2**62))},
            "model": draw(models()),
            "data": {
                "train": draw(st.one_of(names.map(Path), mixture.map(tuple))),
                "tokenizer": draw(st.none() | names),
            },
            "optim": {"lr": draw(rates), "eps": draw(rates), "betas": (0.9, draw(st.floats(0, 0.99)))},
            "train": {"max_steps": draw(sizes), "global_batch_size": micro * draw(sizes), "micro_batch_size": micro},
            "parallel": {"zero_stage": draw(st.integers(0, 3)), "extra": draw(extra)},
        }
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=runs())
def test_a_dumped_configuration_reads_back_equal(tmp_path, config):
    file = write(tmp_path / "config.yaml", dump_config(config))
    assert load_config(TrainingRun, [file]) == config


def test_a_file_includes_others_by_paths_relative_to_itself(tmp_path):
    (tmp_path / "parts").mkdir()
    write(tmp_path / "parts" / "model.yaml", MODEL)
    whole = write(tmp_path / "whole.yaml", "include: [parts/model.yaml]\n" + REST)
    assert load_config(TrainingRun, [whole]) == load_config(TrainingRun, [write(tmp_path / "one.yaml", MODEL + REST)])


def test_a_file_that_is_included_and_named_counts_once_and_a_circle_ends(tmp_path):
    whole = write(tmp_path / "whole.yaml", "include: [model.yaml]\n" + REST)
    model = write(tmp_path / "model.yaml", "include: [whole.yaml]\n" + MODEL)
    assert load_config(TrainingRun, [model, whole]).model.family == "gpt2"


def test_an_included_file_adds_up_as_any_other(tmp_path):
    write(tmp_path / "more.yaml", "optim: {lr: 1e-3}\n")
    whole = write(tmp_path / "whole.yaml", "include: [more.yaml]\n" + MODEL + REST)
    assert "more.yaml: optim.lr = 0.001 is already set in" in complaint([whole])


@pytest.mark.parametrize("included", ["more.yaml", "[1]", "{a: b}"])
def test_include_must_be_a_list_of_files(tmp_path, included):
    whole = write(tmp_path / "whole.yaml", f"include: {included}\n" + MODEL + REST)
    assert "include = " in complaint([whole])


def test_an_included_file_that_is_missing_is_named(tmp_path):
    whole = write(tmp_path / "whole.yaml", "include: [gone.yaml]\n" + MODEL + REST)
    assert "gone.yaml: no such configuration file" in complaint([whole])


def test_a_path_may_be_relative_to_the_folder_of_its_file(tmp_path, monkeypatch):
    (tmp_path / "tokens").mkdir()
    others = write(tmp_path / "others.yaml", MODEL + REST.replace("data: {train: tokens}\n", ""))
    mixture = 'data: {train: [{prefix: "${folder}/web", weight: 1.0}], val: "${folder}/val", tokenizer: "a${folder}/"}'
    config = load_config(TrainingRun, [others, write(tmp_path / "tokens/mixture.yaml", mixture)])
    assert [part.prefix for part in config.data.train] == [tmp_path / "tokens/web"]
    assert config.data.val == tmp_path / "tokens/val"
    assert config.data.tokenizer == "a${folder}/"  # only where a text begins with it
    monkeypatch.chdir(tmp_path)
    assert load_config(TrainingRun, [others, Path("tokens/mixture.yaml")]).data.val == Path("tokens/val")
