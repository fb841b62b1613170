import random
import re
import tempfile
import unicodedata
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.dedup import sorted_runs
from data_pipeline.dedup.first_occurrence import OCCURRENCES_FILE, REPEATS_FILE, write_repeats
from data_pipeline.dedup.text_batches import TextBatch
from data_pipeline.dedup.units import unit_rows, write_units
from tests.data_pipeline.passage_dedup import make, read_spans, unit_spans, write_clusters_file, write_shard

SHARD = 1 << 32


def normalised(unit: str) -> str:
    """CCNet, section 3.1, in plain Python."""
    lowered = unicodedata.normalize("NFD", unit.lower().replace("\u03c2", "\u03c3"))
    kept = [c for c in lowered if c.isspace() or unicodedata.category(c) not in ("Mn", "Cc", "Cf")]
    letters = "".join(c for c in kept if unicodedata.category(c)[0] != "P")
    return " ".join(re.sub(r"\d", "0", letters).split())


def units_of(text: str, unit: str) -> list[tuple[int, int]]:
    """Start of the first line and end of the last visible character, of lines or of runs of them."""
    units: list[tuple[int, int]] = []
    at, goes_on = 0, False
    for line in text.split("\n"):
        if line.strip():
            start = units.pop()[0] if goes_on and unit == "paragraph" else at
            units.append((start, at + len(line.rstrip())))
        goes_on = bool(line.strip())
        at += len(line) + 1
    return units


def brute_force(shards: list[dict[int, str]], unit: str, min_words: int) -> dict[int, list[tuple[int, int]]]:
    seen, spans = set(), {}
    for doc_id, text in sorted((i, text) for shard in shards for i, text in shard.items()):
        for start, end in units_of(text, unit):
            if len(re.findall(r"\w+", text[start:end])) < min_words:
                continue
            key = normalised(text[start:end])
            if key in seen:
                spans.setdefault(doc_id, []).append((start, end))
            seen.add(key)
    return spans


def keys(*units: str) -> list[int]:
    batch = TextBatch(np.arange(len(units)), pa.array(units, pa.string()))
    found, indices, _, _ = unit_rows(batch, "paragraph", 0)
    assert indices.tolist() == list(range(len(units)))
    return found.tolist()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Copyright 2019, all rights reserved.", "copyright 2024 ALL RIGHTS RESERVED"),
        ("Café crème \u2013 voilà!", "cafe creme voila"),
        ("  two   words\t", "two\nwords"),
        ("ΟΔΟΣ ΟΔΟΣ", "οδος οδοσ"),
        ("İstanbul", "istanbul"),
        ("it\u2019s \u201cquoted\u201d", "its quoted"),
        ("한국어", unicodedata.normalize("NFD", "한국어")),
        ("\ufeffstart", "start"),
    ],
)
def test_units_that_say_the_same_have_one_key(one: str, other: str):
    a, b = keys(one, other)
    assert a == b


@pytest.mark.parametrize(("one", "other"), [("two words", "twowords"), ("a1", "a11"), ("ab", "ba"), ("東京", "京都")])
def test_units_that_say_something_else_have_two(one: str, other: str):
    a, b = keys(one, other)
    assert a != b


@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=1, max_size=4))
def test_keys_agree_exactly_where_the_normalised_texts_do(units: list[str]):
    units = [u.replace("\n", " ") for u in units if u.strip()]
    batch = TextBatch(np.arange(len(units)), pa.array(units, pa.string()))
    found, _, starts, ends = unit_rows(batch, "line", 0)
    assert [(0, len(u.rstrip())) for u in units] == list(zip(starts.tolist(), ends.tolist(), strict=True))
    texts = [normalised(unit) for unit in units]
    assert [a == b for a in texts for b in texts] == [a == b for a in found.tolist() for b in found.tolist()]


LINES = st.lists(
    st.sampled_from(["a b", "A  b.", "b é", "b e", "", " ", "\t", "  a b", "12 c", "34 c", "x"]), max_size=6
)
TEXTS = st.lists(LINES.map("\n".join), max_size=7)


