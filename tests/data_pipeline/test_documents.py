import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.decontamination.index import write_index
from data_pipeline.dedup.first_occurrence import REPEATS_SCHEMA
from data_pipeline.dedup.signatures import SIGNATURES_FILE, write_signatures
from data_pipeline.documents import CONTAMINATION_FILE, HASHES_FILE, write_documents
from data_pipeline.parquet_writer import DOCUMENT_SCHEMA, BoundedWriter
from data_pipeline.tasks import Counts
from megagpt.errors import DataError
from tests.data_pipeline.passage_dedup import make, substring_spans, unit_spans, write_clusters_file, write_shard

ROOT = Path(__file__).resolve().parents[2]
ITEM = "Natalia sold clips to forty eight of her friends in April and then she sold half as many in May."
PROSE = " ".join(f"Line {i} of a text about the weather in the hills, with nothing else in it." for i in range(40))


def write_spans(path: Path, rows: list[tuple[int, int, int]]) -> Path:
    columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[], [], []]
    pq.write_table(pa.table(columns, schema=REPEATS_SCHEMA), path, row_group_size=2)
    return path


class Shard:
    """One shard's inputs, and the stage run on them."""

    def __init__(self, folder: Path, texts: dict[int, str]) -> None:
        self.folder = folder
        self.documents = write_shard(folder / "filtered.parquet", texts)
        write_signatures(make(folder / "signatures"), self.documents, None)
        self.signatures = folder / "signatures" / SIGNATURES_FILE
        self.out = folder / "out"

    def run(self, clusters: Path | None = None, spans=None, decontamination=None) -> Counts:
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()
        seen: list[tuple[int, int]] = []
        counts = write_documents(
            self.out,
            self.documents,
            clusters,
            self.signatures,
            spans or {},
            decontamination,
            lambda n_bytes, n_documents: seen.append((n_bytes, n_documents)),
        )
        assert counts.documents_in == counts.documents_out + sum(counts.rejected.values())
        assert counts.documents_in == sum(n for _, n in seen) == pq.read_metadata(self.documents).num_rows
        assert counts.documents_out == len(self.rows()) == len(self.hashes())
        assert counts.detail["text_bytes"] == sum(len(row["text"].encode()) for row in self.rows().values())
        assert sum(counts.detail["length_histogram"].values()) == counts.documents_out
        kept = Counter(row["source"] for row in self.rows().values())
        assert {s: n[""] for s, n in counts.detail["sources"].items() if n.get("")} == kept
        return counts

    def rows(self) -> dict[int, dict]:
        table = pq.read_table(self.out / "docs.parquet")
        assert table.schema.equals(DOCUMENT_SCHEMA)
        return {row["doc_id"]: {**row, "meta": json.loads(row["meta"])} for row in table.to_pylist()}

    def texts(self) -> dict[int, str]:
        return {doc_id: row["text"] for doc_id, row in self.rows().items()}

    def hashes(self) -> dict[int, dict]:
        return {row["doc_id"]: row for row in pq.read_table(self.out / HASHES_FILE).to_pylist()}


def test_nothing_to_do_leaves_the_documents_as_they_are(tmp_path: Path):
    shard = Shard(tmp_path, {i: f"text number {i}\n" for i in range(10)})
    counts = shard.run()
    assert counts.rejected == {}
    assert pq.read_table(shard.out / "docs.parquet").equals(pq.read_table(shard.documents))
    signed = pq.read_table(shard.signatures, columns=["doc_id", "hash_high", "hash_low", "text_bytes"]).to_pylist()
    assert [{**row, "source": "s0"} for row in signed] == list(shard.hashes().values())


def test_removed_documents_go_with_their_reason_and_meta_names_the_cluster_of_what_stays(tmp_path: Path):
    shard = Shard(tmp_path, {i: f"text {i}" for i in range(8)})
    rows = [(1, 0, 3, False, "exact_duplicate"), (0, 0, 3, True, ""), (7, 0, 3, False, "near_duplicate")]
    rows += [(4, 4, 2, False, "published_duplicate"), (9, 8, 2, False, "near_duplicate")]
    counts = shard.run(write_clusters_file(tmp_path / "c.parquet", rows))
    assert counts.rejected == {"exact_duplicate": 1, "near_duplicate": 1, "published_duplicate": 1}
    assert list(shard.rows()) == [0, 2, 3, 5, 6]
    assert shard.rows()[0]["meta"] == {"n": "0", "cluster": 0, "cluster_size": 3}
    assert shard.rows()[2]["meta"] == {"n": "2"}
    assert counts.detail["sources"] == {
        "s0": {"": 5, "exact_duplicate": 1, "near_duplicate": 1, "published_duplicate": 1}
    }


