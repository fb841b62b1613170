"""GGUF files made to do harm, and cut ones: all are refused with a reason, in bounded time and memory."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc

import numpy as np
import pytest

from megagpt.checkpoint.convert import gguf_to_checkpoint
from megagpt.checkpoint.gguf_header import read_gguf_header
from megagpt.checkpoint.gguf_import import import_gguf
from megagpt.checkpoint.gguf_tokenizer import rebuild_tokenizer
from megagpt.errors import CheckpointError, MegaGPTError
from tests.checkpoint.gguf_files import hf_llama, write_model

HUGE = struct.pack("<Q", 2**60)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("good") / "m.gguf", hf_llama()).read_bytes()


def put(at: int, value: bytes):
    """The file with other bytes there."""
    return lambda raw: raw[:at] + value + raw[at + len(value) :]


def behind(name: str, skip: int, value: bytes):
    """The file with other bytes `skip` behind the first place where a name stands."""

    def change(raw: bytes) -> bytes:
        at = raw.index(name.encode()) + len(name) + skip
        return raw[:at] + value + raw[at + len(value) :]

    return change


def renamed(before: str, after: str):
    assert len(before) == len(after)
    return lambda raw: raw.replace(before.encode(), after.encode(), 1)


TOKENS, TYPES, QUERY = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "blk.0.attn_q.weight"
U32 = struct.Struct("<I").pack
U64 = struct.Struct("<Q").pack
HOSTILE = {
    "nothing": (lambda raw: b"", "a file of 0 bytes"),
    "three bytes": (lambda raw: raw[:3], "a file of 3 bytes"),
    "the magic alone": (lambda raw: raw[:4], "the version has 4 bytes from byte 4 on, the file 4; is it whole"),
    "another magic": (put(0, b"GGML"), "begins with b'GGML', not with b'GGUF'"),
    "version 1": (put(4, U32(1)), "version 1; only 2 and 3"),
    "big-endian": (put(4, struct.pack(">I", 3)), "big-endian"),
    "2**60 tensors": (put(8, HUGE), f"tensors: {2**60} of at least"),
    "2**60 keys": (put(16, HUGE), f"keys: {2**60} of at least"),
    "a key of 1001 letters": (put(24, U64(1001)), "a key's name has 1001 bytes; at most 1000 can be"),
    "a key of 2**60 letters": (put(24, HUGE), f"a key's name has {2**60} bytes; at most 1000"),
    "2**60 tokens": (behind(TOKENS, 8, HUGE), f"{TOKENS}: elements: {2**60} of at least 8 bytes"),
    "2**60 types": (behind(TYPES, 8, HUGE), f"{TYPES}: elements: {2**60} of at least 4 bytes"),
    "2**64 - 1 types": (behind(TYPES, 8, U64(2**64 - 1)), f"{TYPES}: elements: {2**64 - 1} of"),
    "a token of 2**60 letters": (behind(TOKENS, 16, HUGE), f"{TOKENS} has {2**60} bytes"),
    "a list of lists": (behind(TOKENS, 4, U32(9)), f"{TOKENS} is of type 9"),
    "a value of type 77": (behind("llama.block_count", 0, U32(77)), "llama.block_count is of type 77"),
    "a truth value of 7": (behind("add_bos_token", 4, b"\x07"), "add_bos_token: a truth value of 7"),
    "letters that are none": (behind("tokenizer.ggml.model", 12, b"\xff\xfe"), "tokenizer.ggml.model is not UTF-8"),
    "a key twice": (renamed("ggml.bos_token_id", "ggml.eos_token_id"), "tokenizer.ggml.eos_token_id stands twice"),
    "a tensor twice": (renamed(QUERY, "blk.0.attn_k.weight"), "blk.0.attn_k.weight stands twice"),
    "no dimension": (behind(QUERY, 0, U32(0)), f"{QUERY} has 0 dimensions"),
    "2**31 dimensions": (behind(QUERY, 0, U32(2**31)), f"{QUERY} has {2**31} dimensions"),
    "a size of 0": (behind(QUERY, 4, U64(0)), rf"{QUERY} has the sizes \[0, 64\]"),
    "2**120 elements": (behind(QUERY, 4, HUGE + HUGE), f"{QUERY} has the sizes"),
    "2**50 rows": (behind(QUERY, 12, U64(2**50)), rf"{QUERY} has the shape \({2**50}, 64\), but its metadata says"),
    "type 99": (behind(QUERY, 20, U32(99)), f"{QUERY} is of ggml type 99"),
    "a type of larger blocks": (behind(QUERY, 20, U32(14)), f"{QUERY} has rows of 64, but Q6_K has blocks of 256"),
    "whole numbers": (behind(QUERY, 20, U32(26)), f"{QUERY} is of type I32, which the gguf package cannot"),
    "an offset outside": (behind(QUERY, 24, U64(2**40)), f"{QUERY} is said to begin {2**40} bytes behind"),
    "an offset of 2**64 - 32": (behind(QUERY, 24, U64(2**64 - 32)), f"{QUERY} is said to begin"),
    "an offset between": (behind(QUERY, 24, U64(7)), f"{QUERY} is said to begin 7 bytes behind"),
    "an offset in another tensor": (behind(QUERY, 24, U64(64)), "inside another tensor"),
    "a larger type": (behind(QUERY, 20, U32(28)), "inside another tensor"),
    "the last byte cut": (lambda raw: raw[:-1], "ends at byte .*, the file has .*; is it whole"),
    "cut in the middle of the data": (lambda raw: raw[: len(raw) * 2 // 3], "is it whole|is said to begin"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_with_the_file_and_the_value_and_takes_no_memory(name, good, tmp_path):
    change, message = HOSTILE[name]
    file = tmp_path / "hostile.gguf"
    file.write_bytes(change(good))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as error:
            import_gguf(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(file) in str(error.value)
    assert peak < 4 * len(good) + 2**20


def test_an_alignment_that_is_no_power_of_two_is_refused(tmp_path):
    for value in (0, 24):
        file = write_model(tmp_path / f"{value}.gguf", hf_llama(), change={"llama.x": np.uint32(value)})
        file.write_bytes(
            file.read_bytes().replace(b"\x07\0\0\0\0\0\0\0llama.x", b"\x11\0\0\0\0\0\0\0general.alignment", 1)
        )
        with pytest.raises(CheckpointError, match=f"general.alignment = {value}; a power of two is"):
            read_gguf_header(file)


def test_a_file_of_a_terabyte_of_nothing_is_refused_at_once(good, tmp_path):
    """Sparse: an endless list of empty strings, whose count its size would bear out."""
    file = tmp_path / "sparse.gguf"
    at = good.index(TOKENS.encode()) + len(TOKENS)
    for n, message in ((2**21 + 1, "at most 2097152 are read"), (2**33, "at most 2097152 are read")):
        file.write_bytes(good[: at + 8] + U64(n))
        os.truncate(file, 2**40)
        began = time.monotonic()
        with pytest.raises(CheckpointError, match=message):
            read_gguf_header(file)
        assert time.monotonic() - began < 5
    file.write_bytes(put(16, U64(2**32))(good))
    os.truncate(file, 2**40)
    with pytest.raises(CheckpointError, match="4294967296 keys; at most 65536 are read"):
        read_gguf_header(file)
    at = good.index(TYPES.encode()) + len(TYPES)
    file.write_bytes(good[: at + 8] + U64(2**36))
    os.truncate(file, 2**40)
    with pytest.raises(CheckpointError, match="a header has at most 64000000"):
        read_gguf_header(file)


def test_a_folder_a_missing_file_and_a_pipe_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "absent.gguf", tmp_path / "pipe"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            gguf_to_checkpoint(path, tmp_path / "run")


def test_a_link_to_a_file_is_read(good, tmp_path):
    (tmp_path / "blob").write_bytes(good)
    (tmp_path / "m.gguf").symlink_to("blob")
    assert import_gguf(tmp_path / "m.gguf")[0].n_layer == 2


def test_no_cut_and_no_wrong_byte_of_a_header_ends_in_anything_but_a_reason(good, tmp_path):
    file = tmp_path / "damaged.gguf"
    n_header = good.index(b"blk.1.ffn_down.weight") + 200
    random = np.random.default_rng(0)
    told = []
    for i in range(240):
        raw = bytearray(good)
        if i % 3 == 0:
            del raw[int(random.integers(n_header)) :]
        else:
            for at in random.integers(n_header, size=i % 3):
                raw[at] = random.integers(256)
        file.write_bytes(raw)
        try:
            config, _, header = import_gguf(file)
            rebuild_tokenizer(header.metadata, config.vocab_size, str(file))
        except MegaGPTError as error:
            told.append(str(error))
    assert len(told) > 100
    assert all(str(file) in message and len(message) < 1000 for message in told)
