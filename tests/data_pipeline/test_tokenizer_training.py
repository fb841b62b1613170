import inspect
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import regex
import tiktoken
from tiktoken_ext import openai_public
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, pre_tokenizers, trainers

from data_pipeline.config import TokenizerSection
from data_pipeline.tokenizer_training import check_tokenizer, in_sample, splitting, train_bpe, write_tokenizer
from megagpt.errors import ConfigError, DataError
from megagpt.tokenizer import TiktokenTokenizer, open_tokenizer

ROOT = Path(__file__).resolve().parents[2]


def write_inputs(folder: Path, texts: list[str]) -> list[Path]:
    half = len(texts) // 2
    paths = [folder / "a.parquet", folder / "b.parquet"]
    for path, ids in zip(paths, (range(half), range(half, len(texts))), strict=True):
        pq.write_table(pa.table({"doc_id": pa.array(ids, pa.int64()), "text": [texts[i] for i in ids]}), path)
    return paths


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


def test_training_twice_gives_the_same_file(tmp_path: Path):
    found = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        counts = write_tokenizer(folder, write_inputs(folder, texts(40)), 1, TokenizerSection(vocab_size=320))
        assert counts.detail["sample_documents"] == 40
        found.append((folder / "tokenizer.json").read_bytes())
    assert found[0] == found[1]


TRAIN = """
import random, sys
from data_pipeline.tokenizer_training import train_bpe
rng = random.Random(3)
letters = "abcdefghijklmnop"
words = ["".join(rng.choice(letters) for _ in range(rng.randint(1, 9))) for _ in range(3000)]
texts = [" ".join(rng.choice(words) for _ in range(60)) for _ in range(300)]
train_bpe(iter(texts), 2000, ["<|user|>"], "single").save(sys.argv[1])
"""


def test_the_number_of_threads_does_not_change_the_tokenizer(tmp_path: Path):
    found = []
    for threads in ("1", "2", "5"):
        settings = {"TOKENIZERS_PARALLELISM": "false" if threads == "1" else "true", "RAYON_NUM_THREADS": threads}
        path = tmp_path / f"{threads}.json"
        subprocess.run([sys.executable, "-c", TRAIN, str(path)], check=True, cwd=ROOT, env=os.environ | settings)
        found.append(path.read_bytes())
    assert found[0] == found[1] == found[2]
    assert len(json.loads(found[0])["model"]["vocab"]) == 2000