def test_spans_of_all_files_and_kinds_are_united_and_cut(tmp_path: Path):
    texts = {i: f"zero{i} one two three\nfour five\nsix" for i in range(9)}
    shard = Shard(tmp_path, texts)
    # zero1 one two three / four five / six: characters 6-9, 10-13 and 20-29.
    a = write_spans(tmp_path / "a", [(1, 6, 9), (5, 20, 29), (8, 20, 33)])
    b = write_spans(tmp_path / "b", [(1, 8, 13), (8, 0, 4)])
    c = write_spans(tmp_path / "c", [(1, 10, 13), (1, 20, 29), (6, 0, 19)])
    counts = shard.run(None, {"units": [a, b], "substrings": [c]})
    assert shard.texts() == texts | {
        1: "zero1 three\nsix",
        5: "zero5 one two three\nsix",
        6: "four five\nsix",
        8: "8 one two three",
    }
    assert counts.detail["characters_cut"] == {"units": 7 + 9 + 17, "substrings": 3 + 9 + 19}
    assert counts.detail["documents_cut"] == {"units": 3, "substrings": 2}


def test_a_document_left_without_a_word_goes(tmp_path: Path):
    shard = Shard(tmp_path, {0: "all of it\n...", 1: "all of it\n..."})
    counts = shard.run(None, {"units": [write_spans(tmp_path / "s", [(1, 0, 9)])]})
    assert (counts.rejected, list(shard.rows())) == ({"empty_after_cutting": 1}, [0])


def test_documents_whose_texts_end_up_equal_have_equal_hashes(tmp_path: Path):
    texts = {0: "Same words, here", 1: "first line\nsame words HERE", 2: "same words here\nlast line", 3: "else"}
    shard = Shard(tmp_path, texts)
    shard.run(None, {"units": [write_spans(tmp_path / "s", [(1, 0, 10), (2, 16, 25)])]})
    found = {(row["hash_high"], row["hash_low"]) for i, row in shard.hashes().items() if i < 3}
    assert len(found) == 1
    assert shard.hashes()[1]["text_bytes"] == len("same words HERE")


@pytest.mark.parametrize("wrong", [[(2, 0, 1)], [(7, 0, 1), (8, 0, 1)]])
def test_spans_of_documents_that_are_not_there_are_an_error(tmp_path: Path, wrong: list[tuple[int, int, int]]):
    shard = Shard(tmp_path, dict.fromkeys((1, 3, 8), "text"))
    with pytest.raises(DataError, match=r"passages to cut from \d on are not those of these documents"):
        shard.run(None, {"units": [write_spans(tmp_path / "s", wrong)]})
    assert list(shard.out.iterdir()) == []


def test_signatures_of_other_documents_are_an_error(tmp_path: Path):
    shard = Shard(tmp_path, dict.fromkeys(range(4), "text"))
    write_shard(shard.documents, dict.fromkeys((0, 1, 2, 5), "text"))
    with pytest.raises(DataError, match="not those of its signatures"):
        shard.run()


def index_of(folder: Path) -> Path:
    file = folder / "items.jsonl"
    file.write_text(json.dumps({"task": "gsm8k", "id": 7, "text": ITEM}) + "\n")
    write_index(make(folder / "index"), (file,), 13)
    return folder / "index"


def test_a_contaminated_document_is_reported(tmp_path: Path):
    shard = Shard(tmp_path, {0: PROSE, 1: f"{PROSE}\n{ITEM}\n{PROSE}", 2: PROSE})
    counts = shard.run(decontamination=(index_of(tmp_path), "report", 0))
    assert shard.rows()[1]["meta"] == {"n": "1", "contaminated": 1}
    assert [row["meta"].get("contaminated") for row in shard.rows().values()] == [None, 1, None]
    (hit,) = pq.read_table(shard.out / CONTAMINATION_FILE).to_pylist()
    assert (hit["doc_id"], hit["item"]) == (1, 0)
    assert hit["n_hits"] == len(ITEM.split()) - 13 + 1
    assert counts.detail["contaminated_documents"] == 1


def test_a_contaminated_document_is_dropped_or_the_passage_excised(tmp_path: Path):
    shard = Shard(tmp_path, {0: PROSE, 1: f"{PROSE}\n{ITEM}\n{PROSE}"})
    index = index_of(tmp_path)
    counts = shard.run(decontamination=(index, "drop", 0))
    assert counts.rejected == {"decontamination.overlap": 1}
    assert pq.read_table(shard.out / CONTAMINATION_FILE).column("doc_id").to_pylist() == [1]
    before = shard.hashes()
    counts = shard.run(decontamination=(index, "excise", 0))
    assert shard.texts() == {0: PROSE, 1: f"{PROSE}\n\n{PROSE}"}
    assert counts.detail["characters_excised"] == len(ITEM)
    assert shard.hashes()[0] == before[0]
    assert shard.hashes()[1]["text_bytes"] == 2 * len(PROSE) + 2


def test_decontamination_looks_at_the_text_after_cutting(tmp_path: Path):
    middle = ITEM.index("forty")
    shard = Shard(tmp_path, {0: ITEM + " " + PROSE, 1: f"{ITEM[:middle]}something else {ITEM[middle:]} {PROSE}"})
    spans = {"units": [write_spans(tmp_path / "s", [(0, 0, len(ITEM)), (1, middle, middle + 14)])]}
    shard.run(None, spans, (index_of(tmp_path), "report", 0))
    assert [row["meta"].get("contaminated") for row in shard.rows().values()] == [None, 1]


