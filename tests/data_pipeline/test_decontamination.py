"""Decontamination: the index and the search against tuples of words in plain Python, and the real benchmarks."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.decontamination.apply import decontaminate
from data_pipeline.decontamination.contaminated import CONTAMINATION_SCHEMA, write_contamination
from data_pipeline.decontamination.index import write_index
from data_pipeline.decontamination.items import read_items
from data_pipeline.decontamination.match import Index
from data_pipeline.decontamination.ngram_table import NgramTable
from megagpt.errors import DataError
from megagpt.text.word_hashes import hash_words, ngram_hashes

GSM8K = Path(__file__).resolve().parents[2].parent / "shared/data/evals/gsm8k/test.jsonl"
WORDS = [*"abcdefgh", "Ä", "straße", "İx", "ΟΔΟΣ", "x_1", "42"]
SENTENCE = "Natalia sold clips to forty eight of her friends in April and then she sold half as many in May."
CLEAN = " ".join(f"Line {i} of a text about the weather in the hills, with nothing else in it." for i in range(40))

relaxed = settings(deadline=None)  # the first call compiles


def make_index(folder, *items, ngram=13):
    """Items are (task, id, text, ...)."""
    rows = [{"task": task, "id": name, "texts": texts} for task, name, *texts in items]
    file = folder / "items.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = folder / "index"
    out.mkdir()
    counts = write_index(out, (file,), ngram)
    return Index.open(out), counts


def lower(letter):
    """The Turkish capital I and the final sigma, each without a look at what follows."""
    return {"\u0130": "i", "\u03a3": "\u03c3", "\u03c2": "\u03c3"}.get(letter, letter.lower())


def words_of(text):
    """(word, start, end) by the definition that the rest of the pipeline uses, letter by letter."""
    return [("".join(map(lower, m.group())), m.start(), m.end()) for m in re.finditer(r"\w+", text)]


def ngrams_of(text, length):
    words = [word for word, _, _ in words_of(text)]
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


# ---- words


@relaxed
@given(st.text(max_size=60))
@example("İstanbul İ ΑΣ Σ b\u0345Σ_a 12 ẞ \ud800x")
@example("")
def test_words_and_their_places_are_those_of_the_regular_expression(text):
    found = hash_words(text)
    expected = words_of(text)
    assert list(zip(found.starts.tolist(), found.ends.tolist(), strict=True)) == [(a, b) for _, a, b in expected]
    by_word = {}
    for (word, _, _), value in zip(expected, found.hashes.tolist(), strict=True):
        assert by_word.setdefault(word, value) == value
    assert len(set(by_word.values())) == len(by_word)


def test_ascii_and_wide_texts_give_a_word_the_same_hash():
    assert hash_words("Weather").hashes[0] == hash_words("é weather").hashes[1]


@relaxed
@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(1, 13))
def test_runs_of_words_have_one_hash_each_wherever_they_stand(letters, length):
    hashes = ngram_hashes(hash_words(" ".join(letters)).hashes, length).tolist()
    runs = [tuple(letters[i : i + length]) for i in range(len(letters) - length + 1)]
    assert len(hashes) == len(runs)
    assert len(set(zip(runs, hashes, strict=True))) == len(set(runs)) == len(set(hashes))


def test_no_two_of_three_hundred_thousand_runs_share_a_hash():
    """All runs of up to seven words over six words: the repetitive kind that a polynomial is weak for."""
    vocabulary = hash_words("a b c d e f").hashes
    hashes = []
    for length in range(1, 8):
        runs = np.array(list(itertools.product(range(6), repeat=length)))
        hashes.append(ngram_hashes(vocabulary[runs.ravel()], length)[::length])
    everything = np.concatenate(hashes)
    assert len(np.unique(everything)) == len(everything) == sum(6**n for n in range(1, 8))


# ---- index and search


def ngrams_that_count(texts, ngram):
    sizes = [len(words_of(one)) for one in texts]
    longest = max(sizes)
    used = ngram if longest >= ngram else 8 if longest >= 8 else longest
    if longest < 5:
        return set()
    lengths = [used if size >= used else size if size >= 8 else None for size in sizes]
    return {run for one, n in zip(texts, lengths, strict=True) if n is not None for run in ngrams_of(one, n)}


def brute_force(items, text, ngram):
    """Passages (start, end) and items with their numbers of n-grams, by tuples of words."""
    words = words_of(text)
    spans, counts = [], {}
    for number, texts in enumerate(items):
        found = set()
        for run in ngrams_that_count(texts, ngram):
            places = [i for i in range(len(words)) if tuple(word for word, _, _ in words[i : i + len(run)]) == run]
            spans += [(words[i][1], words[i + len(run) - 1][2]) for i in places]
            found |= {run} if places else set()
        if found:
            counts[number] = len(found)
    merged = []
    for start, end in sorted(spans):
        if merged and start < merged[-1][1]:
            merged[-1][1] = max(end, merged[-1][1])
        else:
            merged.append([start, end])
    return [tuple(span) for span in merged], sorted(counts.items())


sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=24).map(" ".join)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(sentences, min_size=1, max_size=2), min_size=1, max_size=5),
    st.lists(sentences, max_size=4),
    st.data(),
    st.sampled_from([5, 9, 13]),
)
def test_the_search_finds_what_a_search_by_tuples_of_words_finds(tmp_path_factory, items, between, data, ngram):
    index, _ = make_index(
        tmp_path_factory.mktemp("index"), *(("t", i, *texts) for i, texts in enumerate(items)), ngram=ngram
    )
    planted = data.draw(st.lists(st.sampled_from([text for texts in items for text in texts]), max_size=3))
    parts = data.draw(st.permutations([*between, *planted]))
    text = data.draw(st.sampled_from([" ", ", ", "...\n\n"])).join(parts)
    text = data.draw(st.sampled_from([text, text.upper().replace("Ä", "ä"), f"  {text}!"]))
    hits = index.find(text)
    spans, counts = brute_force(items, text, ngram)
    assert [(hit.start, hit.end) for hit in hits] == spans
    assert index.count(hits) == counts
    assert sorted({item for hit in hits for item in hit.items}) == [item for item, _ in counts]


def test_case_punctuation_and_line_ends_hide_nothing(tmp_path):
    index, _ = make_index(tmp_path, ("gsm8k", 0, SENTENCE))
    changed = SENTENCE.upper().replace(" ", "  \n -- ").replace("FORTY", "'forty'")
    text = f"{CLEAN} {changed} {CLEAN}"
    (hit,) = index.find(text)
    assert text[hit.start : hit.end] == changed.removesuffix(".")
    assert index.find(SENTENCE.replace("eight", "nine").replace("half", "twice")) == []
    assert index.find(CLEAN) == []


def test_an_overlap_of_twelve_words_is_no_hit_and_one_of_thirteen_is(tmp_path):
    index, _ = make_index(tmp_path, ("gsm8k", 0, SENTENCE))
    words = SENTENCE.split()
    assert index.find(" ".join(words[3:15])) == []
    assert len(index.find(" ".join(words[3:16]))) == 1


def test_short_items_are_matched_by_eight_words_or_whole_and_the_shortest_are_listed(tmp_path):
    index, counts = make_index(
        tmp_path,
        ("arc", "ten", "one two three four five six seven eight nine ten"),
        ("arc", "six", "which gas do green plants take"),
        ("arc", "four", "what is an atom"),
        ("arc", "none", "?!"),
    )
    assert counts.detail["by_task"] == {"arc": {"8-gram": 1, "too short": 2, "whole": 1}}
    assert counts.detail["not_matchable_ids"] == {"arc": ["four", "none"]}
    assert counts.detail["not_matchable"] == 2
    assert len(index.find("... two three four five six seven eight nine ...")) == 1
    assert index.find("two three four five six seven eight") == []
    assert len(index.find("Say which gas do green plants take in?")) == 1
    assert index.find("Say which gas do green plants") == []
    assert index.find("what is an atom") == []


def test_a_question_without_its_answer_counts_whole(tmp_path):
    question = "which of these animals lays its eggs in another bird's nest"  # 12 words with bird and s
    index, _ = make_index(tmp_path, ("arc", 7, f"{question} the common cuckoo of Europe", question))
    assert len(index.find(f"They asked {question.upper()}, and nobody knew.")) == 1
    assert index.find("which of these animals lays its eggs in another bird's house") == []


def test_the_wording_that_all_items_of_a_task_share_marks_none_of_them(tmp_path):
    template = "Read the following passage and then choose the option that answers the question in the best way"
    tail = "because number {} has a long story of its own that nobody else in this list would ever tell you"
    items = [("mmlu", i, f"{template} {tail.format(f'x{i} y{i} z{i}')}") for i in range(12)]
    index, counts = make_index(tmp_path, *items, ("mmlu", "bare", template))
    assert index.find(f"{CLEAN} {template} {CLEAN}") == []
    assert counts.detail["ngrams_shared_by_many_items"] > 0
    assert counts.detail["by_task"]["mmlu"] == {"13-gram": 12, "shared": 1}
    assert counts.detail["not_matchable_ids"] == {"mmlu": ["bare"]}
    (hit,) = index.find(items[3][2])
    assert hit.items == (3,)


def test_ten_variants_of_a_benchmark_are_no_shared_wording(tmp_path):
    items = [(f"variant_{i}", 0, SENTENCE) for i in range(12)]
    index, _ = make_index(tmp_path, *items)
    (hit,) = index.find(SENTENCE)
    assert hit.items == tuple(range(12))


@relaxed
@given(st.lists(st.tuples(st.integers(0, 2), st.sets(st.integers(0, 30))), min_size=1, max_size=40), st.integers(1, 50))
def test_n_grams_that_do_not_fit_into_memory_at_once_give_the_same_table(tmp_path_factory, items, most_pending):
    def value(small):
        return small * 0x0842108421084210 % 2**64 | small  # over many partitions

    folder, spool = tmp_path_factory.mktemp("table"), tmp_path_factory.mktemp("spool")
    table = NgramTable(spool, most_pending)
    for number, (_, ngrams) in enumerate(items):
        table.add(np.array(sorted(map(value, ngrams)), np.uint64), number)
    kept, n_ngrams, n_shared = table.write(folder, np.array([task for task, _ in items], np.int32))
    expected, shared = {}, set()
    for ngram in range(31):
        having = [(number, task) for number, (task, ngrams) in enumerate(items) if ngram in ngrams]
        if any(sum(task == other for _, other in having) > 10 for task in range(3)):
            shared.add(ngram)
        elif having:
            expected[value(ngram)] = [number for number, _ in having]
    hashes, offsets, numbers = (np.load(folder / f"{name}.npy") for name in ("hashes", "offsets", "item_numbers"))
    assert hashes.tolist() == sorted(expected)
    found = [numbers[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert found == [expected[ngram] for ngram in sorted(expected)]
    assert (n_ngrams, n_shared) == (len(expected), len(shared))
    assert kept.tolist() == [len(ngrams - shared) for _, ngrams in items]


def test_an_index_of_nothing_finds_nothing(tmp_path):
    index, counts = make_index(tmp_path, ("t", 0, "too short"))
    assert index.find(SENTENCE) == []
    assert counts.detail["not_matchable"] == 1


def test_the_index_is_the_same_bytes_each_time(tmp_path):
    rng = random.Random(0)
    items = [("t", i, " ".join(rng.choices(WORDS, k=30))) for i in range(50)]
    written = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        make_index(tmp_path / name, *items)
        written.append({path.name: path.read_bytes() for path in (tmp_path / name / "index").iterdir()})
    assert written[0] == written[1]


# ---- items


def test_a_file_with_nothing_but_texts_is_named_after_itself_and_its_lines(tmp_path):
    file = tmp_path / "secret.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"text": "a"}\n\n{"text": "b"}\n'))
    assert [(item.task, item.id, item.texts) for item in read_items(file)] == [
        ("secret", 1, ("a",)),
        ("secret", 3, ("b",)),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": 3}', "has `text`, a string"),
        ('{"texts": []}', "keys are texts"),
        ('{"question": "x"}', "keys are question"),
        ("[1]", "list instead of an object"),
        ('{"text"', "not JSON"),
        ('{"text": "a", "id": [1]}', "`id` is"),
        ('{"text": "a", "task": 5}', "`task` is 5"),
    ],
)
def test_a_line_that_is_no_item_is_named(tmp_path, line, said):
    file = tmp_path / "items.jsonl"
    file.write_text(f'{{"text": "right"}}\n{line}\n')
    with pytest.raises(DataError, match=re.escape(f"{file}:2: ")) as caught:
        list(read_items(file))
    assert said in str(caught.value)


def test_problems_with_files_of_items_are_told(tmp_path):
    with pytest.raises(DataError, match="no benchmark items there"):
        write_index(tmp_path, (tmp_path / "absent.jsonl",), 13)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no benchmark items in this folder"):
        write_index(tmp_path, (tmp_path / "empty",), 13)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(DataError, match=r"b/test\.jsonl: task test has an item 1 already, in .*a/test\.jsonl"):
        write_index(tmp_path, (tmp_path / "a", tmp_path / "b"), 13)
    with pytest.raises(DataError, match="ngram is 3"):
        write_index(tmp_path, (tmp_path / "a",), 3)
    with pytest.raises(DataError, match="no index of benchmark items"):
        Index.open(tmp_path)


# ---- what is done


def test_the_three_actions(tmp_path):
    index, _ = make_index(tmp_path, ("gsm8k", 0, SENTENCE))
    text = f"{CLEAN} {SENTENCE} {CLEAN}"
    n_ngrams = len(SENTENCE.split()) - 12
    dropped = decontaminate(text, index, "drop", 200)
    assert (dropped.text, dropped.reason, dropped.items) == (None, "decontamination.overlap", ((0, n_ngrams),))
    reported = decontaminate(text, index, "report", 200)
    assert (reported.text, reported.reason, reported.items) == (text, "", dropped.items)
    clean = decontaminate(CLEAN, index, "drop", 200)
    assert (clean.text, clean.hits, clean.items) == (CLEAN, (), ())
    excised = decontaminate(text, index, "excise", 200)
    before, after = excised.text.split("\n\n")
    assert CLEAN.startswith(before)
    assert CLEAN.endswith(after)
    # 200 characters on each side, up to the end of the word that the cut falls into, and the sentence's full stop.
    assert 201 <= len(CLEAN) - len(before) <= 220
    assert 198 <= len(CLEAN) - len(after) <= 220
    assert CLEAN[len(before)] == CLEAN[-len(after) - 1] == " "
    assert excised.characters_cut == len(text) - len(excised.text)
    assert index.find(excised.text) == []


def test_short_pieces_go_and_a_document_of_nothing_else_is_dropped(tmp_path):
    index, _ = make_index(tmp_path, ("gsm8k", 0, SENTENCE))
    assert decontaminate(f"Short. {SENTENCE} End.", index, "excise", 0).reason == "decontamination.too_short"
    assert decontaminate(SENTENCE, index, "excise", 200).text is None
    kept = decontaminate(f"Short. {SENTENCE} {CLEAN}", index, "excise", 0)
    assert kept.text == CLEAN


def test_a_document_in_more_than_ten_pieces_is_dropped(tmp_path):
    index, _ = make_index(tmp_path, ("gsm8k", 0, SENTENCE))
    piece = CLEAN[:300]
    ten = f" {SENTENCE} ".join([piece] * 10)
    assert decontaminate(ten, index, "excise", 10).text.count("\n\n") == 9
    eleven = f" {SENTENCE} ".join([piece] * 11)
    outcome = decontaminate(eleven, index, "excise", 10)
    assert (outcome.text, outcome.reason, len(outcome.hits)) == (None, "decontamination.pieces", 10)


@relaxed
@given(st.integers(0, 400), st.text("ab \n", max_size=700), st.text("ab \n", max_size=700))
def test_what_is_left_is_cut_at_white_space_and_holds_no_hit(shared_index, margin, before, after):
    text = f"{before} {SENTENCE} {after}"
    outcome = decontaminate(text, shared_index, "excise", margin)
    if outcome.text is None:
        assert outcome.reason == "decontamination.too_short"
        return
    assert shared_index.find(outcome.text) == []
    for piece in outcome.text.split("\n\n") if "\n\n" not in text else []:
        assert len(piece) >= 200
        assert piece in text


@pytest.fixture(scope="module")
def shared_index(tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("one"), ("gsm8k", 0, SENTENCE))[0]


def test_scripts_without_spaces_are_cut_where_the_margin_ends(tmp_path):
    index, _ = make_index(tmp_path, ("gsm8k", 0, SENTENCE))
    wall = "語" * 1000
    outcome = decontaminate(f"{wall} {SENTENCE} {wall}", index, "excise", 200)
    assert [len(piece) for piece in outcome.text.split("\n\n")] == [801, 802]


# ---- the merged list


def test_the_list_of_contaminated_items_sums_the_shards(tmp_path):
    make_index(
        tmp_path,
        ("gsm8k", 10, SENTENCE),
        ("gsm8k", 9, "x " * 13 + "the rest of this item is never found in any text of the job at all"),
        ("arc", "q1", "a b c d e f g h"),
        ("arc", "q2", "short"),
    )
    shards = [[(5, 0, 3), (6, 0, 1), (6, 2, 1)], [(2**32 + 1, 0, 7), (2**32 + 9, 0, 2)], []]
    files = []
    for number, rows in enumerate(shards):
        files.append(tmp_path / f"{number}.parquet")
        columns = list(zip(*rows, strict=True)) or [[], [], []]
        table = pa.table(dict(zip(CONTAMINATION_SCHEMA.names, columns, strict=True)), CONTAMINATION_SCHEMA)
        pq.write_table(table, files[-1])
    counts = write_contamination(tmp_path, files[::-1], tmp_path / "index")
    rows = [json.loads(line) for line in (tmp_path / "contaminated_items.jsonl").read_text().splitlines()]
    n_ngrams = len(SENTENCE.split()) - 12
    assert rows == [
        {
            "task": "arc",
            "id": "q1",
            "how": "8-gram",
            "documents": 1,
            "ngrams_hit": 1,
            "share": 1.0,
            "doc_ids": [6],
        },
        {
            "task": "gsm8k",
            "id": 10,
            "how": "13-gram",
            "documents": 4,
            "ngrams_hit": 7,
            "share": round(7 / n_ngrams, 4),
            "doc_ids": [5, 6, 2**32 + 1],
        },
    ]
    table = json.loads((tmp_path / "contamination.json").read_text())
    assert table == counts.detail
    assert table == {
        "arc": {"items": 2, "matchable": 1, "contaminated": 1, "common": 0, "dirty_share": 1.0},
        "gsm8k": {"items": 2, "matchable": 2, "contaminated": 1, "common": 0, "dirty_share": 0.5},
    }


# ---- the real thing


@pytest.mark.skipif(not GSM8K.is_file(), reason="no benchmark files in shared/data/evals")
def test_fifty_planted_questions_of_gsm8k_are_found_and_nothing_else(tmp_path):
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    index, counts = make_index(
        tmp_path, *(("gsm8k", i, f"{row['question']} {row['answer']}", row["question"]) for i, row in enumerate(rows))
    )
    assert counts.detail["items"] == 1319
    assert counts.detail["not_matchable"] == 0
    rng = random.Random(0)
    for number in rng.sample(range(1319), 50):
        disguised = re.sub(r"[^\w\s]", lambda _: rng.choice([" ", " - ", "\n"]), rows[number]["question"])
        disguised = "".join(rng.choice([letter.upper(), letter]) for letter in disguised).replace(" ", " \n ")
        (hit,) = index.find(f"{CLEAN}\n{disguised}\n{CLEAN}")
        assert number in hit.items
    assert index.find(CLEAN) == []
