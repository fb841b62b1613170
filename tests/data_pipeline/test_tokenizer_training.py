import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.config import TokenizerSection
from data_pipeline.tokenizer_training import in_sample, train_bpe, write_tokenizer
from megagpt.errors import DataError
from megagpt.tokenizer import open_tokenizer


def write_inputs(folder: Path, texts: list[str], removed: list[int]) -> tuple[list[Path], Path]:
    half = len(texts) // 2
    paths = [folder / "a.parquet", folder / "b.parquet"]
    for path, ids in zip(paths, (range(half), range(half, len(texts))), strict=True):
        pq.write_table(pa.table({"doc_id": pa.array(ids, pa.int64()), "text": [texts[i] for i in ids]}), path)
    pq.write_table(pa.table({"doc_id": pa.array(removed, pa.int64())}), folder / "removed.parquet")
    return paths, folder / "removed.parquet"


def texts(n: int) -> list[str]:
    rng = random.Random(1)
    vocabulary = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 8))) for _ in range(200)]
    return [" ".join(rng.choice(vocabulary) for _ in range(50)) for _ in range(n)]


def test_the_first_merge_is_the_most_frequent_pair():
    tokenizer = train_bpe(iter(["abab abab ab"]), 258)
    # END_OF_TEXT, 256 bytes, and one merge: "ab" is there 5 times.
    assert tokenizer.get_vocab_size() == 258
    assert tokenizer.id_to_token(0) == "<|endoftext|>"
    assert tokenizer.id_to_token(257) == "ab"


def test_any_bytes_survive_encoding_and_decoding(tmp_path: Path):
    tokenizer = train_bpe(iter(texts(20)), 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    opened = open_tokenizer(tmp_path)
    text = "tabs\tand  spaces \n\n naïve 中文 😀 \x00 <|endoftext|>"
    assert opened.decode(opened.encode(text)) == text
    assert opened.eot_id == 0
    assert 0 not in opened.encode(text)


def test_training_twice_gives_the_same_file_and_removed_documents_are_not_looked_at(tmp_path: Path):
    found = []
    for name, extra in (("one", []), ("two", []), ("three", ["zzzz zzzz zzzz zzzz " * 50])):
        folder = tmp_path / name
        folder.mkdir()
        documents, removed = write_inputs(folder, texts(40) + extra, removed=[40])
        counts = write_tokenizer(folder, documents, removed, 1, TokenizerSection(vocab_size=320))
        assert counts.detail["sample_documents"] == 40
        found.append((folder / "tokenizer.json").read_bytes())
    assert found[0] == found[1] == found[2]


def test_the_sample_is_an_even_draw_of_about_the_bytes_asked_for(tmp_path: Path):
    all_texts = texts(400)
    documents, removed = write_inputs(tmp_path, all_texts, removed=[])
    n_bytes = sum(map(len, all_texts))
    settings = TokenizerSection(vocab_size=300, sample_bytes=n_bytes // 4)
    counts = write_tokenizer(tmp_path, documents, removed, n_bytes, settings)
    assert abs(counts.detail["sample_bytes"] / n_bytes - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5
    ids = np.arange(10_000)
    assert abs(in_sample(ids, 0.25)[:5000].sum() - 1250) < 150
    assert in_sample(ids, 1.0).all()


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(DataError, match=r"tokenizer.vocab_size = 256; must be at least 257"):
        train_bpe(iter(["a"]), 256)


def test_no_document_to_train_on_is_an_error(tmp_path: Path):
    documents, removed = write_inputs(tmp_path, texts(2), removed=[0, 1])
    with pytest.raises(DataError, match="drew no document to train on"):
        write_tokenizer(tmp_path, documents, removed, 100, TokenizerSection(vocab_size=300))


def test_an_existing_tokenizer_is_copied(tmp_path: Path):
    train_bpe(iter(texts(20)), 300).save(str(tmp_path / "mine.json"))
    settings = TokenizerSection(kind="file", file=tmp_path / "mine.json")
    write_tokenizer(tmp_path / "out", [], tmp_path / "unused", 0, settings)
    assert open_tokenizer(tmp_path / "out").fingerprint == open_tokenizer(tmp_path / "mine.json").fingerprint
