"""Layouts that run: all of them, and those nearest to one that does not. Compared with going through everything."""

from __future__ import annotations

from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.errors import ConfigError
from megagpt.parallel.legal import KEYS, allowed_layouts
from megagpt.parallel.nearest import CHOICES, in_words, nearest_layouts, with_layout
from megagpt.parallel.plan import REFUSALS, check_layout, is_legal, plan_batches
from tests.tiny import run_config

MODELS = {
    "gpt2": ("gpt2", "model.n_head=4", "model.n_layer=3"),
    "llama": ("llama", "model.n_head=6", "model.n_kv_head=2", "model.d_ff=36"),
    "mqa": ("llama", "model.n_kv_head=1", "model.n_layer=4"),
}


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nearest")
    known = {
        (name, dtype): run_config(folder, folder / "t", *words[1:], f"train.dtype={dtype}", family=words[0])
        for (name, words), dtype in product(MODELS.items(), ("fp32", "bf16"))
    }

    def make(model, dtype="fp32", batch=(8, 2), **parallel):
        config = with_layout(known[model, dtype], parallel)
        sizes = {"global_batch_size": batch[0] * batch[1], "micro_batch_size": batch[1]}
        return config.model_copy(update={"train": config.train.model_copy(update=sizes)})

    return make


layouts = st.fixed_dictionaries(
    {
        "tensor": st.integers(1, 8),
        "pipeline": st.integers(1, 5),
        "sequence": st.integers(1, 2),
        "zero_stage": st.integers(0, 3),
        "tensor_sequence": st.booleans(),
        "pipeline_schedule": st.sampled_from(["1f1b", "dualpipev"]),
        "pipeline_split": st.sampled_from([None, None, (1, 1), (1, 2), (2, 2)]),
    }
)


def runs(config, world_size):
    """By the two functions that a run itself asks."""
    try:
        check_layout(config)
        if world_size is not None:
            plan_batches(config, world_size)
    except ConfigError:
        return False
    return True


def refused(config):
    return any(rule.applies(config) for rule in REFUSALS)


def divides(config, world_size):
    parallel, train = config.parallel, config.train
    data_parallel, rest = divmod(world_size, parallel.tensor * parallel.pipeline * parallel.sequence)
    return not rest and train.global_batch_size % (data_parallel * train.micro_batch_size) == 0


def everything(config, world_size):
    """Every layout over the values that are looked at, and the configuration's own."""
    values = {
        key: {getattr(config.parallel, key), *choice.values(config, world_size)} for key, choice in CHOICES.items()
    }
    if world_size is None:  # too many for a test; what is larger is farther
        values |= {key: {v for v in values[key] if v <= 8} for key in ("tensor", "pipeline", "sequence")}
    for chosen in product(*values.values()):
        yield dict(zip(CHOICES, chosen, strict=True))


def how_far(config, layout):
    """(keys that differ, product of the ratios), by this test's own arithmetic."""
    before, factor, changed = config.parallel, Fraction(1), 0
    for key, value in layout.items():
        old = getattr(before, key)
        if value == old:
            continue
        changed += 1
        if key in ("tensor", "pipeline", "sequence"):
            factor *= Fraction(max(old, value), min(old, value))
        else:
            factor *= 2 ** abs(old - value) if key == "zero_stage" else 2
    return changed, factor


@settings(max_examples=60)
@given(
    model=st.sampled_from(sorted(MODELS)),
    dtype=st.sampled_from(["fp32", "bf16"]),
    batch=st.tuples(st.integers(1, 12), st.integers(1, 3)),
    layout=layouts,
    world_size=st.sampled_from([None, 1, 2, 3, 4, 6, 8, 12]),
)
def test_suggestions_run_and_none_that_runs_is_nearer(model, dtype, batch, layout, world_size, configured):
    config = configured(model, dtype, batch, **layout)
    suggested = nearest_layouts(config, world_size, lambda candidate: is_legal(candidate, world_size))
    assert len(suggested) <= 2
    for values in suggested:
        changed = with_layout(config, values)
        assert runs(changed, world_size)
        assert values
        assert all(getattr(config.parallel, key) != value for key, value in values.items())
    own = {key: getattr(config.parallel, key) for key in CHOICES}
    distances = sorted(
        how_far(config, other)
        for other in everything(config, world_size)
        if other != own and is_legal(with_layout(config, other), world_size)
    )
    assert [how_far(config, values) for values in suggested] == distances[:2]
    if not runs(config, world_size):
        with pytest.raises(ConfigError) as refused:
            check_layout(config) if world_size is None else plan_batches(config, world_size)
        expected = f": {in_words(config, suggested)}" if suggested else "with the rest of the configuration as it is"
        assert str(refused.value).endswith(expected)