@given(st.lists(TEXTS, min_size=1, max_size=3), st.sampled_from(["line", "paragraph"]), st.integers(1, 3))
@example([["a b\n\na b\n c\n \nA b.\nc\n\n"]], "paragraph", 1)
@settings(max_examples=60, deadline=None)
def test_repeats_are_those_of_a_set_of_everything_seen(shards: list[list[str]], unit: str, n_partitions: int):
    documents = [{s * SHARD + i: text for i, text in enumerate(texts)} for s, texts in enumerate(shards)]
    with tempfile.TemporaryDirectory() as name:
        files = [write_shard(Path(name) / f"{i}.parquet", texts) for i, texts in enumerate(documents)]
        found = read_spans(unit_spans(Path(name), files, unit, 2, n_partitions))
    assert found == brute_force(documents, unit, 2)


def corpus(seed: int = 0) -> list[dict[int, str]]:
    rng = random.Random(seed)
    lines = [" ".join(f"w{rng.randrange(300)}" for _ in range(5)) for _ in range(150)]
    return [{s * SHARD + i: "\n".join(rng.choices(lines, k=6)) for i in range(20)} for s in range(3)]


@pytest.mark.parametrize("n_partitions", [2, 5])
def test_partitions_and_the_order_of_shards_change_nothing(tmp_path: Path, n_partitions: int):
    files = [write_shard(tmp_path / f"{i}.parquet", texts) for i, texts in enumerate(corpus())]
    expected = read_spans(unit_spans(tmp_path / "one", files, "line"))
    assert read_spans(unit_spans(tmp_path / "many", files[::-1], "line", 1, n_partitions)) == expected
    assert expected == brute_force(corpus(), "line", 1) != {}


def test_the_same_input_gives_the_same_bytes(tmp_path: Path):
    files = [write_shard(tmp_path / f"{i}.parquet", texts) for i, texts in enumerate(corpus())]
    a, b = (unit_spans(tmp_path / name, files, "line") for name in "ab")
    assert a[0].read_bytes() == b[0].read_bytes()
    assert (tmp_path / "a/units-0" / OCCURRENCES_FILE).read_bytes() == (
        tmp_path / "b/units-0" / OCCURRENCES_FILE
    ).read_bytes()


def test_documents_that_were_removed_take_no_part(tmp_path: Path):
    line = "one line of words"
    file = write_shard(tmp_path / "d.parquet", {0: line, 1: line, 2: "else\n" + line, 3: line})
    clusters = write_clusters_file(
        tmp_path / "c.parquet",
        [(0, 0, 2, False, "published_duplicate"), (1, 1, 2, True, ""), (3, 1, 2, False, "exact_duplicate")],
    )
    assert read_spans(unit_spans(tmp_path / "out", [file], "line", clusters=clusters)) == {2: [(5, 5 + len(line))]}


def test_short_units_are_left_alone_and_counted_documents_are_those_that_took_part(tmp_path: Path):
    file = write_shard(tmp_path / "d.parquet", dict.fromkeys(range(4), "Yes.\nNo, thank you."))
    counts = write_units(make(tmp_path / "u"), file, None, "line", 3)
    assert (counts.documents_in, counts.documents_out, counts.detail["rows"]) == (4, 4, 4)


def test_an_empty_shard_and_no_repeats_give_files_without_rows(tmp_path: Path):
    files = unit_spans(tmp_path, [write_shard(tmp_path / "d.parquet", {})], "line", n_partitions=2)
    assert [pq.read_table(file).num_rows for file in files] == [0, 0]


def test_rows_beyond_a_run_are_written_as_sorted_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sorted_runs, "RUN_ROWS", 20_000)
    rng = np.random.default_rng(0)
    schema = pa.schema([("key", pa.uint64()), ("doc_id", pa.int64()), ("start", pa.int32()), ("end", pa.int32())])
    found = rng.integers(0, 1 << 64, 50_000, np.uint64)
    ids = np.arange(50_000)
    with sorted_runs.RunWriter(tmp_path / OCCURRENCES_FILE, schema) as writer:
        for i in range(0, 50_000, 5_000):
            part = ids[i : i + 5_000]
            writer.add(found[part], part, np.zeros(5_000, np.int32), np.ones(5_000, np.int32))
    table = pq.read_table(tmp_path / OCCURRENCES_FILE)
    written = table.column("key").to_numpy()
    for run in (written[:20_000], written[20_000:40_000], written[40_000:]):
        assert (run[1:] >= run[:-1]).all()
    assert (found[table.column("doc_id").to_numpy()] == written).all()
    counts = write_repeats(make(tmp_path / "out"), [tmp_path], (0, 1))
    assert counts.detail == {"repeats": 0, "spans": 0}
    assert [path.name for path in (tmp_path / "out").iterdir()] == [REPEATS_FILE]