def test_an_empty_shard_gives_empty_files(tmp_path: Path):
    shard = Shard(tmp_path, {})
    spans = {"units": [write_spans(tmp_path / "s", [(1 << 32, 0, 4)])]}
    counts = shard.run(write_clusters_file(tmp_path / "c.parquet", [(1 << 32, 1, 2, True, "")]), spans)
    assert (counts.documents_in, counts.documents_out) == (0, 0)


def chain(folder: Path, n_partitions: int, *, backwards: bool) -> dict[int, str]:
    """Three shards with repeated lines and passages through both kinds of cutting; the final texts."""
    rng = random.Random(3)
    lines = [" ".join(f"{rng.choice('abcdefgh')}{rng.choice('abcdefghijkl')}" for _ in range(12)) for _ in range(60)]
    shards = [
        Shard(make(folder / f"shard{s}"), {(s << 32) + i: "\n".join(rng.choices(lines, k=8)) for i in range(12)})
        for s in range(3)
    ]
    files = [shard.documents for shard in shards][:: -1 if backwards else 1]
    spans = {
        "units": unit_spans(folder / "u", files, "line", 3, n_partitions),
        "substrings": substring_spans(folder / "s", files, 20, n_partitions),
    }
    texts: dict[int, str] = {}
    for shard in shards:
        shard.run(None, spans)
        texts |= shard.texts()
    return texts


def test_partitions_and_the_order_of_shards_do_not_change_the_documents(tmp_path: Path):
    texts = chain(tmp_path / "one", 1, backwards=False)
    assert chain(tmp_path / "three", 3, backwards=True) == texts
    lines = [line for text in texts.values() for line in text.split("\n")]
    assert len(lines) == len(set(lines)) == 60


def test_rows_and_tables_of_a_writer_come_out_in_order(tmp_path: Path):
    schema = pa.schema([("doc_id", pa.int64()), ("source", pa.dictionary(pa.int32(), pa.string()))])
    with BoundedWriter(tmp_path / "f", schema, group_rows=4) as writer:
        for i in range(0, 12, 3):
            writer.add({"doc_id": i, "source": f"s{i}"}, 1)
            writer.add_table(pa.table([np.array([i + 1, i + 2]), [f"t{i}", "x"]], schema=schema), 2)
    table = pq.read_table(tmp_path / "f")
    assert table.schema.equals(schema)
    assert table.column("doc_id").to_pylist() == list(range(12))
    assert table.column("source").to_pylist()[:4] == ["s0", "t0", "x", "s3"]
    assert pq.read_metadata(tmp_path / "f").num_row_groups == 3


GROWTH = """
import itertools, random, sys
from pathlib import Path
from data_pipeline import parquet_writer
from data_pipeline.dedup import first_occurrence, sorted_runs
from data_pipeline.dedup.signatures import SIGNATURES_FILE, write_signatures
from data_pipeline.documents import write_documents
from data_pipeline.memory import peak_rss_bytes
from tests.data_pipeline.passage_dedup import make, substring_spans, unit_spans
# The units of work, made small, so that ten times the documents are many of them.
parquet_writer.GROUP_CHARACTERS, sorted_runs.RUN_ROWS, first_occurrence.MEMORY_LIMIT = 1 << 20, 1 << 14, "48MB"
folder, n_documents = Path(sys.argv[1]), int(sys.argv[2])
words = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=4)]
rng = random.Random(0)
with parquet_writer.BoundedWriter(folder / "docs.parquet", parquet_writer.DOCUMENT_SCHEMA) as writer:
    for i in range(n_documents):
        lines = [" ".join(rng.choices(words, k=20)) for _ in range(40)]
        text = "\\n".join(["a line that is in every document and so is cut from all but one", *lines])
        writer.add({"doc_id": i, "text": text, "source": "s", "url": "", "meta": {}}, len(text))
write_signatures(make(folder / "signed"), folder / "docs.parquet", None)
shards = [folder / "docs.parquet"]
spans = {"units": unit_spans(folder / "u", shards, "line", 3), "substrings": substring_spans(folder / "s", shards, 50)}
counts = write_documents(make(folder / "out"), shards[0], None, folder / "signed" / SIGNATURES_FILE, spans, None)
assert counts.detail["documents_cut"]["units"] == n_documents - 1
sys.stdout.write(str(peak_rss_bytes() >> 20))
"""


def test_ten_times_the_documents_take_no_more_memory(tmp_path: Path):
    peaks_mb = []
    for n_documents in (800, 8_000):
        folder = make(tmp_path / str(n_documents))
        ran = subprocess.run(
            [sys.executable, "-c", GROWTH, str(folder), str(n_documents)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        peaks_mb.append(int(ran.stdout))
    # 35 MB more of text, 7 million more tokens of 16 bytes, 800,000 more rows of 24.
    assert peaks_mb[1] - peaks_mb[0] < 60
