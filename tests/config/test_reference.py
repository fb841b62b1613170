from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from data_pipeline.config import DataJob
from megagpt.config.load import Section, section_types
from megagpt.config.reference import json_schema, reference
from megagpt.config.schema import TrainingRun

ROOTS = [TrainingRun, DataJob]


def fields_of(section: type[Section], at: str = "") -> Iterator[tuple[str, str, list[type[Section]]]]:
    """(last parts of the full name, description, nested sections) of every field below a section."""
    for name, field in section.model_fields.items():
        kinds = section_types(field.annotation)
        yield f"{at}{name}", field.description or "", kinds
        for kind in kinds:
            listed = "[]" if "tuple" in str(field.annotation) else ""
            yield from fields_of(kind, f"{at}{name}{listed}.")


@pytest.mark.parametrize("root", ROOTS)
def test_every_key_is_described_and_listed(root):
    text = reference(root)
    keys = list(fields_of(root))
    assert len(keys) > 20
    for key, description, kinds in keys:
        if description:
            assert f"- `{key}`: " in text
            assert " ".join(description.split()) in text
        else:  # a section speaks through its docstring
            assert kinds, f"{key} has no description"
            assert all((kind.__doc__ or "").strip() for kind in kinds)
            assert f"# {key}" in text


def test_types_bounds_and_defaults_stand_in_plain_words():
    text = reference(TrainingRun)
    for line in (
        "- `run.dir`: path; required.",
        "- `run.seed`: whole number at least 0; default 1234.",
        "- `optim.lr`: number above 0; required.",
        "- `optim.schedule`: one of cosine, wsd, constant; default cosine.",
        "- `optim.min_lr_frac`: number from 0 to 1; default 0.1.",
        "- `optim.betas`: list [number from 0 to below 1, number from 0 to below 1]; default [0.9, 0.95].",
        "- `data.train`: path or list of {prefix, weight}; required.",
        "- `data.val`: path or null; default null.",
        "- `log.progress`: true or false; default true.",
        "- `parallel.zero_stage`: one of 0, 1, 2, 3; default 1.",
    ):
        assert line in text


def test_both_model_families_have_their_own_heading():
    text = reference(TrainingRun)
    gpt2 = text.index("## model with family: gpt2")
    llama = text.index("## model with family: llama")
    assert gpt2 < llama < text.index("- `model.n_kv_head`: ")
    assert "### data.train[]" in text


@pytest.mark.parametrize("root", ROOTS)
def test_the_json_schema_describes_keys_and_refuses_unknown_ones(root):
    content = json.loads(json_schema(root))
    assert content["additionalProperties"] is False
    for definition in content["$defs"].values():
        assert definition["additionalProperties"] is False
        assert all("description" in field or "$ref" in field for field in definition["properties"].values())


def test_one_file_of_several_fits_the_json_schema():
    jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed")
    schema = json.loads(json_schema(TrainingRun))
    jsonschema.validate({"model": {"family": "llama", "n_layer": 4}}, schema)
    jsonschema.validate({"train": {"micro_batch_size": 4}, "data": {"train": [{"prefix": "a", "weight": 1}]}}, schema)
    for wrong in ({"model": {"n_layer": 4}}, {"train": {"micro_batch_size": 0}}, {"trian": {}}, {"optim": {"lr": "x"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
