"""From documents to tokens, and on to token files."""

import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiktoken
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, normalizers, pre_tokenizers

from data_pipeline.config import PackSection
from data_pipeline.documents import HASHES_FILE, HASHES_SCHEMA
from data_pipeline.encode import ENCODED_FILE, encode_documents, write_tokens
from data_pipeline.intake import DOCUMENTS_FILE
from data_pipeline.pack import write_packed
from data_pipeline.parquet_writer import DOCUMENT_SCHEMA
from data_pipeline.tokenizer_training import train_bpe
from megagpt.data.indexed import TokenFile
from megagpt.errors import DataError
from megagpt.tokenizer import TiktokenTokenizer, open_tokenizer

EOT = "<|endoftext|>"
NASTY = [EOT, f"a{EOT}b", f"{EOT}{EOT}\n", f"<|endoftext{EOT}|>", "", "x" * 3000, "naïve 中文 😀\x00"]


def texts(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    parts = ["the ", "quick ", "brown", "\n\n", "1234567", EOT, "<|", "endoftext", "é", "😀 ", "fox jumps "]
    return ["".join(rng.choice(parts) for _ in range(rng.randint(0, 60))) for _ in range(n)]


def documents_folder(folder: Path, contents: list[str], ordinal: int = 0, group_rows: int = 100) -> Path:
    """What the documents stage writes for one shard."""
    folder.mkdir(parents=True)
    n = len(contents)
    ids = (np.int64(ordinal) << 32) + np.arange(n)
    sources = [("web", "books")[i % 2] for i in range(n)]
    empty = pa.array([""] * n)
    rows = pa.table([pa.array(ids), pa.array(contents), pa.array(sources), empty, empty], schema=DOCUMENT_SCHEMA)
    pq.write_table(rows, folder / DOCUMENTS_FILE, row_group_size=group_rows)
    columns = [ids, ids.astype(np.uint64), (ids * 7).astype(np.uint64), [len(text.encode()) for text in contents]]
    named = pa.array(sources, pa.string()).dictionary_encode()
    hashes = pa.Table.from_arrays([*map(pa.array, columns), named], HASHES_SCHEMA.names).cast(HASHES_SCHEMA)
    pq.write_table(hashes, folder / HASHES_FILE, row_group_size=3 * group_rows + 1)
    return folder


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe(iter(texts(50)), 320).save(str(path))
    return str(path)


def byte_pairs() -> TiktokenTokenizer:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"th": 256, b"the": 257, b"<|": 258}
    return TiktokenTokenizer(
        tiktoken.Encoding("tiny", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens={EOT: 259})
    )


def test_each_document_becomes_its_text_and_one_separator(tmp_path: Path, spec: str):
    contents = NASTY + texts(700)
    counts = write_tokens(tmp_path, documents_folder(tmp_path / "in", contents), spec)
    tokenizer, written = open_tokenizer(spec), TokenFile.open(tmp_path / "tokens")
    assert written.n_documents == counts.documents_in == counts.documents_out == len(contents)
    for i, text in enumerate(contents):
        tokens = written.document(i).tolist()
        assert tokens[-1] == tokenizer.eot_id
        assert tokens.count(tokenizer.eot_id) == 1
        assert tokenizer.decode(tokens[:-1]) == text
    assert counts.detail["tokens"] == written.n_tokens
    assert counts.detail["text_bytes"] == sum(len(text.encode()) for text in contents)
    assert sum(counts.detail["length_histogram"].values()) == len(contents)
    rows = pq.read_table(tmp_path / ENCODED_FILE).to_pylist()
    assert [row["doc_id"] for row in rows] == list(range(len(contents)))
    assert [row["n_tokens"] for row in rows] == [len(written.document(i)) for i in range(len(contents))]
    assert [row["source"] for row in rows[:2]] == ["web", "books"]


def test_documents_full_of_separators_make_none_all_the_way_to_the_packed_files(tmp_path: Path, spec: str):
    shards = []
    for ordinal in range(3):
        contents = [text + EOT * (i % 4) for i, text in enumerate(texts(200, ordinal))]
        folder = tmp_path / f"encoded{ordinal}"
        folder.mkdir()
        write_tokens(folder, documents_folder(tmp_path / f"in{ordinal}", contents, ordinal), spec)
        shards.append(folder)
    tokenizer = open_tokenizer(spec)
    write_packed(tmp_path, shards, tokenizer.vocab_size, PackSection(val_fraction=0.1))
    stream = np.concatenate([TokenFile.open(tmp_path / f"tokens_{split}").tokens for split in ("train", "val")])
    assert np.count_nonzero(stream == tokenizer.eot_id) == 600


@pytest.mark.parametrize("kind", ["hf", "tiktoken"])
def test_arrays_hold_what_lists_hold(spec: str, kind: str):
    tokenizer = open_tokenizer(spec) if kind == "hf" else byte_pairs()
    contents = NASTY + texts(100)
    assert [ids.tolist() for ids in tokenizer.encode_batch_numpy(contents)] == tokenizer.encode_batch(contents)
    assert tokenizer.encode_batch_numpy([]) == []
    tokens, lengths = encode_documents(tokenizer, contents)
    expected = [[*ids, tokenizer.eot_id] for ids in tokenizer.encode_batch(contents)]
    assert lengths.tolist() == [len(ids) for ids in expected]
    assert tokens.tolist() == [token for ids in expected for token in ids]
    with pytest.raises(DataError, match="half of a surrogate pair"):
        tokenizer.encode_batch_numpy(["ok", "\ud800"])


def test_a_tokenizer_that_makes_its_separator_from_text_stops_the_job(tmp_path: Path):
    careless = RustTokenizer(models.WordLevel({EOT: 0, "x": 1, "day": 2}, unk_token="x"))
    careless.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # What opening a file looks for, the separator's own name, is harmless here; another word is not.
    careless.normalizer = normalizers.Sequence([normalizers.Replace(EOT, "x"), normalizers.Replace("fine", EOT)])
    careless.save(str(tmp_path / "careless.json"))
    tokenizer = open_tokenizer(tmp_path / "careless.json")
    with pytest.raises(DataError, match=r"encodes a text with its own separator, token 0, in it.*'a fine day'"):
        encode_documents(tokenizer, ["day", "a fine day"])


def test_hashes_of_other_documents_are_an_error(tmp_path: Path, spec: str):
    folder = documents_folder(tmp_path / "in", texts(300))
    table = pq.read_table(folder / "hashes.parquet")
    pq.write_table(table.slice(1), folder / "hashes.parquet")
    with pytest.raises(DataError, match=r"docs\.parquet: 300 documents, but hashes\.parquet beside it has 299"):
        write_tokens(tmp_path, folder, spec)
    shuffled = table.take(pa.array([*range(280), *range(299, 279, -1)]))
    pq.write_table(shuffled, folder / "hashes.parquet")
    with pytest.raises(DataError, match=r"docs\.parquet: documents from row 256 on are not those of hashes\.parquet"):
        write_tokens(tmp_path, folder, spec)


def test_a_shard_without_documents_is_an_empty_token_file(tmp_path: Path, spec: str):
    counts = write_tokens(tmp_path, documents_folder(tmp_path / "in", []), spec)
    assert (counts.documents_in, counts.detail["tokens"], counts.detail["length_histogram"]) == (0, 0, {})
    assert TokenFile.open(tmp_path / "tokens").n_documents == 0
    assert pq.read_table(tmp_path / ENCODED_FILE).num_rows == 0
