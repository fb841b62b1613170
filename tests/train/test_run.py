"""Wrong input ends with exit code 2 and one message that says what to do; no traceback, no folder left behind."""

from __future__ import annotations

import re
import shutil

import pytest

from megagpt.data.indexed import TokenFileWriter
from megagpt.data.manifest import Manifest, describe_file, write_manifest
from megagpt.tokenizer import open_tokenizer
from megagpt.train.run import main
from tests.tiny import VOCAB_SIZE, run_words


@pytest.fixture
def told(capsys, tmp_path, tokens):
    """Run a command that must fail before any process group is made; its message."""

    def command(*overrides, data=tokens, files=(), world_size="1"):
        run_dir = tmp_path / "run"
        words = [*map(str, files), *run_words(run_dir, data, *overrides)]
        assert main(words, {"WORLD_SIZE": world_size}) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("error:") == 1
        assert "Traceback" not in err
        assert not run_dir.exists()
        return err

    return command


def test_a_misspelt_key(told):
    assert "command line: unknown key 'optim.lrr'; did you mean 'lr'?" in told("optim.lrr=1")


def test_a_value_of_the_wrong_type(told):
    message = told("train.max_steps=many", "optim.betas=[1, 2, 3]")
    assert "train.max_steps" in message
    assert "'many'" in message
    assert "optim.betas" in message


def test_a_missing_configuration_file(told, tmp_path):
    assert f"{tmp_path / 'none.yaml'}: no such configuration file" in told(files=[tmp_path / "none.yaml"])


def test_a_batch_that_does_not_divide(told):
    message = told("train.global_batch_size=10", world_size="3")
    assert "train.global_batch_size (10) must be a multiple of data-parallel processes (3)" in message
    assert "the nearest that fit: 6 or 12" in message


def test_a_layout_that_cannot_be_run(told):
    assert "use parallel.zero_stage=1" in told("parallel.zero_stage=0", "train.dtype=bf16")


def test_missing_token_files(told, tmp_path):
    assert str(tmp_path / "nowhere") in told(data=tmp_path / "nowhere")


def test_missing_validation_tokens_also_where_they_are_only_checked(told, tmp_path):
    nowhere = tmp_path / "nowhere"
    for switch in ([], ["--check"]):
        assert str(nowhere) in told(f"data.val={nowhere}", "eval.every=2", *switch)


def test_a_truncated_token_file(told, tokens, tmp_path):
    for ending in (".bin", ".idx"):
        shutil.copy(tokens.with_name(tokens.name + ending), tmp_path / f"cut{ending}")
    content = (tmp_path / "cut.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(content[:-10])
    message = told(data=tmp_path / "cut")
    assert "cut.bin" in message
    assert re.search(rf"{len(content) - 10:,}|{len(content) - 10}", message)


def test_too_few_tokens_for_one_sample(told, tmp_path):
    with TokenFileWriter(tmp_path / "few", "<u2") as writer:
        writer.add_document([1, 2, 3])
    assert "3 tokens, but one sample needs 17" in told(data=tmp_path / "few")


def make_tokenizer(folder, text):
    from tokenizers import ByteLevelBPETokenizer

    folder.mkdir()
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [text], vocab_size=300, min_frequency=1, special_tokens=["<|endoftext|>"], show_progress=False
    )
    bpe.save(str(folder / "tokenizer.json"))
    return open_tokenizer(str(folder / "tokenizer.json"))


@pytest.fixture
def described_tokens(tmp_path):
    """Token files with a manifest that names their tokenizer, of 300 tokens."""
    tokenizer = make_tokenizer(tmp_path / "one", "the cat sat on the mat and looked at the other cats there")
    folder = tmp_path / "data"
    folder.mkdir()
    tokenizer.save(folder)
    with TokenFileWriter(folder / "train", "<u2") as writer:
        writer.add_document(list(range(256)))
    entry = describe_file(folder / "train", text_bytes=256, sources={})
    write_manifest(folder, Manifest(tokenizer.describe(), {"train": entry}, {}, ""))
    return folder / "train"


def test_tokens_of_another_tokenizer(told, described_tokens, tmp_path):
    other = make_tokenizer(tmp_path / "other", "words of quite another kind, with numbers 12345 and more 67890")
    message = told(
        f"data.tokenizer={tmp_path / 'other' / 'tokenizer.json'}", "model.vocab_size=400", data=described_tokens
    )
    assert "was made with another tokenizer" in message
    assert other.fingerprint in message


def test_a_vocabulary_smaller_than_the_tokenizers(told, described_tokens):
    message = told(data=described_tokens)
    vocab_size = re.search(r"the tokenizer has (\d+) tokens", message)
    assert f"model.vocab_size is {VOCAB_SIZE}" in message
    assert f"set model.vocab_size={vocab_size[1]} or more" in message


def test_check_prints_the_plan_and_writes_nothing(capsys, tmp_path, tokens):
    """8 sequences of 16 tokens a step, 12 steps: 128 and 1,536 tokens."""
    words = [*run_words(tmp_path / "run", tokens), "--check"]
    assert main(words, {"WORLD_SIZE": "2"}) == 0
    out = capsys.readouterr().out
    assert "8 sequences x 16 tokens = 128 a step" in out
    assert "= 2 sequences x 2 micro-batches x 2 processes" in out
    assert "1,536 tokens" in out
    assert not (tmp_path / "run").exists()


def test_one_process_speaks_for_all(capsys, tmp_path, tokens):
    for words in (["--help"], [*run_words(tmp_path / "run", tokens), "--check"]):
        assert main(words, {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}) == 0
    assert capsys.readouterr().out == ""


def test_a_second_host_tells_what_is_wrong_with_it(capsys, tmp_path, tokens):
    """Its token files may be missing there alone."""
    words = run_words(tmp_path / "run", tmp_path / "nowhere")
    told = []
    for local_rank in ("0", "1"):
        assert main(words, {"RANK": f"{2 + int(local_rank)}", "LOCAL_RANK": local_rank, "WORLD_SIZE": "4"}) == 2
        told.append(capsys.readouterr().err.count("error: "))
    assert told == [1, 0]


def test_help_shows_commands_that_can_be_copied(capsys):
    assert main(["--help"], {}) == 0
    assert "deepspeed launch/pretrain.py configs/quickstart.yaml" in capsys.readouterr().out