def test_the_sample_is_an_even_draw_of_about_the_bytes_asked_for_and_is_recorded(tmp_path: Path):
    all_texts = texts(400)
    n_bytes = sum(map(len, all_texts))
    section = TokenizerSection(vocab_size=300, sample_bytes=n_bytes // 4)
    detail = write_tokenizer(tmp_path, write_inputs(tmp_path, all_texts), n_bytes, section).detail
    drawn = in_sample(np.arange(400), detail["sample_share"])
    assert detail["sample_share"] == section.sample_bytes / n_bytes
    assert detail["sample_documents"] == drawn.sum()
    assert detail["sample_bytes"] == sum(len(all_texts[i]) for i in np.flatnonzero(drawn))
    assert (detail["sample_of_documents"], detail["sample_of_bytes"]) == (400, n_bytes)
    assert abs(detail["sample_bytes"] / n_bytes - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5
    ids = np.arange(10_000)
    assert abs(in_sample(ids, 0.25)[:5000].sum() - 1250) < 150
    assert in_sample(ids, 1.0).all()


def test_special_tokens_follow_the_separator_and_no_text_makes_one(tmp_path: Path):
    names = ["<|user|>", "<|assistant|>", "[/INST]"]
    # Words that hold nothing but these names: every merge that could spell one would be learnt.
    shouting = ["".join(names) * 50, " ".join(names) * 50, "\n".join(names)]
    section = TokenizerSection(vocab_size=320, special_tokens=tuple(names))
    detail = write_tokenizer(tmp_path, write_inputs(tmp_path, shouting + texts(5)), 1, section).detail
    assert detail["special_tokens"] == {"<|endoftext|>": 0, "<|user|>": 1, "<|assistant|>": 2, "[/INST]": 3}
    tokenizer = open_tokenizer(tmp_path / "tokenizer.json")
    for text in [*names, *shouting, "x".join(names), "<|endoftext|>"]:
        ids = tokenizer.encode(text)
        assert min(ids) > 3
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([2, 0]) == "<|assistant|><|endoftext|>"


def test_a_special_token_that_text_would_make_is_refused_and_would_have_been_made():
    careless = RustTokenizer(models.BPE())
    careless.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    for name, text in (("hello", "hello"), ("Ġ<", " <")):
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=[name], initial_alphabet=alphabet, show_progress=False
        )
        careless.train_from_iterator([f"{text}{text} {text}" * 50], trainer)
        careless.encode_special_tokens = True
        assert 0 in careless.encode(text).ids
        with pytest.raises(ConfigError, match=f"special_tokens: text could make the token '{name}'; choose"):
            check_tokenizer(TokenizerSection(special_tokens=(name,)))


@pytest.mark.parametrize("name", ["", "a", "123", "''", "<a b>", " <a>", "<é>", "<\n>"])
def test_other_names_that_cannot_be_told_from_text_are_refused(name: str):
    with pytest.raises(ConfigError, match=r"tokenizer\.special_tokens: text could make the token"):
        check_tokenizer(TokenizerSection(special_tokens=(name,)))


def test_special_tokens_must_differ_and_have_room():
    for names in (("<|a|>", "<|a|>"), ("<|endoftext|>",)):
        with pytest.raises(ConfigError, match=r"is there twice; <\|endoftext\|> always is"):
            check_tokenizer(TokenizerSection(special_tokens=names))
    with pytest.raises(ConfigError) as error:
        check_tokenizer(TokenizerSection(vocab_size=258, special_tokens=("<|a|>", "<|b|>")))
    assert str(error.value) == (
        "tokenizer.vocab_size = 258; must be at least 259: 256 bytes, <|endoftext|> and 2 special token(s)"
    )


def pieces(digits: str, text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in splitting(digits).pre_tokenize_str(text)]


NUMBERS = ["1234567", "in 2024 or 1e10", "3.14159", "abc1234x", "v12.3", "٣٤٥٦٧", "²½1234", "10,000,000 1 22 333 4444"]


@pytest.mark.parametrize("text", NUMBERS)
def test_digit_groups_are_those_of_cl100k(text: str):
    source = inspect.getsource(openai_public.cl100k_base)
    pattern = source.split('"pat_str": r"""')[1].split('"""')[0]
    theirs = [piece for piece in regex.findall(pattern, text) if piece.strip()[:1].isnumeric()]
    ours = [piece for piece in pieces("up_to_three", text) if piece[:1].isnumeric()]
    assert ours == theirs
    assert "".join(pieces("up_to_three", text)) == text


@pytest.mark.parametrize("text", NUMBERS)
def test_single_digits_stand_alone_and_gpt2_keeps_runs_together(text: str):
    assert all(len(piece.strip()) == 1 for piece in pieces("single", text) if any(map(str.isnumeric, piece)))
    assert "".join(pieces("single", text)) == text
    assert pieces("gpt2", text) == regex.findall(openai_public.r50k_pat_str, text)


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(ConfigError, match=r"tokenizer.vocab_size = 256; must be at least 257"):
        train_bpe(iter(["a"]), 256)


def test_no_document_to_train_on_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match="drew no document to train on"):
        write_tokenizer(tmp_path, write_inputs(tmp_path, []), 100, TokenizerSection(vocab_size=300))


def test_an_existing_tokenizer_is_copied(tmp_path: Path):
    train_bpe(iter(texts(20)), 300).save(str(tmp_path / "mine.json"))
    settings = TokenizerSection(kind="file", file=tmp_path / "mine.json")
    check_tokenizer(settings)
    write_tokenizer(tmp_path / "out", [], 0, settings)
    assert open_tokenizer(tmp_path / "out").fingerprint == open_tokenizer(tmp_path / "mine.json").fingerprint


def test_a_file_that_is_no_tokenizer_is_noticed_at_the_start(tmp_path: Path):
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(DataError, match=r"mine\.json: not a tokenizer"):
        check_tokenizer(TokenizerSection(kind="file", file=tmp_path / "mine.json"))


def test_missing_files_of_tiktoken_are_named_at_the_start_unless_the_job_has_saved_the_encoding(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    for variable in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    tiktoken.registry.ENCODINGS.pop("gpt2", None)
    settings = TokenizerSection(kind="tiktoken", name="gpt2")
    with pytest.raises(DataError, match=r"TIKTOKEN_CACHE_DIR to a folder that holds 6d1cbeee0f20b3d9449abfede4726ed8"):
        check_tokenizer(settings, tmp_path / "tokenizer")
    ranks = {bytes([byte]): byte for byte in range(256)}
    for name in ("cl100k_base", "gpt2"):
        encoding = tiktoken.Encoding(name, pat_str=".", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256})
        TiktokenTokenizer(encoding).save(tmp_path / name)
    check_tokenizer(settings, tmp_path / "gpt2")
    with pytest.raises(DataError, match="TIKTOKEN_CACHE_DIR"):
        check_tokenizer(settings, tmp_path / "cl100k_base")