@pytest.mark.parametrize(
    ("layout", "world_size", "told"),
    [
        (
            {"pipeline": 2, "zero_stage": 3},
            8,
            "nearest layouts that run: parallel.pipeline=1 parallel.zero_stage=3, "
            "or parallel.pipeline=2 parallel.zero_stage=1",
        ),
        ({"tensor": 3}, None, "nearest layouts that run: parallel.tensor=4, or parallel.tensor=2"),
        ({"tensor": 3}, 4, "nearest layouts that run: parallel.tensor=4, or parallel.tensor=2"),
        (
            {"tensor_sequence": True},
            None,
            "nearest layouts that run: parallel.tensor=2 parallel.tensor_sequence=true, "
            "or parallel.tensor=1 parallel.tensor_sequence=false",
        ),
        (
            {"pipeline": 2, "pipeline_split": (1, 1)},
            2,
            "nearest layouts that run: parallel.pipeline_split=null, "
            "or parallel.pipeline=1 parallel.pipeline_split=null",
        ),
    ],
)
def test_a_refusal_keeps_its_reason_and_ends_with_the_nearest_layouts(layout, world_size, told, configured):
    config = configured("gpt2", batch=(16, 1), **layout)
    with pytest.raises(ConfigError) as refused:
        check_layout(config, world_size)
    (rule,) = [rule for rule in REFUSALS if rule.applies(config)]
    message = str(refused.value)
    assert message.startswith(f"{rule.reason}; use {rule.instead}; nearest layouts that run: ")
    if "pipeline_split" not in layout:
        assert message.endswith(told)


def test_one_layout_or_none_is_said_as_such(configured):
    with pytest.raises(ConfigError, match=r"; nearest layout that runs: parallel.pipeline=3$"):
        plan_batches(configured("gpt2", batch=(1, 1)), 3)
    with pytest.raises(ConfigError, match=r"; no layout of 7 processes runs with the rest of the configuration as it"):
        plan_batches(configured("llama", batch=(1, 1)), 7)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("world_size", [1, 2, 4, 6, 8])
def test_the_allowed_layouts_are_all_that_run(model, world_size, configured):
    config = configured(model, batch=(24, 1))
    found = [layout.parallel for layout in allowed_layouts(config, world_size)]
    degrees = [degree for degree in range(1, world_size + 1) if world_size % degree == 0]
    expected = [
        with_layout(config, dict(zip(KEYS, c, strict=True)))
        for c in product(degrees, degrees, degrees, (False, True), range(4))
    ]
    expected = [layout.parallel for layout in expected if divides(layout, world_size) and not refused(layout)]
    assert found == expected
    assert all(one not in found[:place] for place, one in enumerate(found))
    assert {layout.zero_stage for layout in found} == {0, 1, 2, 3}
    assert list(allowed_layouts(config, world_size, keys=())) == [config]


def test_an_allowed_layout_changes_nothing_else(configured):
    config = configured("gpt2")
    for layout in allowed_layouts(config, 4):
        assert layout.model_copy(update={"parallel": config.parallel}) == config


def test_schedules_are_varied_where_asked_for(configured):
    config = configured("mqa", batch=(24, 1))
    keys = ("pipeline", "pipeline_schedule")
    found = [(one.parallel.pipeline, one.parallel.pipeline_schedule) for one in allowed_layouts(config, 4, keys)]
    assert found == [(1, "1f1b"), (2, "1f1b"), (2, "dualpipev"), (4, "1f1b")]
