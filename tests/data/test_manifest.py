"""megagpt.data.manifest: manifest.json beside the token files."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from megagpt.data.indexed import TokenFileWriter
from megagpt.data.manifest import Manifest, describe_file, read_manifest, verify_token_file, write_manifest
from megagpt.errors import DataError


@pytest.fixture
def prefix(tmp_path) -> Path:
    with TokenFileWriter(tmp_path / "x_train", np.uint16) as writer:
        for document in ([1, 2, 300], [4, 5]):
            writer.add_document(document)
    return tmp_path / "x_train"


@pytest.fixture
def manifest(prefix) -> Manifest:
    entry = describe_file(prefix, text_bytes=17, sources={"wiki": {"documents": 2}})
    made = Manifest({"kind": "tiktoken", "name": "gpt2"}, {"x_train": entry}, {"out": "o", "sources": []}, "abc")
    write_manifest(prefix.parent, made)
    return made


def test_an_entry_says_what_the_files_hold(prefix):
    read = []
    entry = describe_file(prefix, text_bytes=17, sources={"wiki": 2}, on_bytes=read.append)
    assert (entry.n_tokens, entry.n_documents, entry.dtype, entry.max_token_id) == (5, 2, "uint16", 300)
    assert (entry.text_bytes, entry.sources) == (17, {"wiki": 2})
    for digest, ending in ((entry.bin, "bin"), (entry.idx, "idx")):
        content = prefix.with_suffix(f".{ending}").read_bytes()
        assert (digest.bytes, digest.xxh3_128) == (len(content), xxhash.xxh3_128_hexdigest(content))
    assert sum(read) == entry.bin.bytes + entry.idx.bytes


def test_an_empty_pair_has_an_entry(tmp_path):
    with TokenFileWriter(tmp_path / "t", np.uint16):
        pass
    entry = describe_file(tmp_path / "t", text_bytes=0, sources={})
    assert (entry.n_tokens, entry.max_token_id, entry.bin.bytes) == (0, -1, 0)


def test_what_was_written_is_read_from_the_folder_and_from_the_prefix(prefix, manifest):
    assert read_manifest(prefix) == read_manifest(prefix.parent) == manifest
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["manifest.json", "x_train.bin", "x_train.idx"]
    content = json.loads((prefix.parent / "manifest.json").read_text())
    assert sorted(content) == ["files", "format", "job", "job_hash", "tokenizer"]
    assert sorted(content["files"]["x_train"]) == sorted(
        ["n_tokens", "n_documents", "dtype", "max_token_id", "bin", "idx", "text_bytes", "sources"]
    )


def test_a_folder_without_manifest_has_none(tmp_path):
    assert read_manifest(tmp_path) is None
    assert read_manifest(tmp_path / "t") is None


def test_the_hash_is_of_the_content_and_not_of_the_spelling(prefix, manifest):
    path = prefix.parent / "manifest.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(content.items()))))
    assert read_manifest(prefix).hash == manifest.hash
    assert len(manifest.hash) == 32
    assert replace(manifest, job_hash="abd").hash != manifest.hash


def test_manifests_do_not_change(manifest):
    with pytest.raises(FrozenInstanceError):
        manifest.job_hash = "other"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda content: content.pop("tokenizer"), "tokenizer: "),
        (lambda content: content["files"]["x_train"].pop("n_tokens"), "files.x_train.n_tokens: "),
        (lambda content: content["files"]["x_train"].update(n_tokens="5"), "files.x_train.n_tokens: "),
        (lambda content: content["files"]["x_train"]["bin"].pop("xxh3_128"), "files.x_train.bin.xxh3_128: "),
        (lambda content: content.update(format=2), "format: "),
        (lambda content: content.update(surprise=1), "surprise: "),
    ],
)
def test_missing_and_wrong_keys_are_named(prefix, manifest, change, complaint):
    path = prefix.parent / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError) as error:
        read_manifest(prefix)
    assert str(error.value).startswith(f"{path}: not a manifest of format 1: {complaint}")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\xff"])
def test_what_is_no_manifest_is_refused(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=r"manifest\.json: not a manifest of format 1: file: "):
        read_manifest(tmp_path)


def test_an_intact_pair_passes_verification_and_tells_its_progress(prefix, manifest):
    read = []
    verify_token_file(prefix, read.append)
    assert sum(read) == prefix.with_suffix(".bin").stat().st_size + prefix.with_suffix(".idx").stat().st_size


def test_one_changed_bit_is_found_and_both_hashes_named(prefix, manifest):
    path = prefix.with_suffix(".bin")
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        verify_token_file(prefix)
    message = str(error.value)
    assert message.startswith(f"{path}: 10 bytes with xxh3_128 {xxhash.xxh3_128_hexdigest(bytes(content))}")
    assert manifest.files["x_train"].bin.xxh3_128 in message


def test_a_pair_without_manifest_cannot_be_verified(prefix):
    with pytest.raises(DataError, match=r"manifest\.json: no such file; without it .*x_train cannot be verified"):
        verify_token_file(prefix)
