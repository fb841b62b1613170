"""Published scores: the file is in order, and only what is comparable is picked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from evals.baselines import (
    BASELINES_FILE,
    COMPUTE_FACTOR,
    PARAMETERS_FACTOR,
    load_baselines,
    training_flops,
)
from megagpt.errors import EvalError

RESEARCH = Path(__file__).resolve().parents[2].parent / "shared" / "research" / "baselines.json"
BASELINES = load_baselines()
CHECKED = "4fe73e61452dcc8bed3d5955838036fa7fc74851d04e66081f8638276401aabd"
"""sha256 of the published rows and models."""


def pick(task="arc_easy", metric="acc", shots=0, parameters=160_000_000, tokens=300_000_000_000):
    return BASELINES.neighbours(task, metric, shots, parameters=parameters, tokens=tokens)


def test_a_score_is_compared_with_the_same_metric_shots_and_definition_only():
    for task, metric, shots in [("arc_easy", "acc", 0), ("arc_easy", "acc_norm", 5), ("hellaswag", "acc_norm", 0)]:
        found = pick(task, metric, shots)
        assert found.comparable
        for score in (*found.comparable, *found.equal_parameters, *found.equal_compute):
            assert (score.task, score.metric, score.shots, score.definition) == (task, metric, shots, "lm_eval")


def test_models_of_equal_size_and_of_equal_compute():
    found = pick()
    names = [score.model.name for score in found.equal_parameters]
    assert names[0] == "Pythia-160M"
    assert {"OPT-125M", "Cerebras-GPT-111M"} <= set(names)
    assert all(1 / PARAMETERS_FACTOR <= s.model.parameters / 160e6 <= PARAMETERS_FACTOR for s in found.equal_parameters)
    ours = training_flops(160e6, 300e9)
    assert ours == 2.88e20
    names = [score.model.name for score in found.equal_compute]
    assert names[0] == "Pythia-160M"
    assert "Cerebras-GPT-1.3B" in names
    assert "Pythia-12B" not in names  # equal compute would be 4 of its 300 thousand million tokens
    assert all(1 / COMPUTE_FACTOR <= score.flops / ours <= COMPUTE_FACTOR for score in found.equal_compute)
    assert found.nearest.model.name == "Pythia-160M"


def test_a_young_run_is_compared_with_published_checkpoints_of_like_compute():
    """70 million parameters on a thousand million tokens: no finished model is that young, Pythia's checkpoints are."""
    found = pick(parameters=70_426_624, tokens=10**9)
    by_name = {score.model.name: score for score in found.equal_compute}
    assert by_name["Pythia-70M"].step == 512  # 512 x 2,097,152 tokens = 1.07 thousand million
    assert by_name["Pythia-70M"].label == "Pythia-70M at step 512"
    assert all(score.step is not None for score in found.equal_compute)


def test_where_nothing_is_of_this_size_the_nearest_is_named_and_no_more():
    found = pick(parameters=1_000_000, tokens=10_000_000)
    assert found.equal_parameters == ()
    assert found.equal_compute == ()
    assert found.nearest.model.name == "Pythia-70M"
    assert pick(parameters=None, tokens=None).nearest is None


def test_mmlu_of_other_prompts_is_never_comparable_and_the_reason_is_given():
    found = pick("mmlu", "acc", 5)
    assert found.comparable == found.equal_compute == ()
    reasons = dict(found.not_comparable)
    assert reasons["defined otherwise: hendrycks_test"] >= 8
    assert BASELINES.trajectory("mmlu", "acc", 5, 10**8) is None
    assert all(reason.startswith("defined otherwise") for _, reason in found.apart if _.definition != "lm_eval")


def test_other_shots_and_metrics_stand_apart_with_the_reason():
    reasons = {(score.model.name, reason) for score, reason in pick(metric="acc_norm").apart}
    assert ("Pythia-160M", "acc is not acc_norm") in reasons
    assert ("Pythia-160M", "5 shots, ours has 0 shots") in reasons
    assert ("GPT-3 Small", "defined otherwise: gpt3_paper") in reasons
    unknown = pick(shots=None)
    assert unknown.comparable == ()


