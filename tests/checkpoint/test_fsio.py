"""Checksums are of what was meant to be written, and equal to another implementation's reading."""

import xxhash

from megagpt.checkpoint import fsio


def test_what_is_written_is_what_is_told(tmp_path):
    size, digest = fsio.write_file(tmp_path / "file", [b"abc", memoryview(b"defg"), b""])
    assert (tmp_path / "file").read_bytes() == b"abcdefg"
    assert (size, digest) == (7, xxhash.xxh3_128_hexdigest(b"abcdefg"))


def test_the_checksum_of_a_file_does_not_depend_on_the_chunks_it_is_read_in(tmp_path):
    content = bytes(range(256)) * 20_000  # 5.12 MB: more than one chunk
    (tmp_path / "file").write_bytes(content)
    assert fsio.checksum(tmp_path / "file") == (len(content), xxhash.xxh3_128_hexdigest(content))


def test_publishing_replaces_a_file_and_leaves_no_temporary(tmp_path):
    (tmp_path / "old").write_text("old")
    (tmp_path / "new").write_text("new")
    fsio.publish(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_text() == "new"
