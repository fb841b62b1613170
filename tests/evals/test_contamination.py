"""Benchmark documents in a run's own token files: planted ones are found, others are not."""

from __future__ import annotations

import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from evals.contamination import ContaminationRequest, find_contamination
from evals.contamination_file import read_contamination
from evals.contamination_scan import scan_all, words_in_windows, write_index
from evals.items import collect_items
from megagpt.cli import main
from megagpt.config.load import dump_config
from megagpt.config.schema import TrainingRun
from megagpt.data.indexed import TokenFileWriter
from megagpt.data.manifest import Manifest, describe_file, write_manifest
from megagpt.errors import EvalError
from megagpt.text.ngrams import item_ngrams
from megagpt.text.word_hashes import hash_words, ngram_hashes
from tests.evals.fixtures import write_all

SUITES = Path(__file__).resolve().parents[2] / "configs" / "evals"
QUIET = Console(file=io.StringIO())
FILLER = " ".join(f"Line {i} of a text about the weather in the hills, with nothing else in it." for i in range(40))


def write_tokens(prefix, tokenizer, documents):
    """A .bin/.idx pair with its manifest and tokenizer, as a data job leaves it."""
    with TokenFileWriter(prefix, "<u2") as writer:
        for document in documents:
            writer.add_document([*tokenizer.encode(document), tokenizer.eot_id])
    tokenizer.save(prefix.parent / "tokenizer")
    entry = describe_file(prefix, text_bytes=sum(len(document.encode()) for document in documents), sources={})
    write_manifest(prefix.parent, Manifest(tokenizer.describe(), {prefix.name: entry}, {}, ""))
    return prefix