def test_the_trajectory_is_that_of_the_nearest_size():
    found = BASELINES.trajectory("arc_easy", "acc", 0, 350_000_000)
    assert found.model.name == "Pythia-410M"
    final = next(
        s
        for s in BASELINES.scores
        if (s.model.name, s.task, s.metric, s.shots) == ("Pythia-410M", "arc_easy", "acc", 0)
    )
    assert found.values[-1] == pytest.approx(final.value, abs=5e-4)
    assert found.tokens()[-1] == found.model.tokens == 299_892_736_000
    assert BASELINES.trajectory("arc_easy", "acc", 5, 350_000_000) is None


ARC = '"arc_challenge", "acc", 0, '
OPT = '["OPT-125M", "arc_easy", "acc", 0'


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"format": 1', '"format": 2', "format 2, expected 1"),
        (f'["Pythia-70M", {ARC}"lm_eval"', f'["Pythia-70M", {ARC}"own"', "unknown definition 'own'"),
        (f'["Pythia-70M", {ARC}', f'["Pythia-71M", {ARC}', "Pythia-71M"),
        (f'{OPT}, "lm_eval", 0', f'{OPT}, "lm_eval", 43', "is no share"),
        (OPT.replace("125", "350"), OPT, "is there 2 times"),
        ('"tokens": 299892736000', '"tokens": "300B"', "must be whole numbers"),
    ],
)
def test_a_damaged_file_is_refused_with_the_place(tmp_path, before, after, message):
    text = BASELINES_FILE.read_text()
    assert before in text
    path = tmp_path / "baselines.json"
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(EvalError, match=message):
        load_baselines(path)


def test_every_definition_and_source_is_used():
    assert {score.definition for score in BASELINES.scores} == set(BASELINES.definitions)
    used = {score.source for score in (*BASELINES.scores, *BASELINES.trajectories)}
    assert used == set(BASELINES.sources)


@pytest.mark.skipif(not RESEARCH.is_file(), reason="no shared/research/baselines.json beside the checkout")
def test_every_number_is_one_that_was_collected_of_this_model_metric_and_shots():
    collected = {
        (row["model"], row["task"], row["metric"], row["num_fewshot"], row["value"], row["stderr"])
        for row in json.loads(RESEARCH.read_text())
    }
    for score in BASELINES.scores:
        places = {
            (model, task, metric, score.shots, score.value, score.stderr)
            for model in collected_models(score.model.name)
            for task in (score.task, f"{score.task}(completion,token-mean)")
            for metric in collected_metrics(score.task, score.metric, score.definition)
        }
        assert places & collected, score


def collected_models(name: str) -> tuple[str, ...]:
    """Names of a model in the collection."""
    kept = {"GPT-2 124M": "gpt2", "GPT-2 355M": "gpt2-medium", "GPT-2 774M": "gpt2-large", "GPT-2 1.5B": "gpt2-xl"} | {
        "Pythia-1B": "EleutherAI/pythia-1b-bf16",
        "llm.c 774M": "llm.c-774M (README example)",
    }
    if name in kept:
        return (kept[name], "Pythia-1.0B") if name == "Pythia-1B" else (kept[name],)
    if name.startswith("Pythia-"):
        return (f"EleutherAI/{name.lower()}",)
    if name.startswith("Cerebras-"):
        return (f"cerebras/{name}",)
    if name.startswith("OPT-"):
        return (name.lower(),)
    return (name.replace("TinyLlama-1.1B ", "TinyLlama-1.1B-"),)


def collected_metrics(task: str, metric: str, definition: str) -> tuple[str, ...]:
    """Names of a metric in the collection; TinyLlama's table has one column for two of them."""
    if definition == "gpt3_paper" and metric == "acc":
        return ("acc (GPT-3 normalisation)",)
    if definition == "hendrycks_test":
        return ("acc (unweighted mean of 57 hendrycksTest-*)",)
    if metric == "perplexity":
        return ("ppl",)
    if task == "gsm8k":
        return ("acc",)
    if task == "truthfulqa_mc2":
        return ("mc2", "acc")
    column = "acc_norm (acc for winogrande/boolq)"
    is_in_it = metric == ("acc" if task in ("winogrande", "boolq") else "acc_norm")
    return (metric, column) if is_in_it else (metric,)


def test_no_row_has_changed_since_all_of_them_were_compared_with_the_collection():
    """For where the collection is not at hand: whoever changes a row runs the test above and writes the new hash."""
    content = json.loads(BASELINES_FILE.read_text())
    rows = json.dumps([sorted(map(json.dumps, content["scores"])), content["models"]], sort_keys=True)
    assert hashlib.sha256(rows.encode()).hexdigest() == CHECKED
