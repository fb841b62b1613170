"""Requests that are built with kept templates are lm-eval's own, to the byte."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import lm_eval.utils
import numpy as np
import pytest
from lm_eval.api.instance import Instance

from evals.backend import MegaGPTLM
from evals.prompts import kept_templates
from evals.scoring import quiet_bars
from evals.task_loader import LoadedTask, load_task, plan_from_folders, plan_task
from tests.evals.conftest import SHARED
from tests.evals.fixtures import HUB_IDS, write_all

TASKS = [
    ("arc_easy", 0),
    ("arc_challenge", 3),
    ("hellaswag", 0),
    ("mmlu_anatomy", 5),
    ("gsm8k", 5),
    ("truthfulqa_mc1", 0),
    ("truthfulqa_mc2", 0),
    ("winogrande", 2),
    ("piqa", 1),
    ("lambada_openai", 0),
    ("boolq", 1),
    ("openbookqa", 1),
]
Around = Callable[[], AbstractContextManager[None]]


def fields(instance: Instance) -> dict[str, Any]:
    """All that a request holds, and the hash that samples are told apart by."""
    return {**vars(instance), "prompt_hash": lm_eval.utils.hash_string(instance.arguments[0])}


def built(load: Callable[[], LoadedTask], limit: int | None, around: Around) -> list[dict[str, Any]]:
    with quiet_bars():
        loaded = load()
        with around():
            for task in loaded.tasks.values():
                task.build_all_requests(limit=limit)
    return [fields(instance) for task in loaded.tasks.values() for instance in task.instances]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    out = tmp_path_factory.mktemp("benchmarks")
    return out, write_all(out / "hub")


@pytest.mark.parametrize(("task", "shots"), TASKS)
def test_requests_are_those_of_lm_eval(folders, task: str, shots: int) -> None:
    out, hub = folders
    plan = plan_from_folders(task, {HUB_IDS[task]: hub[task]}, out / "cache")

    def load() -> LoadedTask:
        return load_task(plan, shots, check_counts=False)

    theirs = built(load, None, nullcontext)
    assert len(theirs) >= 8
    assert built(load, None, kept_templates) == theirs
    prompts = {str(each["arguments"][0]) for each in theirs}
    assert len(prompts) > 4  # each document its own: a template that kept what it rendered would be seen


@pytest.mark.parametrize(("task", "shots"), [("mmlu_anatomy", 5), ("gsm8k", 5), ("truthfulqa_mc2", 0)])
def test_samples_with_their_hashes_are_those_of_lm_eval(folders, lm: MegaGPTLM, task: str, shots: int) -> None:
    out, hub = folders
    plan = plan_from_folders(task, {HUB_IDS[task]: hub[task]}, out / "cache")
    found = []
    for around in (nullcontext, kept_templates):
        with quiet_bars(), around():
            loaded = load_task(plan, shots, check_counts=False)
            for each in loaded.tasks.values():
                if each.OUTPUT_TYPE == "generate_until":
                    each.set_config("generation_kwargs", {"max_gen_toks": 4}, update=True)
            found.append(lm_eval.evaluator.evaluate(lm, {"tasks": loaded.tasks, "groups": {}}, bootstrap_iters=0))
    assert found[0]["samples"] == found[1]["samples"]
    assert found[0]["results"] == found[1]["results"]
    assert {"doc_hash", "prompt_hash", "target_hash"} <= found[0]["samples"][task][0].keys()


@pytest.mark.exhaustive
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not here")
@pytest.mark.parametrize(
    ("task", "shots", "limit"),
    [
        ("arc_easy", 0, 300),
        ("arc_challenge", 5, 100),
        ("hellaswag", 0, 300),
        ("mmlu_anatomy", 5, None),
        ("mmlu_moral_scenarios", 5, 60),
        ("mmlu_professional_law", 5, 60),
        ("gsm8k", 5, 100),
        ("truthfulqa_mc1", 0, None),
        ("truthfulqa_mc2", 0, None),
    ],
)
def test_requests_over_real_data_are_those_of_lm_eval(tmp_path: Path, task: str, shots: int, limit: int | None) -> None:
    with quiet_bars():
        plan = plan_task(task, SHARED, tmp_path / "cache")

    def load() -> LoadedTask:
        return load_task(plan, shots, check_counts=False)

    theirs = built(load, limit, nullcontext)
    assert len(theirs) >= 60
    assert built(load, limit, kept_templates) == theirs


def test_a_template_is_compiled_once_and_lm_eval_is_as_it_was_after(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_text = lm_eval.utils.env.compile
    monkeypatch.setattr(
        lm_eval.utils.env,
        "compile",
        lambda text, *rest, **more: compiled.append(text) or compile_text(text, *rest, **more),
    )
    original = lm_eval.utils.apply_template
    with kept_templates():
        for n in range(5):
            assert lm_eval.utils.apply_template("{{n}} of {{ 1 + 1 }}", {"n": n}) == f"{n} of 2"
            assert lm_eval.utils.apply_template("{{n}}!\n", {"n": n}) == f"{n}!\n"
    assert compiled == ["{{n}} of {{ 1 + 1 }}", "{{n}}!\n"]
    with pytest.raises(TypeError), kept_templates():
        lm_eval.utils.apply_template("{{n + 1}}", {"n": "text"})
    assert lm_eval.utils.apply_template is original
    lm_eval.utils.apply_template("{{n}}!\n", {"n": 1})
    assert len(compiled) == 4


TEMPLATES = [
    "{% set s = namespace(n=0) %}{% for c in choices %}{% set s.n = s.n + c|length %}{% endfor %}{{s.n}}{{question}}",
    "{% set question = question|trim %}{{question}}{% if choices|length > 1 %} or {{choices[1]}}{% endif %}",
    "{{question|regex_replace('[aeiou]', '-')}}{{cycler('a', 'b').next()}}",
    "{% macro name(i) %}{{'ABCD'[i]}}{% endmacro %}{% for c in choices %}{{name(loop.index0)}}: {{c}}\n{% endfor %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_kept_template_remembers_nothing_of_what_it_rendered(template: str) -> None:
    rng = random.Random(0)
    docs = [
        {"question": f" why {n}? ", "choices": [f"c{rng.random()}" for _ in range(rng.randrange(1, 5))]}
        for n in range(9)
    ]
    theirs = [lm_eval.utils.apply_template(template, doc) for doc in docs]
    with kept_templates():
        assert [lm_eval.utils.apply_template(template, doc) for doc in docs] == theirs
    assert len(set(theirs)) == 9


def test_an_unknown_name_is_lm_evals_own_error() -> None:
    with kept_templates(), pytest.raises(Exception, match="'answer' is undefined") as ours:
        lm_eval.utils.apply_template("{{answer}}", {"question": np.int64(1)})
    with pytest.raises(type(ours.value), match="'answer' is undefined"):
        lm_eval.utils.apply_template("{{answer}}", {"question": np.int64(1)})