def write_run(run_dir, prefix):
    run_dir.mkdir(parents=True)
    config = {
        "run": {"dir": run_dir},
        "model": {"family": "gpt2", "n_layer": 1, "n_head": 1, "d_model": 8},
        "data": {"train": prefix},
        "optim": {"lr": 1e-3},
        "train": {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
    }
    (run_dir / "config.yaml").write_text(dump_config(TrainingRun.model_validate(config)))
    return run_dir


@pytest.fixture(scope="module")
def smoke():
    """Texts of the documents of a task that needs no data folder; these are long enough to be told."""
    texts = {row["id"]: row["texts"] for row in collect_items(("megagpt_smoke",), None, SUITES).items}
    assert all(len(texts[i][0].split()) >= 5 for i in (1, 2, 3, 7, 9))
    return texts


def find(tmp_path, tokenizer, documents, **options):
    prefix = write_tokens(tmp_path / "data" / "tokens_train", tokenizer, documents)
    request = ContaminationRequest(
        ("megagpt_smoke",), run_dir=write_run(tmp_path / "run", prefix), suites_dir=SUITES, **options
    )
    return find_contamination(request, QUIET)


def test_planted_documents_are_found_in_other_case_and_punctuation_and_others_are_not(tmp_path, tokenizer, smoke):
    planted = {3: smoke[3][0], 7: re.sub(r"\s+", " -- ", smoke[7][0].upper())}
    documents = [FILLER, f"{FILLER} {planted[3]} {FILLER}", FILLER, planted[7], planted[3]]
    path = find(tmp_path, tokenizer, documents)
    assert path == tmp_path / "run" / "evals" / "contamination.json"
    table = json.loads(path.read_text())
    (task,) = table["tasks"].values()
    assert task["dirty"] == [3, 7]
    assert sorted([*task["dirty"], *task["clean"], *task["not_matchable"]]) == sorted(smoke)
    assert task["items"] == len(smoke)
    rows = {row["id"]: row for row in table["found"]}
    assert (rows[3]["documents"], rows[7]["documents"]) == (2, 1)
    assert rows[3]["share"] == 1.0
    prefix = tmp_path / "data" / "tokens_train"
    assert rows[3]["examples"] == [f"{prefix}:1", f"{prefix}:4"]
    assert table["scanned"][0]["documents"] == 5
    assert read_contamination(path).tasks["megagpt_smoke"].dirty == {"3", "7"}


def test_words_that_stand_apart_and_documents_cut_in_two_are_no_leak(tmp_path, tokenizer, smoke):
    words = smoke[3][0].split()
    halves = [" ".join(words[: len(words) // 2]), " ".join(words[len(words) // 2 :])]
    path = find(tmp_path, tokenizer, [*halves, " and ".join(words)])
    assert read_contamination(path).tasks["megagpt_smoke"].dirty == frozenset()


def test_two_processes_find_what_one_finds(tmp_path, tokenizer, smoke):
    documents = [FILLER, smoke[9][0], f"{smoke[2][0]} {FILLER}"]
    one = find(tmp_path / "one", tokenizer, documents)
    prefix = tmp_path / "one" / "data" / "tokens_train"
    run = tmp_path / "one" / "run"
    two = find_contamination(
        ContaminationRequest(
            ("megagpt_smoke",), run_dir=run, processes=2, suites_dir=SUITES, out=tmp_path / "two.json"
        ),
        QUIET,
    )
    assert one.read_text() == two.read_text()
    # Two files are two pieces of work, for two processes; naming one twice does not count it twice.
    other = write_tokens(prefix.parent / "more", tokenizer, [smoke[9][0], FILLER, smoke[7][0]])
    both = find_contamination(
        ContaminationRequest(
            ("megagpt_smoke",),
            tokens=(prefix, other, prefix),
            processes=2,
            suites_dir=SUITES,
            out=tmp_path / "both.json",
        ),
        QUIET,
    )
    rows = {row["id"]: row for row in json.loads(both.read_text())["found"]}
    assert {name: row["documents"] for name, row in rows.items()} == {2: 1, 7: 1, 9: 2}
    assert rows[9]["examples"] == [f"{other}:0", f"{prefix}:1"]


def test_the_tasks_of_local_data_are_told_apart_from_other_data_by_their_hash(tmp_path, tokenizer):
    write_all(tmp_path / "hub")
    prefix = write_tokens(tmp_path / "data" / "t", tokenizer, ["anatomy: " + "What do we read? books. " * 3])
    request = ContaminationRequest(
        ("mmlu_anatomy",), data_dir=tmp_path / "hub", tokens=(prefix,), out=tmp_path / "c.json", suites_dir=SUITES
    )
    table = read_contamination(find_contamination(request, QUIET))
    assert re.fullmatch(r"[0-9a-f]{32,64}", table.data["mmlu_anatomy"])
    assert set(table.tasks) == {"mmlu_anatomy"}


# ---- against a search by tuples of words

WORDS = ["oak", "Elm", "fir", "yew", "ash", "Birch", "pine"]
sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=24).map(" ".join)


def tuples_of(text, length):
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def brute_force(items, documents):
    """Item -> (documents, most different runs in one of them), by the rule of megagpt/text/ngrams.py."""
    found = {}
    for number, text in enumerate(items):
        n_words = len(text.split())
        length = 13 if n_words >= 13 else 8 if n_words >= 8 else n_words
        if n_words < 5:
            continue
        shared = [len(tuples_of(text, length) & tuples_of(document, length)) for document in documents]
        if any(shared):
            found[number] = (sum(map(bool, shared)), max(shared))
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(sentences, min_size=1, max_size=6), st.lists(st.lists(sentences, max_size=3), max_size=5), st.data())
def test_the_scan_finds_what_a_search_by_tuples_finds(tmp_path_factory, tokenizer, items, around, data):
    documents = []
    for parts in around:
        planted = data.draw(st.one_of(st.just(""), st.sampled_from(items)))
        documents.append(", ".join([*parts, planted, *parts]) + ".")
    folder = tmp_path_factory.mktemp("scan")
    prefix = write_tokens(folder / "t", tokenizer, documents)
    tasks = [f"task{i}" for i in range(len(items))]  # each its own: nothing is a task's wording
    write_index(folder, [item_ngrams([item]) for item in items], tasks)
    found = scan_all([prefix], folder, folder / "tokenizer", 1, lambda _: None)
    assert found.documents == len(documents)
    assert {item: (hit.documents, hit.ngrams) for item, hit in found.items.items()} == brute_force(items, documents)


def test_wording_that_many_documents_of_a_task_share_makes_none_of_them_dirty(tmp_path, tokenizer):
    wording = "choose the one option among those below that best completes the following sentence"
    items = [f"{wording} number{i} tree{i} house{i}" for i in range(20)]
    prefix = write_tokens(tmp_path / "t", tokenizer, [f"{wording} and so on", items[4]])
    kept = write_index(tmp_path, [item_ngrams([item]) for item in items], ["quiz"] * 20)
    assert set(kept) == {3}  # 16 words have four runs of 13; the first is the wording
    found = scan_all([prefix], tmp_path, tmp_path / "tokenizer", 1, lambda _: None)
    assert list(found.items) == [4]
    alone = tmp_path / "alone"
    alone.mkdir()
    write_index(alone, [item_ngrams([item]) for item in items], [f"quiz{i}" for i in range(20)])
    assert len(scan_all([prefix], alone, tmp_path / "tokenizer", 1, lambda _: None).items) == 20


@pytest.mark.parametrize("window", [64, 100, 257])
def test_a_long_document_in_windows_has_the_runs_of_words_of_the_whole(tokenizer, window):
    random = np.random.default_rng(window)
    text = " ".join(random.choice([*WORDS, "straße", "naïve", "日本", "x1"], 400))
    tokens = np.array(tokenizer.encode(text))
    whole = set(ngram_hashes(hash_words(text).hashes, 5).tolist())
    windows = list(words_in_windows(tokens, tokenizer, window, 50))
    assert len(windows) > 3
    found = set(itertools.chain.from_iterable(ngram_hashes(words, 5).tolist() for words in windows))
    assert found == whole


# ---- a data job's list, and what is refused


def test_a_data_jobs_list_stands_in_for_a_scan_and_is_counted_beside_one(tmp_path, tokenizer, smoke):
    listed = tmp_path / "contaminated_items.jsonl"
    listed.write_text('{"task": "megagpt_smoke", "id": 2, "documents": 4}\n')
    path = find(tmp_path, tokenizer, [smoke[7][0]], listed=listed)
    found = read_contamination(path)
    assert found.tasks["megagpt_smoke"].dirty == {"2"}
    assert str(listed) in found.where
    scanned = find_contamination(
        ContaminationRequest(
            ("megagpt_smoke",),
            tokens=(tmp_path / "data" / "tokens_train",),
            listed=listed,
            out=tmp_path / "both.json",
            suites_dir=SUITES,
        ),
        QUIET,
    )
    both = read_contamination(scanned)
    assert both.tasks["megagpt_smoke"].dirty == {"7"}
    assert both.listed == {"megagpt_smoke": 1}
    listed.write_text('{"task": "x"}\n')
    with pytest.raises(EvalError, match=r"contaminated_items\.jsonl:1: not a line"):
        find_contamination(
            ContaminationRequest(("megagpt_smoke",), listed=listed, out=tmp_path / "o", suites_dir=SUITES), QUIET
        )


def test_the_command_says_what_it_found_and_wrong_input_what_to_do(tmp_path, tokenizer, smoke):
    find(tmp_path, tokenizer, [smoke[1][0], FILLER])
    run = ["eval", "contamination", "--tasks", "megagpt_smoke", "--processes", "1"]
    result = CliRunner().invoke(main, [*run, "--checkpoint", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    short = sum(len(texts[0].split()) < 5 for texts in smoke.values())
    assert f"megagpt_smoke: 1 of {len(smoke) - short} dirty" in result.output
    assert f"{short} too short to tell" in result.output
    for words, message in [
        (["--checkpoint", str(tmp_path / "none")], "is not a run's folder"),
        ([], "nowhere to write to"),
        (["--out", str(tmp_path / "o.json")], "nothing to look in"),
        (["--out", str(tmp_path / "o.json"), "--tokens", str(tmp_path / "no")], "no manifest.json beside"),
    ]:
        refused = CliRunner().invoke(main, [*run, *words])
        assert refused.exit_code == 2
        assert message in refused.output
    (tmp_path / "run" / "evals" / "contamination.json").write_text('{"format": 7}')
    with pytest.raises(EvalError, match="format 7, expected 1"):
        read_contamination(tmp_path / "run" / "evals" / "contamination.json")
