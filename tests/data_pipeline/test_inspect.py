from pathlib import Path

import numpy as np
import pytest

from data_pipeline.inspect import inspect
from data_pipeline.tokenizer_training import train_bpe
from megagpt.data.indexed import TokenFileWriter
from megagpt.data.manifest import Manifest, describe_file, write_manifest
from megagpt.errors import DataError
from megagpt.tokenizer import open_tokenizer

TEXTS = ["first document", "the second one is longer", "third", "the fourth and last"]


def write_pair(folder: Path, name: str = "t_train", *, manifest: bool = True) -> Path:
    (folder / "tokenizer").mkdir()
    train_bpe(iter(TEXTS), 280).save(str(folder / "tokenizer/tokenizer.json"))
    tokenizer = open_tokenizer(folder / "tokenizer")
    with TokenFileWriter(folder / name, np.uint16) as writer:
        for text in TEXTS:
            writer.add_document([*tokenizer.encode(text), tokenizer.eot_id])
    if manifest:
        entry = describe_file(folder / name, text_bytes=sum(map(len, TEXTS)), sources={"web": {"documents": 4}})
        write_manifest(folder, Manifest(tokenizer=tokenizer.describe(), files={name: entry}, job={}, job_hash="0"))
    return folder / name


def test_prefix_either_file_and_folder_all_lead_to_the_same_page(tmp_path: Path):
    prefix = write_pair(tmp_path)
    page = inspect(prefix, 2)
    for path in (prefix.with_suffix(".bin"), prefix.with_suffix(".idx"), tmp_path):
        assert inspect(path, 2) == page
    assert "documents      4" in page
    assert "dtype          uint16" in page
    assert "verified       sizes, offsets and hashes" in page
    assert "document 0:\n    | first document<|endoftext|>" in page
    assert "document 3:\n    | the fourth and last<|endoftext|>" in page


def test_length_quantiles_are_those_of_the_documents(tmp_path: Path):
    with TokenFileWriter(tmp_path / "t", np.uint16) as writer:
        for length in range(1, 102):
            writer.add_document([5] * length)
    assert "0% 1  5% 6  25% 26  50% 51  75% 76  95% 96  100% 101" in inspect(tmp_path / "t", 0)


def test_without_a_manifest_it_says_that_hashes_were_not_checked(tmp_path: Path):
    assert "so no hashes" in inspect(write_pair(tmp_path, manifest=False))


def test_files_without_a_tokenizer_are_shown_as_numbers(tmp_path: Path):
    with TokenFileWriter(tmp_path / "t", np.uint16) as writer:
        writer.add_document([7, 8, 9])
    page = inspect(tmp_path / "t", 1)
    assert "tokenizer      unknown" in page
    assert "| 7 8 9" in page


def test_one_flipped_bit_is_an_error_that_names_the_file(tmp_path: Path):
    prefix = write_pair(tmp_path)
    content = bytearray(prefix.with_suffix(".bin").read_bytes())
    content[4] ^= 1
    prefix.with_suffix(".bin").write_bytes(content)
    with pytest.raises(DataError, match=r"t_train\.bin: .* damaged, or replaced"):
        inspect(prefix)


def test_a_cut_file_and_a_missing_one_are_errors(tmp_path: Path):
    prefix = write_pair(tmp_path)
    content = prefix.with_suffix(".bin").read_bytes()
    prefix.with_suffix(".bin").write_bytes(content[:-2])
    with pytest.raises(DataError, match=r"t_train\.bin"):
        inspect(prefix)
    with pytest.raises(DataError, match="no such file"):
        inspect(tmp_path / "absent")


def test_a_tokenizer_that_did_not_make_the_tokens_is_an_error(tmp_path: Path):
    prefix = write_pair(tmp_path)
    train_bpe(iter(["quite another text"]), 265).save(str(tmp_path / "tokenizer/tokenizer.json"))
    with pytest.raises(DataError, match="the tokens were made with"):
        inspect(prefix)


def test_a_folder_without_token_files_is_an_error(tmp_path: Path):
    with pytest.raises(DataError, match=r"neither manifest\.json nor token files"):
        inspect(tmp_path)
